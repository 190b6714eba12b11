"""What is asked of `cdistill reproduce`, and where its files lie.

::

    OUT/runs/DATA-ARM-SEED/         a run of `cdistill distill`
        coefficients/TEACHER.*      as `cdistill estimate-coeffs` writes them
        laboratory/TEACHER/         as `cdistill compare` writes it
        logs/                       what these commands said
        figures/  reproduction.md  reproduction.json
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cdistill.runtime.processes import thread_count
from cdistill.workflows.reproduce.claims import CLAIMS, arms_of
from cdistill.workflows.reproduce.experiments import DataSet, Trial, trials


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        letters: Claims.
        kind: Name of the experiments.
        data: Data sets.
        seeds: Trainings of each arm.
        processes: Of each training.
        out: Folder of everything.
    """

    letters: Sequence[str]
    kind: str
    data: Sequence[DataSet]
    seeds: int
    processes: int
    out: Path

    @property
    def trials(self) -> list[Trial]:
        """The trainings that the claims need, seed by seed."""
        arms = {data.name: arms_of(self.letters, data.arms) for data in self.data}
        return [trial for trial in trials(self.data, self.seeds) if trial.arm in arms[trial.data.name]]

    def everything(self, data: Sequence[DataSet]) -> "Request":
        """Returns the request for all claims on `data` with all seeds that were ever trained here.

        What is concluded is about all that lies in the folder, whatever was asked for last.
        """
        suffixes = [path.name.rpartition("-")[2] for path in (self.out / "runs").glob("*-*")]
        seeds = max([self.seeds, *(int(text) + 1 for text in suffixes if text.isdecimal())])
        return replace(self, letters=list(CLAIMS), data=data, seeds=seeds)

    @property
    def threads(self) -> int:
        """Threads of a command; 0 for all that there are."""
        return min(data.threads for data in self.data)

    @property
    def at_once(self) -> int:
        """How many commands share the cores of this machine."""
        return thread_count() if self.processes == 1 and self.threads else 1

    @property
    def several(self) -> list[str]:
        """The options of a command that start its processes."""
        return ["--nproc", str(self.processes)] if self.processes > 1 else []

    def command(self, trial: Trial) -> list[str]:
        """Returns the command line, without the program, of a training."""
        return [*trial.command(self.run(trial)), *self.several]

    def run(self, trial: Trial) -> Path:
        """Returns the folder of a trial."""
        return self.out / "runs" / trial.name

    def coefficients(self, teacher: str) -> Path:
        """Returns the file of a teacher's coefficients."""
        return self.out / "coefficients" / f"{teacher}.safetensors"

    def laboratory(self, teacher: str) -> Path:
        """Returns the folder of what the laboratory says of a teacher."""
        return self.out / "laboratory" / teacher
