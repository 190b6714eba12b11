"""The fast path of a GPU: compiled, eight blocks in a call, half precision; without one as far as it goes there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from cdistill.data import load_source
from cdistill.estimation import collecting
from cdistill.estimation.autodiff import Autodiff
from cdistill.estimation.base import GroupSums
from cdistill.estimation.estimate import CoefficientEstimate, solve
from cdistill.estimation.forward import Forward
from cdistill.estimation.settings import EstimationSection
from cdistill.networks.denoiser import Denoiser, chunk_size
from cdistill.schedule import log_uniform_grid
from cdistill.teachers import load_teacher
from tests.quadrature import collect_sums

GRID = log_uniform_grid(6)


@pytest.fixture
def digits() -> Denoiser:
    return load_teacher("digits").denoiser


def collect(denoiser: Denoiser, samples: int = 200, precision: Any = "fp32", **options: Any) -> GroupSums:
    budget = EstimationSection(samples=samples, precision=precision, **options)
    return collect_sums(Forward(), denoiser, load_source("digits"), GRID, budget)


def estimate(denoiser: Denoiser, samples: int, precision: str) -> CoefficientEstimate:
    return solve(Forward(), collect(denoiser, samples, precision), denoiser.sigma_data)


def calls_of(denoiser: Denoiser) -> list[tuple[int, torch.dtype]]:
    """Notes the size of every call of the network from now on, and the type of its output."""
    calls: list[tuple[int, torch.dtype]] = []
    network = denoiser.model
    assert isinstance(network, torch.nn.Module)
    network.register_forward_hook(lambda module, inputs, out: calls.append((len(inputs[0]), out.dtype)))
    return calls


# --- on a CPU, as if it were one of the fast ones ---


@pytest.fixture
def fast(monkeypatch) -> Callable[[str | None], list[torch.fx.GraphModule]]:
    """Takes the GPU's path here, compiled by a backend of torch's (None: not compiled); returns the graphs."""

    def take(backend: str | None) -> list[torch.fx.GraphModule]:
        graphs: list[torch.fx.GraphModule] = []

        def noting(graph, inputs, **options):
            assert backend is not None
            graphs.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, inputs, **options)

        torch._dynamo.reset()
        compiled = partial(torch.compile, backend=noting, fullgraph=True)
        monkeypatch.setattr(torch, "compile", compiled if backend else lambda network, **options: network)
        monkeypatch.setattr(collecting, "is_fast", lambda estimator, device: not estimator.backwards)
        monkeypatch.setattr(collecting, "compiles", lambda wanted, kind: backend is not None)
        return graphs

    return take


def assert_same(mine: GroupSums, other: GroupSums, rounding: float = 1e-5) -> None:
    """The sums agree to float32 rounding of the network; what does not hang on the network, nearly exactly."""
    torch.testing.assert_close(mine.sums, other.sums, rtol=rounding, atol=rounding)
    torch.testing.assert_close(mine.sums[..., 1:3], other.sums[..., 1:3], rtol=1e-12, atol=0)  # z.z and x.x
    assert torch.equal(mine.sizes, other.sizes)
    assert torch.equal(mine.samples, other.samples)
    assert torch.equal(mine.stops, other.stops)


@pytest.mark.parametrize("samples", [200, 512, 1000])
def test_eight_blocks_in_a_call_are_one_in_a_call(samples, digits, fast):
    """The last chunk is padded to 512 points; what lies beyond the last sample is not counted."""
    slow = collect(digits, samples)
    fast(None)
    calls = calls_of(digits)
    assert_same(collect(digits, samples), slow)
    assert {size for size, _ in calls} == {8 * chunk_size((1, 8, 8))} == {512}
    assert len(calls) == len(GRID) * -(-samples // 512)


def test_eight_blocks_in_a_call_stop_where_one_in_a_call_does(digits, fast):
    options: dict[str, Any] = {"samples": 512, "target_error": 0.006}
    slow = collect(digits, **options)
    assert slow.samples.min() < slow.samples.max()
    fast(None)
    assert_same(collect(digits, **options), slow)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_compiled_teacher_gives_the_same_numbers(backend, digits, fast):
    """One graph without a break serves all noise levels and chunks, the padded one too."""
    slow = collect(digits, 700)
    graphs = fast(backend)
    assert_same(collect(digits, 700), slow)
    assert len(graphs) == 1


@pytest.mark.slow
def test_the_compiled_teacher_in_half_precision_moves_less_than_the_errors(digits, fast):
    """ "auto" is half precision here; one graph more for the noise levels below 0.01, which keep float32."""
    full = estimate(digits, 256, "fp32")
    graphs = fast("aot_eager")
    half = estimate(digits, 256, "auto")
    assert len(graphs) == 2
    assert float((full.coefficients.l - half.coefficients.l).abs().max()) > 0
    assert bool(((full.coefficients.l - half.coefficients.l).abs() < 0.3 * full.l_error).all())
    assert bool(((full.coefficients.s - half.coefficients.s).abs() < 0.3 * full.s_error).all())


def test_backward_passes_stay_uncompiled_and_in_single_blocks(digits, fast, monkeypatch):
    fast(None)
    monkeypatch.setattr(torch, "compile", None)  # called no more
    calls = calls_of(digits)
    collect_sums(Autodiff(), digits, load_source("digits"), GRID[:3], EstimationSection(samples=100))
    assert calls == [(64, torch.float32)] * 6


# --- on a GPU, or one that is pretended ---


@pytest.mark.usefixtures("cuda")
def test_half_precision_on_a_gpu_agrees_with_single_precision_on_a_cpu(digits, measured):
    """Half precision and compiled; within 0.3 standard errors."""
    slow = estimate(digits, 256, "fp32")
    found = estimate(digits.to("cuda"), 256, "auto")
    assert float((slow.coefficients.l - found.coefficients.l).abs().max()) > 0
    assert bool(((slow.coefficients.l - found.coefficients.l).abs() < 0.3 * slow.l_error).all())
    assert bool(((slow.coefficients.s - found.coefficients.s).abs() < 0.3 * slow.s_error).all())
    torch.testing.assert_close(found.l_error, slow.l_error, rtol=0.1, atol=1e-9)
    off = float(((slow.coefficients.l - found.coefficients.l).abs() / slow.l_error).max())
    measured("l of the digits, fp16", f"off by {off:.2f} standard errors", "at most 0.3")


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_a_gpu_sees_eight_blocks_at_once(precision, digits, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)  # whose hooks would be compiled
    calls = calls_of(digits.to("cuda"))
    collect(digits, 1000, precision)
    half = torch.float16 if precision == "auto" else torch.float32
    expected = [half] * (len(GRID) - 1) + [torch.float32]  # the last level is t = 0.002
    assert calls == [(512, kind) for _ in range(2) for kind in expected]


@pytest.mark.gpu
def test_more_samples_take_no_more_memory_on_a_gpu(digits):
    digits.to("cuda")
    peaks = []
    for samples in (256, 256, 2048):  # the first compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        collect(digits, samples, "auto")
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] == pytest.approx(peaks[1], rel=0.01)


@pytest.mark.usefixtures("cuda")
def test_derivatives_on_a_gpu_agree_with_a_cpu(digits):
    budget = EstimationSection(samples=128)
    arguments = load_source("digits"), GRID, budget
    slow = solve(Autodiff(), collect_sums(Autodiff(), digits, *arguments), digits.sigma_data)
    found = solve(Autodiff(), collect_sums(Autodiff(), digits.to("cuda"), *arguments), digits.sigma_data)
    assert bool(((slow.coefficients.l - found.coefficients.l).abs() < 0.3 * slow.l_error).all())
    assert bool(((slow.coefficients.s - found.coefficients.s).abs() < 0.3 * slow.s_error).all())
