"""Sampling: how noise becomes images, the same image for a seed always.

In reading order: ``solvers`` (one step of the ODE, one jump), ``drawing`` (seeds, chunks, threads), ``samplers`` (the
registered samplers and `make_sampler`), ``inversion`` (from images back to noise), ``sample_store`` (finished samples
on disk), ``teacher_data`` (a teacher's samples as training data), ``image_grids`` and ``writers`` (output formats).
"""
