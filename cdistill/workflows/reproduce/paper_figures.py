"""Which figures there are, and what they show."""

from collections.abc import Sequence

from cdistill.preconditionings import Preconditioning, load_preconditioning
from cdistill.preconditionings.coefficients import load_coefficients
from cdistill.teachers import load_teacher
from cdistill.workflows.reproduce.claims import ALIGNMENT
from cdistill.workflows.reproduce.experiments import CONSISTENCY, GAN, TRAJECTORY, DataSet, Trial
from cdistill.workflows.reproduce.figures import (
    Mark,
    Panel,
    panel,
    plot_heat_maps,
    plot_panels,
    plot_single_step,
    plot_study,
)
from cdistill.workflows.reproduce.outcomes import Outcomes
from cdistill.workflows.reproduce.request import Request
from cdistill.workflows.reproduce.study import Comparison, decades


def teacher_of(data: DataSet) -> str:
    """Returns the name of a data set's teacher."""
    return Trial(data, data.arms[0], 0).load().teacher


def load_forms(request: Request, data: DataSet, names: Sequence[str]) -> dict[str, Preconditioning]:
    """Returns preconditionings with the coefficients of a data set's teacher."""
    name = teacher_of(data)
    return {form: load_preconditioning(form, load_teacher(name), request.coefficients(name)) for form in names}


def spans(request: Request) -> dict[str, float]:
    """Returns over how many decades of t each data set's l falls from 0.9 to 0.1."""
    files = {data.name: request.coefficients(teacher_of(data)) for data in request.data}
    return {name: decades(load_coefficients(file)[0]) for name, file in files.items() if file.is_file()}


def draw(request: Request, found: Sequence[Outcomes], comparisons: Sequence[Comparison]) -> list[str]:
    """Draws Figures 2 to 6 and the study's; returns the names of all that are there, Figure 7 too."""
    folder = request.out / "figures"
    single = [
        (panel(one, CONSISTENCY, 1), panel(one, TRAJECTORY[:-1], 1), one.data.name,
         load_forms(request, one.data, ("cm", "ctm", "analytic")))
        for one in found
        if set(CONSISTENCY) <= {arm for arm, _ in one.found} and request.coefficients(teacher_of(one.data)).is_file()
    ]  # fmt: skip
    if single:
        plot_single_step(folder / "figure-2.png", single)
    curves = {
        "figure-3": ("Fig. 3: two steps", TRAJECTORY[:-1], (2,)),
        "figure-5": ("Fig. 5: BCM's preconditioning", ("ctm", "bcm"), (1, 2)),
        "figure-6": ("Fig. 6: with the GAN loss", GAN, (1, 2)),
    }
    for name, (title, arms, calls) in curves.items():
        rows = [[panel(one, arms, nfe) for nfe in calls] for one in found]
        rows = [row for row in rows if all(part.arms for part in row)]
        if rows:
            plot_panels(folder / f"{name}.png", title, _wrapped(rows))
    forms = {
        f"{form}: {data.name}" if form != "ctm" else "CTM": one
        for data in request.data
        if request.coefficients(teacher_of(data)).is_file()
        for form, one in load_forms(request, data, ("ctm", "analytic")).items()
    }
    if forms:
        plot_heat_maps(folder / "figure-4.png", forms)
    if comparisons:
        shown = {
            f"{metric}, 2 to 10 NFE": [
                Mark(one.data, one.form, one.scores["untrained MSE"], one.after)
                for one in comparisons
                if one.nfe > 1 and (one.metric == ALIGNMENT) == (metric == ALIGNMENT)
            ]
            for metric in (ALIGNMENT, "distance to the data")
        }
        plot_study(folder / "study.png", shown)
    return sorted(path.stem for path in folder.glob("*.png") if "seed" not in path.stem)


def _wrapped(rows: Sequence[Sequence[Panel]]) -> list[Sequence[Panel]]:
    """Puts single panels three in a row."""
    if len(rows[0]) > 1:
        return list(rows)
    panels = [row[0] for row in rows]
    return [panels[first : first + 3] for first in range(0, len(panels), 3)]
