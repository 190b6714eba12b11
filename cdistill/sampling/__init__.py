"""Sampling: which points a sampler visits, and how the samples of many seeds are drawn."""

from cdistill.sampling.drawing import Chunk, Drawn, Noise, Sampler, draw_chunks, generate, stream
from cdistill.sampling.pieces import Pieces, draw_missing
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
    "Drawn",
    "Noise",
    "Pieces",
    "Sampler",
    "draw_chunks",
    "draw_missing",
    "generate",
    "stream",
    "student_sampler",
    "teacher_sampler",
    "teacher_trajectories",
    "trajectories",
]
