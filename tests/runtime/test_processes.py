"""Two processes compute the gradient of one: same draws, same global batch, same weights of the losses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cdistill.runtime.processes import _free_port

ROOT = Path(__file__).resolve().parents[2]
CASES = {
    "ctm": {},
    "ctm, micro-batches": {"accumulation": 2},
    "ctm, live target": {"target": "live", "target_rate": 0.5},
    "ctm, gan": {"gan": True},
    "ctm, gan, micro-batches": {"gan": True, "accumulation": 3},
    "cm": {"objective": "cm", "dsm": False},
    "cm, dsm": {"objective": "cm"},
}
CODE = """
import sys
import torch
from safetensors.torch import save_file
from cdistill.runtime.processes import end, leave_group
from cdistill.training.settings import GanSection
from cdistill.training.loop import Counters, finish, read
from tests.conftest import *
from tests.quadrature import exact_estimate
from tests.runtime.test_processes import CASES
from tests.training.tasks import make_task, moved
from cdistill.schedule import log_uniform_grid

torch.set_num_threads(1)
found = {}
table = exact_estimate(None, log_uniform_grid(30)).coefficients
for name, options in CASES.items():
    gan = GanSection() if options.get("gan") else None
    values = {key: value for key, value in options.items() if key != "gan"}
    task = moved(make_task(table, gan=gan, **values))
    counters = Counters()
    for index in range(2 if gan else 1):  # the second trains the discriminator
        report = read(task.accelerator, task.backward(index))
        owners = [("student", task.student)] + ([("discriminator", task.adversary.discriminator)] if gan else [])
        for owner, network in owners:
            for key, parameter in network.named_parameters():
                if parameter.grad is not None:
                    found[f"{name}/{index}/{owner}/{key}"] = parameter.grad.detach().contiguous().clone()
        for key, value in report.values.items():
            found[f"{name}/{index}/{key}"] = torch.tensor(value)
        finish(task, index, report, counters)
if task.accelerator.is_main_process:
    save_file(found, sys.argv[1])
leave_group()
end(0)
"""


def gradients(path: Path, processes: int) -> dict[str, torch.Tensor]:
    """Runs the cases in so many processes and returns what the first of them found."""
    common = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    if processes > 1:
        common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        started.append(
            subprocess.Popen([sys.executable, "-c", CODE, str(path)], env={**common, **own}, stderr=subprocess.PIPE)
        )
    for process in started:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == 0, errors.decode()
    return load_file(path)


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    """In float64 to 1e-9, the losses, the adaptive weights and the discriminator's step as well."""
    alone, together = (gradients(tmp_path / f"{count}.safetensors", count) for count in (1, 2))
    assert alone.keys() == together.keys()
    assert {name.split("/")[0] for name in alone} == set(CASES)
    for name, value in alone.items():
        torch.testing.assert_close(
            together[name], value, rtol=1e-9, atol=1e-11, msg=lambda told, key=name: f"{key}: {told}"
        )
