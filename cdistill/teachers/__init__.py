"""Teachers: frozen denoisers with a name, a default data source and a digest of their weights."""

from cdistill.teachers.base import Teacher, load_teacher, save_teacher

__all__ = ["Teacher", "load_teacher", "save_teacher"]
