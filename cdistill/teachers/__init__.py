"""Teachers: frozen denoisers with a name, a default data source and a digest of their weights.

Read `base` (what a teacher is), `named` (those that go by a name), `official` (EDM's files), `foreign` (other people's
files), `mixture` (exact denoisers).
"""

from cdistill.teachers.base import Teacher, load_teacher, save_teacher

__all__ = ["Teacher", "load_teacher", "save_teacher"]
