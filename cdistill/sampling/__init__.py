"""Sampling: which points a sampler visits, and how the samples of many seeds are drawn."""

from cdistill.sampling.base import StudentSampler, TeacherSampler, TimedSampler
from cdistill.sampling.drawing import Chunk, Drawn, Noise, Sampler, draw_chunks, generate, stream
from cdistill.sampling.inversion import Inverse, invert
from cdistill.sampling.sample_store import Pieces, draw_missing
from cdistill.sampling.samplers import (
    TEACHER_NFE,
    TEACHER_POINTS,
    SamplerChoice,
    default_sampler,
    make_sampler,
    sampler_class,
    student_sampler,
    teacher_sampler,
    teacher_trajectories,
    trajectories,
)

__all__ = [
    "TEACHER_NFE",
    "TEACHER_POINTS",
    "Chunk",
    "Drawn",
    "Inverse",
    "Noise",
    "Pieces",
    "Sampler",
    "SamplerChoice",
    "StudentSampler",
    "TeacherSampler",
    "TimedSampler",
    "default_sampler",
    "draw_chunks",
    "draw_missing",
    "generate",
    "invert",
    "make_sampler",
    "sampler_class",
    "stream",
    "student_sampler",
    "teacher_sampler",
    "teacher_trajectories",
    "trajectories",
]
