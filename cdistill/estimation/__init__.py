"""Estimation of l_t and s_t from a teacher (Zheng et al. 2025, Eqs. 15 and 17, Appendix B.1), with error bars."""

from cdistill.estimation.base import Estimator, Points, Statistics
from cdistill.estimation.collecting import Budget, collect_statistics
from cdistill.estimation.result import Estimate, solve
from cdistill.estimation.resume import Part

__all__ = ["Budget", "Estimate", "Estimator", "Part", "Points", "Statistics", "collect_statistics", "solve"]
