"""Sampling: which points a sampler visits, and how the samples of many seeds are drawn."""

from cdistill.sampling.drawing import Chunk, Noise, Sampler, draw_chunks, generate
from cdistill.sampling.samplers import (
    TEACHER_POINTS,
    student_sampler,
    teacher_sampler,
    teacher_trajectories,
    trajectories,
)

__all__ = [
    "TEACHER_POINTS",
    "Chunk",
    "Noise",
    "Sampler",
    "draw_chunks",
    "generate",
    "student_sampler",
    "teacher_sampler",
    "teacher_trajectories",
    "trajectories",
]
