"""f and g by least squares: the best at their own pairs, exact at the ends, from a file as from memory."""

from dataclasses import replace

import pytest
import torch

from cdistill.errors import CdistillError, CorruptFileError, RecipeError
from cdistill.preconditionings import load_preconditioning, make_preconditioning
from cdistill.preconditionings.coefficients import load_coefficients
from cdistill.registry import PRECONDITIONINGS
from cdistill.sampling.moments import collect_moments, fit_f_and_g, least_squares
from cdistill.storage.checkpoints import load_tensors, save_tensors
from cdistill.teachers import load_teacher
from cdistill.workflows.compare import compare
from cdistill.workflows.estimate import estimate_coefficients, is_estimate


@pytest.fixture(scope="module")
def estimate(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "coefficients.safetensors"
    values = {"samples": 64, "timesteps": 24, "form": "least-squares", "fit_trajectories": 64}
    return path, estimate_coefficients("mixture-narrow", out=path, **values)


def pairs_of(fit):
    down = torch.ones(len(fit.t), len(fit.t), dtype=torch.bool).triu(1)
    t, s = torch.meshgrid(fit.t, fit.t, indexing="ij")
    return t[down], s[down], fit.f[down], fit.g[down]


def test_it_passes_through_the_fit(exact_coefficients):
    t, s, f, g = pairs_of(exact_coefficients.fit)
    found = make_preconditioning("least-squares", table=exact_coefficients)(t, s)
    torch.testing.assert_close(torch.stack(found), torch.stack([f, g]), rtol=1e-10, atol=1e-12)


def test_no_preconditioning_jumps_better_at_the_pairs_of_its_fit(exact_coefficients):
    moments = collect_moments(load_teacher("mixture-1d").denoiser, 18, 256, 0, 4)
    t, s = torch.meshgrid(moments.levels[:-1], moments.levels[1:], indexing="ij")
    down = s < t
    _, _, best = least_squares(moments)
    for name in PRECONDITIONINGS.names():
        preconditioning = make_preconditioning(name, table=exact_coefficients)
        if preconditioning.to_eps_only:
            continue
        f, g = torch.zeros_like(t), torch.zeros_like(t)
        f[down], g[down] = preconditioning(t[down], s[down])
        error = moments.jump_error(f, g)[0]
        assert bool((error[down] >= best[0][down] * (1 - 1e-6) - 1e-7).all()), name
        if name == "least-squares":
            torch.testing.assert_close(error[down], best[0][down], rtol=1e-5, atol=1e-7)


def test_it_is_continuous_across_its_cells(exact_coefficients):
    preconditioning = make_preconditioning("least-squares", table=exact_coefficients)
    node = exact_coefficients.fit.t[6]
    t, s = node * torch.tensor([1 - 1e-9, 1, 1 + 1e-9], dtype=torch.float64), torch.tensor(0.01, dtype=torch.float64)
    f, g = preconditioning(t, s)
    assert float(f.max() - f.min()) < 1e-7
    assert float(g.max() - g.min()) < 1e-7


def test_standard_errors_are_those_of_other_trajectories():
    """The spread of f and g over disjoint sets of trajectories, against the errors that each set states."""
    denoiser = load_teacher("mixture-narrow").denoiser
    fits = [fit_f_and_g(collect_moments(denoiser, 6, 128, seed, 1)) for seed in range(24)]
    down = torch.ones(6, 6, dtype=torch.bool).triu(1)
    for name in ("f", "g"):
        spread = torch.stack([getattr(fit, name)[down] for fit in fits]).std(0)
        stated = torch.stack([getattr(fit, f"{name}_error")[down] for fit in fits]).square().mean(0).sqrt()
        ratio = (stated / spread).log().mean().exp()
        assert 0.7 < float(ratio) < 1.5


def test_a_file_holds_the_fit_with_its_errors(estimate):
    path, made = estimate
    table, _, header = load_coefficients(path)
    assert header["form"] == "least-squares"
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(table.fit, made.fit, strict=True))
    assert bool((table.fit.f_error[0, 1:] > 0).all())
    preconditioning = load_preconditioning("least-squares", load_teacher("mixture-narrow"), path)
    assert preconditioning.provenance["fit_trajectories"] == 64
    assert load_preconditioning("analytic", None, path)  # one file for all


def test_coefficients_without_a_fit_are_refused(estimate, exact_coefficients):
    with pytest.raises(RecipeError, match="--form least-squares"):
        make_preconditioning("least-squares", table=replace(exact_coefficients, fit=None))
    with pytest.raises(CdistillError, match=r"fitted from 80 to 0\.002, not from 90"):
        make_preconditioning("least-squares", table=exact_coefficients)(torch.tensor(90.0), torch.tensor(1.0))


def test_a_fit_that_lacks_a_number_is_refused(estimate, tmp_path):
    tensors, header = load_tensors(estimate[0], "coefficients")
    tensors["fit_g"][0, 3] = torch.nan
    save_tensors(tmp_path / "x.safetensors", tensors, "coefficients", header)
    with pytest.raises(CorruptFileError, match="its fit of f and g is not whole"):
        load_coefficients(tmp_path / "x.safetensors")


def test_estimates_with_and_without_a_fit_are_told_apart(estimate):
    from accelerate import Accelerator

    from cdistill.estimation.settings import EstimationSection
    from cdistill.sampling.teacher_data import open_data

    path, _ = estimate
    teacher = load_teacher("mixture-narrow")
    source = open_data(None, "train", teacher, Accelerator(cpu=True))
    plain = EstimationSection(samples=64, timesteps=24)
    fitted = plain.model_copy(update={"form": "least-squares", "fit_trajectories": 64})
    assert is_estimate(path, teacher, source, fitted)
    assert not is_estimate(path, teacher, source, fitted.model_copy(update={"fit_trajectories": 128}))
    assert is_estimate(path, teacher, source, plain)  # l and s are in it all the same


def test_compare_ranks_it_among_the_others():
    comparison = compare("mixture-1d", ["ctm", "least-squares"], nfe=[1, 2], trajectories=64, settings=None)
    assert {place.name for place in comparison.ranks} == {"ctm", "least-squares"}
    assert not comparison.left_out
