"""What is shown of results: one HTML page about runs, and the figures of the other commands.

In reading order: `curves` (what was recorded, as points), `reading` (what a page shows of a run),
`tables`, `panels` (lines of one style), `charts`, `image_grids`, `summary`, `page` (all of it as HTML); `figures`
(the paper's figures as PNG) and `inspect_view` (the tables of `cdistill inspect`). Only `figures` needs torch.
"""
