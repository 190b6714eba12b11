"""One page about runs: `reading` makes records of a folder, `tables`, `figures`, `sheets` what to show, `page` HTML.

Everything here works without torch, on whatever a folder holds so far.
"""
