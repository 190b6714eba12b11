import itertools
from copy import deepcopy

import pytest
import torch

from cdistill.errors import RecipeError
from cdistill.networks.denoiser import Denoiser, chunk_size
from cdistill.preconditionings import make_preconditioning
from cdistill.sampling.drawing import _plan, chunks_together, draw_chunks, generate, stream
from cdistill.sampling.samplers import make_sampler, teacher_trajectories, trajectories
from cdistill.sampling.solvers import jump
from cdistill.schedule import EPS, T, sampling_grid
from cdistill.teachers import load_teacher
from cdistill.teachers.mixture import mixture_1d

TEN = (0.1,) * 10  # classes, drawn alike

SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def digits() -> Denoiser:
    return load_teacher("digits").denoiser


def draw(denoiser, seeds, nfe=2, **values):
    sampler = make_sampler(denoiser, make_preconditioning("ctm"), nfe=nfe)
    return generate(sampler, SHAPE, seeds, TEN, **values)


def test_an_image_depends_on_its_seed_alone(digits):
    """Any list, any order, repetitions too: the same bits."""
    whole, labels = draw(digits, range(130))
    for seeds in ([0], [129, 3, 64], [5, 5], list(range(63, 66)), [100, *range(7)]):
        part, part_labels = draw(digits, seeds)
        assert torch.equal(part, whole[seeds])
        assert torch.equal(part_labels, labels[seeds])


class Part:
    """One of several processes, as far as sampling asks."""

    device = torch.device("cpu")

    def __init__(self, rank, count):
        self.process_index, self.num_processes = rank, count


def test_the_number_of_processes_changes_nothing(digits):
    """Each process draws its chunks, the same bits as one process does, and together they draw everything once."""
    whole, labels = draw(digits, range(200))
    sampler = make_sampler(digits, make_preconditioning("ctm"), nfe=2)
    for count in (2, 3):
        rows = []
        for k in range(count):
            for drawn in stream(sampler, SHAPE, range(200), TEN, accelerator=Part(k, count)):
                assert torch.equal(drawn.samples, whole[drawn.rows])
                assert torch.equal(drawn.labels, labels[drawn.rows])
                rows += drawn.rows.tolist()
        assert sorted(rows) == list(range(200))


def test_the_number_of_threads_changes_nothing(digits):
    """With 3 threads some of torch's operators round in another way than with 1 or 2, as they divide their work."""
    found = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found.append(draw(digits, range(150), nfe=1)[0])
        assert torch.get_num_threads() == threads
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_a_stream_is_the_whole_in_pieces_each_from_one_process(digits):
    seeds = [700, 3, *range(60, 140), 4]
    whole, labels = draw(digits, seeds)
    sampler = make_sampler(digits, make_preconditioning("ctm"), nfe=2)
    for count in (1, 3):
        counted, seen = [], []
        for rank in range(count):
            advance = lambda more, note, rank=rank, counted=counted: counted.append((rank, more))  # noqa: E731
            for drawn in stream(sampler, SHAPE, seeds, TEN, advance=advance, accelerator=Part(rank, count)):
                assert drawn.samples.dtype == torch.float64
                assert torch.equal(drawn.samples, whole[drawn.rows])
                assert torch.equal(drawn.labels, labels[drawn.rows])
                seen += drawn.rows.tolist()
        assert sorted(seen) == list(range(len(seeds)))
        assert sum(more for rank, more in counted if not rank) == len(seeds)  # the first process counts for all


def test_a_process_draws_the_noise_of_its_own_chunks_only(monkeypatch):
    drawn = []
    original = torch.Generator.manual_seed

    class Recording(torch.Generator):
        def manual_seed(self, seed):
            drawn.append(seed)
            return original(self, seed)

    monkeypatch.setattr(torch, "Generator", Recording)
    chunks = list(draw_chunks((1,), range(200), accelerator=Part(1, 3)))
    assert [chunk.rows.tolist() for chunk in chunks] == [list(range(64, 128))]
    assert drawn == list(range(64, 128))


def test_on_a_gpu_a_call_holds_several_chunks_of_the_same_noise():
    """The noise and the labels stay those of the seeds; only how many there are at once changes."""
    seeds = [300, *range(10, 150), 5, 5]
    single = {int(row): (chunk.x[place], chunk.labels[place]) for chunk in draw_chunks((1,), seeds, TEN)
              for row, place in zip(chunk.rows, chunk.places, strict=True)}  # fmt: skip
    chunks = [draw() for draw in _plan((1,), seeds, TEN, None, None, 4)]
    assert [len(chunk.x) for chunk in chunks] == [192, 64]
    for chunk in chunks:
        for row, place in zip(chunk.rows, chunk.places, strict=True):
            x, label = single.pop(int(row))
            assert torch.equal(chunk.x[place], x)
            assert chunk.labels[place] == label
    assert not single
    assert [chunks_together(SHAPE, "cuda", count) for count in (None, 1, 64, 65)] == [4, 1, 1, 2]
    assert chunks_together(SHAPE, "cpu", 1000) == 1


def test_seeds_are_edms_latent_first_label_second(digits):
    seen = []

    def spy(x, labels, noise):
        seen.append((x, labels))
        return x

    generate(spy, SHAPE, [7], TEN)
    own = torch.Generator().manual_seed(7)
    x, labels = seen[0]
    assert torch.equal(x[7], torch.randn(SHAPE, generator=own).double() * T)
    assert int(labels[7]) == int(torch.randint(10, (), generator=own))


def test_classes_replace_the_drawn_ones_and_leave_the_noise(digits):
    _, labels = draw(digits, [3, 70, 4], classes=[1, 2, 9])
    assert labels.tolist() == [1, 2, 9]
    drawn, own = draw(digits, [3])
    again, _ = draw(digits, [3], classes=[int(own)])
    assert torch.equal(drawn, again)


def test_the_network_sees_whole_chunks_only(digits):
    sizes = []

    def spy(x, labels, noise):
        sizes.append(len(x))
        return x

    generate(spy, SHAPE, range(70), TEN)
    assert sizes == [chunk_size(SHAPE)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 100, None])
def test_a_gpu_draws_the_same_images_but_for_rounding(digits, batch_size):
    sizes = []
    on_gpu = deepcopy(digits).to("cuda")
    on_gpu.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    sampler = make_sampler(on_gpu, make_preconditioning("ctm"), nfe=1)
    expected, labels = draw(digits, range(300), nfe=1)
    for drawn in stream(sampler, SHAPE, range(300), TEN, device="cuda", batch_size=batch_size):
        assert drawn.samples.device.type == "cpu"
        torch.testing.assert_close(drawn.samples, expected[drawn.rows], rtol=0, atol=2e-2)
        assert torch.equal(drawn.labels, labels[drawn.rows])
    assert sizes == {1: [64] * 5, 100: [128, 128, 64], None: [256, 64]}[batch_size]


def test_deterministic_jumps_visit_the_rho_grid():
    form = make_preconditioning("ctm")
    x = torch.tensor([[50.0], [-20.0]], dtype=torch.float64)
    expected = x
    times = sampling_grid(3)
    for t, s in itertools.pairwise(times):
        expected = jump(mixture_1d(), expected, t.expand(2), s.expand(2), [c.expand(2) for c in form(t, s)])
    found = make_sampler(mixture_1d(), form, nfe=3)(x, None, lambda: x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(trajectories(mixture_1d(), form, 3, x)[-1], found, rtol=1e-12, atol=0)


def test_more_jumps_approach_the_teacher():
    """CTM's untrained jumps are Euler's: the error falls in proportion to 1/NFE."""
    x = torch.linspace(-150, 150, 301, dtype=torch.float64)[:, None]
    truth = teacher_trajectories(mixture_1d(), 513, x)[-1]
    form = make_preconditioning("ctm")
    errors = [float((trajectories(mixture_1d(), form, k, x)[-1] - truth).abs().mean()) for k in (16, 32, 64, 128)]
    assert all(0.4 < second / first < 0.65 for first, second in itertools.pairwise(errors))


def test_the_teachers_sampler_makes_34_calls(digits):
    calls = []
    digits.register_forward_hook(lambda *_: calls.append(1))
    generate(make_sampler(digits, None), SHAPE, [0], TEN)
    assert len(calls) == 34


def test_consistency_models_add_noise_between_their_jumps():
    form = make_preconditioning("cm")
    x = torch.full((2, 1), 40.0, dtype=torch.float64)
    z = torch.tensor([[0.3], [-1.0]], dtype=torch.float64)
    found = make_sampler(mixture_1d(), form, nfe=2)(x, None, lambda: z)
    end = torch.full((2,), EPS, dtype=torch.float64)
    t0, t1 = (t.expand(2) for t in sampling_grid(2)[:2])
    first = jump(mixture_1d(), x, t0, end, form(t0, end))
    noisy = first + (t1[:, None] ** 2 - EPS**2).sqrt() * z
    torch.testing.assert_close(found, jump(mixture_1d(), noisy, t1, end, form(t1, end)), rtol=1e-12, atol=0)


def test_consistency_models_draw_their_noise_from_the_seed(digits):
    sampler = make_sampler(digits, make_preconditioning("cm"), nfe=3)
    whole, _ = generate(sampler, SHAPE, range(70), TEN)
    part, _ = generate(sampler, SHAPE, [69, 2], TEN)
    assert torch.equal(part, whole[[69, 2]])


@pytest.mark.parametrize("nfe", [0, -3])
def test_fewer_than_one_call_is_refused(nfe):
    with pytest.raises(RecipeError, match="1 or more"):
        make_sampler(mixture_1d(), make_preconditioning("ctm"), nfe=nfe)
