"""ECT: its schedule, a student that satisfies it exactly, the same dropout masks, and a whole run."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cdistill.cli.app import run
from cdistill.data import Source
from cdistill.networks.denoiser import Denoiser
from cdistill.objectives.base import Batch, Networks
from cdistill.objectives.ect import ECT, ECTSection
from cdistill.preconditionings import make_preconditioning
from cdistill.runtime.randomness import generator
from cdistill.schedule import EPS, T
from cdistill.storage.checkpoints import load_checkpoint
from cdistill.storage.files import list_checkpoints
from cdistill.storage.run_folder import RunFolder
from cdistill.training.settings import TrainingSection
from cdistill.training.step_data import draw_batches, tabulate
from tests.conftest import fast_distill
from tests.training.tasks import make_task, moved, step


def draw(index: int, size: int = 4096, **values) -> dict[str, Tensor]:
    objective = ECT(ECTSection(name="ect", **values), (1,))
    return objective.draw(size, generator(0, "ect", index), index)


def test_t_is_log_normal_and_the_default_is_the_papers():
    t = draw(0)["t"].log()
    assert float(t.mean()) == pytest.approx(-1.1, abs=0.1)
    assert float(t.std()) == pytest.approx(2.0, abs=0.1)
    other = draw(0, level_mean=-0.8, level_std=1.6)["t"].log()
    assert float(other.mean()) == pytest.approx(-0.8, abs=0.1)


@pytest.mark.parametrize(
    ("index", "a"), [(0, 1), (99, 1), (100, 2), (350, 4), (799, 8)]
)  # as public code has its stages
def test_r_moves_up_to_t_by_the_published_schedule(index, a):
    """r = t (1 - n(t) / q^a) with n(t) = 1 + 8 / (1 + e^t), one sample at a time; at least eps, which is the end."""
    levels = draw(index, every=100, q=4)
    for t, r in zip(levels["t"].tolist(), levels["r"].tolist(), strict=True):
        assert r == pytest.approx(max(EPS, t * (1 - (1 + 8 / (1 + math.exp(t))) / 4**a)), rel=1e-12)
    assert bool((levels["r"] < levels["t"]).all())
    assert bool((levels["t"] <= T).all())


def test_however_long_a_training_is_r_stays_below_t():
    levels = draw(10**9 - 1, every=1)
    gap = levels["t"] - levels["r"]
    assert float(gap.min()) > 0
    assert float((gap / levels["t"] - 1e-6).abs().max()) < 1e-9


class Point(Denoiser):
    """The denoiser of data that are one point."""

    num_calls = 0
    sample_shape, sigma_data = (2,), 0.5

    def forward(self, x, t, s=None, labels=None):
        self.num_calls += 1
        return torch.full_like(x, 0.3)

    def student(self, takes_s=True, dropout=0.0):
        return self


def batch_of(objective: ECT, index: int, form: str = "ctm") -> Batch:
    source = Source("a point", torch.full((8, 2), 0.3, dtype=torch.float64))
    section, draws = TrainingSection(iterations=1, batch_size=8), tabulate(make_preconditioning(form), objective.grid)
    (batch,) = draw_batches(objective, draws, source, None, section, 0, index, slice(0, 8), torch.device("cpu"))
    return batch


@pytest.mark.parametrize("index", [0, 3000, 20000])
def test_a_student_that_is_exact_has_no_loss(index):
    """For one point mu the jump is mu + eps / t (x - mu), CTM's form of its denoiser; one call for the target."""
    objective, point = ECT(ECTSection(name="ect"), (2,)), Point()
    batch = batch_of(objective, index)
    networks = Networks(point, point, None, torch.inference_mode, torch.inference_mode())
    target = objective.target(batch, networks)
    assert point.num_calls == objective.cost().target == 1
    exact = 0.3 + EPS / batch.levels["t"][:, None] * (batch.x_t - 0.3)
    torch.testing.assert_close(target, exact, rtol=1e-9, atol=1e-12)
    assert float(objective.loss(exact, target, batch).abs().max()) < 1e-6


def test_the_loss_is_the_formula_one_sample_at_a_time(exact_coefficients):
    """Pseudo-Huber of the two jumps over t - r, in float64; the gradient flows through the first jump alone."""
    options = {"objective": "ect", "distance": "pseudo-huber", "every": 2}
    task = moved(make_task(exact_coefficients, "analytic", **options))
    found = task.backward(3)["consistency"]
    (batch,) = task.draw(3)
    losses = []
    for k in range(12):
        t, r, z = batch.levels["t"][k], batch.levels["r"][k], (batch.x_t[k] - batch.x0[k]) / batch.levels["t"][k]
        ends = []
        for level in (t, r):
            f, g = task.form(level[None], torch.tensor([EPS], dtype=torch.float64))
            x = (batch.x0[k] + level * z)[None]
            d = task.student(x, level[None], torch.tensor([EPS], dtype=torch.float64), batch.labels[k : k + 1])
            ends.append(f * x + g * d)
        c = 0.00054 * 64**0.5
        distance = ((ends[0] - ends[1].detach()).square().sum() + c**2).sqrt() - c
        losses.append(distance / (t - r))
    plain = torch.stack(losses).mean()
    assert float(found) == pytest.approx(float(plain.detach()), rel=1e-9)
    names, trained = zip(*((n, p) for n, p in task.student.named_parameters() if p.grad is not None), strict=True)
    for name, mine, parameter in zip(names, torch.autograd.grad(plain, trained), trained, strict=True):
        torch.testing.assert_close(parameter.grad, mine, rtol=1e-6, atol=1e-9, msg=name)


def test_both_jumps_have_the_same_dropout_masks(exact_coefficients):
    """With r next to t they are equal then, and far apart with other masks."""
    task = moved(make_task(exact_coefficients, "analytic", objective="ect", every=1, dropout=0.5))
    index = 10**6
    (batch,) = task.draw(index)
    prediction, target = task.predict(batch, task.denoise(batch)).detach(), task.target(batch)
    assert float((prediction - target).abs().max()) < 1e-4
    other = task.target(replace(batch, seed=batch.seed + 1))
    assert float((prediction - other).abs().max()) > 1e-3


def test_a_run_is_sampled_evaluated_and_resumed_bit_for_bit(tmp_path):
    options = ("objective.name=ect", "objective.every=5", "training.iterations=12", "training.dropout=0.1")
    for name, steps in (("whole", [12]), ("resumed", [6, 12])):
        for count in steps:
            arguments = fast_distill(tmp_path / name, *options, f"training.iterations={count}", recipe="digits-paper")
            assert run(arguments) == 0
    last = [list_checkpoints(tmp_path / name / "checkpoints")[-1] for name in ("whole", "resumed")]
    weights = [load_checkpoint(path)[0]["weights"] for path in last]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert {row["nfe"] for row in RunFolder(tmp_path / "whole").results()["rows"]} >= {1, 2}
    assert run(["sample", "--run", str(tmp_path / "whole"), "--seeds", "0-3", "--out", str(tmp_path / "drawn")]) == 0


def test_two_parts_of_a_batch_are_the_batch(exact_coefficients):
    """Two processes, or two micro-batches, draw what one does."""
    values = [step(make_task(exact_coefficients, objective="ect", accumulation=n), 1).values for n in (1, 2)]
    assert values[1]["consistency"] == pytest.approx(values[0]["consistency"], rel=1e-9)
    assert values[1]["gradient_norm"] == pytest.approx(values[0]["gradient_norm"], rel=1e-6)
