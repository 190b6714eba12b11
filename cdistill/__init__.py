"""cdistill turns a slow diffusion model into a student that draws an image in one to ten network calls.

It implements consistency distillation with the preconditionings of Zheng et al. (ICLR 2025), among them
Analytic-Precond, whose coefficients are estimated from the teacher.
"""

__version__ = "0.1.0"
