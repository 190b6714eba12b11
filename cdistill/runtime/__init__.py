"""Processes, threads, signals, random numbers, and the terminal.

Read `processes` (who prints, how several are started), `signals`, `randomness` (every draw is a function of what it is
for) and `console`. Only `randomness` imports torch at once.
"""
