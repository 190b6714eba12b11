"""``cdistill report``: runs as one HTML page. Needs no torch."""

from collections.abc import Sequence
from pathlib import Path

from cdistill.reporting.page import render
from cdistill.reporting.reading import read_pairs, read_run
from cdistill.storage.files import write_text
from cdistill.storage.run_folder import RunFolder, run_names
from cdistill.workflows.inspection import inspect_file


def report(paths: Sequence[Path], out: Path, comparison: Path | None = None) -> dict[str, str]:
    """Writes the page about runs, finished or not; returns where it is, as JSON.

    Args:
        paths: Run folders; those that shall be compared stand side by side in this order.
        out: The page.
        comparison: What ``cdistill evaluate`` wrote about several runs on the same seeds.

    Raises:
        RecipeError: A run is named twice.
        MissingAssetError: There is no run in a folder.
        CorruptFileError: A file of a run is damaged.
    """
    names = run_names(paths, "report")
    runs = [read_run(RunFolder(path), name, inspect_file) for path, name in zip(paths, names, strict=True)]
    write_text(out, render(runs, [] if comparison is None else read_pairs(comparison)))
    return {"report": str(out)}
