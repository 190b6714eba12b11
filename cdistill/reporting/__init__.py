"""A page about runs: `reading` makes records of their folders, `tables`, `figures`, `sheets`, `origins` what to show.

`page` makes HTML of it. Everything here works without torch, on whatever a folder holds so far.
"""
