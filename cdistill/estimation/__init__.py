"""Estimation of l_t and s_t from a teacher (Zheng et al. 2025, Eqs. 15 and 17, Appendix B.1), with error bars.

Read `base` (estimators and the sums they leave), `autodiff` and `forward` (the two estimators), `collecting` (the sums,
by several processes and after an interruption), `estimate` (l, s, their errors and their file).
"""
