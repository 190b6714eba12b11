"""CTM's GAN loss: its formulas by hand, its augmentation, and a discriminator that learns and resumes exactly."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from cdistill.analysis.cost import gan_cost
from cdistill.errors import CorruptFileError, MissingAssetError, RecipeError
from cdistill.networks import discriminator
from cdistill.networks.denoiser import count_parameters, freeze
from cdistill.networks.discriminator import ImageDiscriminator, power_iteration
from cdistill.recipe.files import load_any_recipe, shipped_recipes
from cdistill.registry import DISCRIMINATORS
from cdistill.runtime.randomness import generator
from cdistill.storage import assets
from cdistill.storage.assets import Asset
from cdistill.storage.checkpoints import load_checkpoint, save_checkpoint
from cdistill.storage.files import file_digest, list_checkpoints
from cdistill.training.augment import KINDS, cut_out, diff_augment, draw_numbers, jitter_color, translate
from cdistill.training.gan import (
    Adversary,
    discriminates,
    discriminator_hinge,
    generator_hinge,
    mean_logit,
)
from cdistill.training.loss_weighting import adaptive_weight
from cdistill.training.settings import GanSection
from cdistill.workflows.plan import plan

SHAPES = [(1, 8, 8), (3, 12, 12), (3, 32, 16)]


def images(seed: int, count: int = 6, shape: tuple[int, ...] = (1, 8, 8), **kind) -> torch.Tensor:
    return torch.rand(count, *shape, generator=generator(seed, "images"), **kind) * 2 - 1


def labels(count: int = 6) -> torch.Tensor:
    return torch.arange(count) % 10


def adversary(accelerator=None, seed: int = 0, classes: int = 10, **values) -> Adversary:
    return Adversary(GanSection(**values), (1, 8, 8), classes, accelerator or Accelerator(cpu=True), seed)


def batch_of(x0, classes, rows) -> SimpleNamespace:
    """What the discriminator reads of a micro-batch."""
    return SimpleNamespace(x0=x0, x0_labels=classes, labels=classes, rows=rows)


def pair(seed: int = 0, count: int = 6, start: int = 0):
    rows = slice(start, start + count)
    return batch_of(images(2 * seed, 12)[rows], labels(12)[rows], rows), images(2 * seed + 1, 12)[rows] / 2


def precise(found: Adversary) -> Adversary:
    """In float64, so that only the mathematics is compared."""
    found.discriminator.double()
    return found


def gradients(found: Adversary) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in found.trained]


def state(found: Adversary) -> dict[str, torch.Tensor]:
    return {f"{stem} {name}": v.clone() for stem, group in found.groups().items() for name, v in group.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- losses ----


def test_hinge_losses_by_hand():
    real = [torch.tensor([[2.0, 0.5]]), torch.tensor([[-1.0], [1.0], [0.0]])]
    fake = [torch.tensor([[-2.0, 0.0]]), torch.tensor([[1.0], [-3.0], [-1.0]])]
    first, second = (0 + 0.5) / 2 + (0 + 1) / 2, (2 + 0 + 1) / 3 + (2 + 0 + 0) / 3
    assert float(discriminator_hinge(real, fake)) == pytest.approx((first + second) / 2)
    assert float(generator_hinge(fake)) == pytest.approx(-((-1.0) + (-1.0)) / 2)
    assert float(mean_logit(real)) == pytest.approx((1.25 + 0) / 2)


def test_the_hinge_has_no_gradient_for_what_is_well_told_apart():
    x = torch.tensor([[1.5, 0.5]], requires_grad=True)
    discriminator_hinge([x], [torch.tensor([[-2.0, -2.0]])]).backward()
    assert x.grad.tolist() == [[0.0, -0.5]]


def test_the_gan_weight_is_the_ratio_of_gradient_norms_within_bounds():
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert float(adaptive_weight(first, second, 0.01, 10)) == pytest.approx(5 / (2 + 1e-4), rel=1e-6)
    assert float(adaptive_weight(first * 1e-4, second, 0.01, 10)) == pytest.approx(0.01)
    assert float(adaptive_weight(first, second * 1e-4, 0.01, 10)) == 10
    assert float(adaptive_weight(first * 2**16, second * 2**16, 0.01, 10, 2.0**16)) == pytest.approx(5 / (2 + 1e-4))


# ---- DiffAugment ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kinds", [[], ["color"], ["translation"], ["cutout"], list(KINDS)])
def test_augmentation_keeps_shape_and_type_and_acts_only_if_asked(shape, kinds):
    for dtype in (torch.float32, torch.float64):
        x = images(0, shape=shape, dtype=dtype)
        y = diff_augment(x, draw_numbers(0, "x", 0, slice(0, 6)), kinds)
        assert (y.shape, y.dtype) == (x.shape, dtype)
        assert torch.equal(x, y) == (not kinds)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_middle_of_each_range_is_the_identity(shape):
    """No brightness, factors of one, no translation; a cut-out is never nothing."""
    x = images(0, shape=shape)
    middle = torch.full((6, 7), 0.5, dtype=torch.float64)
    assert torch.equal(diff_augment(x, middle, ["translation"]), x)
    torch.testing.assert_close(diff_augment(x, middle, ["color"]), x, rtol=0, atol=1e-6)


def test_colours_change_by_hand():
    x = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64).reshape(1, 3, 1, 2)  # grey: 0.4 and 0.6
    one = torch.ones(1)
    brighter = jitter_color(x, 0.25 * one, one, one)
    torch.testing.assert_close(brighter, x + 0.25)
    grey = jitter_color(x, 0 * one, 0 * one, one)
    torch.testing.assert_close(grey, torch.tensor([0.4, 0.6], dtype=torch.float64).expand(1, 3, 1, 2))
    flat = jitter_color(x, 0 * one, one, 0.5 * one)
    torch.testing.assert_close(flat, 0.5 + (x - 0.5) / 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_translation_moves_by_whole_pixels_and_zeros_come_in(shape):
    x = images(0, shape=shape)
    most = [int(side / 8 + 0.5) for side in shape[1:]]
    down = torch.tensor([0, most[0], -most[0], 0, 1, -1])
    right = torch.tensor([0, most[1], 0, -most[1], -1, 1])
    found = translate(x, down, right)
    for k in range(6):
        i, j = int(down[k]), int(right[k])
        wide = F.pad(x[k], [most[1]] * 2 + [most[0]] * 2)
        expected = wide.roll((i, j), (1, 2))[:, most[0] : most[0] + shape[1], most[1] : most[1] + shape[2]]
        assert torch.equal(found[k], expected)


def test_a_cut_out_that_overhangs_is_cut_off():
    x = torch.ones(3, 2, 4, 6)
    y = cut_out(x, [torch.tensor([0, -1, 3]), torch.tensor([1, 5, -2])], [2, 3])
    holes = [[(i, j) for i in range(4) for j in range(6) if y[k, 0, i, j] == 0] for k in range(3)]
    assert holes == [[(i, j) for i in (0, 1) for j in (1, 2, 3)], [(0, 5)], [(3, 0)]]
    assert torch.equal(y[:, 0], y[:, 1])


def test_the_augmentation_has_an_exact_gradient():
    x = images(0, 2, (3, 8, 8), dtype=torch.float64).requires_grad_()
    numbers = draw_numbers(0, "x", 0, slice(0, 2))
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, numbers, KINDS), (x,), fast_mode=True)


def test_moves_and_holes_have_the_laws_of_the_reference():
    """12 pixels: moves uniform on -2..2, holes of 2x2 around corners uniform on 0..12, contrast on [0.5, 1.5]."""
    numbers = draw_numbers(0, "x", 0, slice(0, 20000))
    spot = torch.zeros(20000, 1, 12, 12)
    spot[:, :, 5, 7] = 1
    moved = diff_augment(spot, numbers, ["translation"]).flatten(1).argmax(1)
    for place, centre in ((moved // 12, 5), (moved % 12, 7)):
        share = torch.bincount(place - centre + 2, minlength=5) / 20000
        assert share.tolist() == pytest.approx([0.2] * 5, abs=0.02)
    cut = diff_augment(torch.ones(20000, 1, 12, 12), numbers, ["cutout"])
    holes = (cut == 0).sum((1, 2, 3))
    assert set(holes.tolist()) == {1, 2, 4}
    share = torch.bincount(holes, minlength=5) / 20000
    assert share[[1, 2, 4]].tolist() == pytest.approx([4 / 169, 44 / 169, 121 / 169], abs=0.02)
    two = torch.tensor([-0.5, 0.5]).reshape(1, 1, 1, 2).expand(20000, 1, 1, 2)
    colour = diff_augment(two, numbers, ["color"])
    mean, spread = colour.mean((1, 2, 3)), colour[..., 1] - colour[..., 0]
    assert float(mean.min()) >= -0.5
    assert float(mean.max()) <= 0.5
    assert float(mean.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert float(spread.min()) >= 0.5
    assert float(spread.max()) <= 1.5
    assert float(spread.mean()) == pytest.approx(1, abs=0.01)


def test_draws_depend_on_seed_purpose_step_and_row_alone():
    whole = draw_numbers(1, "fake", 5, slice(0, 96))
    assert torch.equal(draw_numbers(1, "fake", 5, slice(24, 48)), whole[24:48])
    assert torch.equal(draw_numbers(1, "fake", 5, slice(0, 1000))[:96], whole)
    for other in (draw_numbers(2, "fake", 5, slice(0, 96)), draw_numbers(1, "real", 5, slice(0, 96))):
        assert not torch.equal(other, whole)
    assert not torch.equal(draw_numbers(1, "fake", 6, slice(0, 96)), whole)


# ---- discriminators ----


@pytest.mark.parametrize("side", [8, 9, 12, 16, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_small_discriminator_takes_small_images(side, channels):
    network = freeze(ImageDiscriminator((channels, side, side), 0))
    (logits,) = network(torch.zeros(3, channels, side, side), None)
    assert logits.shape == (3, 1)
    assert count_parameters(network) < (80_000 if side < 16 else 900_000)


def test_the_class_enters_as_a_projection():
    """d(x, c) - d(x, c') is linear in e_c - e_c', and nothing without classes."""
    network = freeze(ImageDiscriminator((1, 8, 8), 10)).double()
    x = images(0, 2, dtype=torch.float64)
    h = network.trunk(x).sum((2, 3))
    zero, three = (network(x, torch.full((2,), c))[0] for c in (0, 3))
    table = network.head.classes.weight
    torch.testing.assert_close(three - zero, (h @ (table[3] - table[0]))[:, None])
    assert float((three - zero).abs().min()) > 0


@pytest.mark.parametrize("part", range(2))
def test_spectral_norms_become_one_with_power_iterations_and_not_by_calls(part):
    torch.manual_seed(0)
    network = freeze(ImageDiscriminator((1, 8, 8), 10))
    layer = [network.trunk[2], network.head.classes][part]
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(layer.weight.shape, generator=generator(0, "w")))
    assert abs(float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2)) - 1) > 0.1
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network(images(0), labels())
    assert same(network.state_dict(), before)
    for _ in range(300):
        power_iteration(network)
    assert float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2)) == pytest.approx(1, rel=1e-2)
    assert not network.training
    assert not any(module.training for module in network.modules())


def test_the_small_discriminator_has_an_exact_gradient():
    network = freeze(ImageDiscriminator((1, 8, 8), 10)).double()
    x = images(0, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: generator_hinge(network(x, labels(2))), (x,), fast_mode=True)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """A file like torchvision's, with random weights, and the network that it belongs to."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    layers = vgg16(weights=None, init_weights=False).features
    path = tmp_path_factory.mktemp("assets") / "vgg16-397923af.pth"
    torch.save({f"features.{k}": v for k, v in layers.state_dict().items()}, path)  # noqa: TID251 - as downloaded
    return path, layers.eval()


@pytest.fixture
def vgg(vgg_file, monkeypatch):
    path, layers = vgg_file
    monkeypatch.setenv("CDISTILL_ASSETS", str(path.parent))
    monkeypatch.setattr(assets, "VGG16", Asset(path.name, "https://x", file_digest(path)))
    monkeypatch.setattr(discriminator, "RESOLUTION", 64)
    return layers


@pytest.mark.parametrize("channels", [1, 3])
def test_vgg_features_are_torchvisions(vgg, channels):
    from torchvision.transforms.functional import normalize

    found = DISCRIMINATORS.get("vgg16")((channels, 8, 8), 0)
    x = images(0, 2, (channels, 8, 8))
    large = F.interpolate(x.expand(-1, 3, -1, -1), size=64, mode="bilinear")
    h = normalize((large + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    maps = found._backbone[0](x)
    assert [part.shape[1:] for part in maps] == [(128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)]
    torch.testing.assert_close(maps[-1], vgg[:30](h), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(maps[0], vgg[:9](h), rtol=1e-3, atol=1e-6)


def test_heads_on_features_are_all_that_is_trained_saved_and_counted(vgg):
    network = DISCRIMINATORS.get("vgg16")((3, 8, 8), 10)
    assert sum(weight.numel() for weight in network.frozen()) == 14_714_688
    assert count_parameters(network) < 10**6
    assert not any("backbone" in name or "layers" in name for name in network.state_dict())
    x = images(0, 2, (3, 8, 8)).requires_grad_()
    logits = network(x, labels(2))
    assert [head.shape for head in logits] == [(2, 64), (2, 64), (2, 64), (2, 16)]
    generator_hinge(logits).backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(weight.grad is None for weight in network.frozen())
    assert all(weight.grad is not None for weight in network.parameters())


def test_a_backbone_is_moved_with_its_heads(vgg):
    network = freeze(DISCRIMINATORS.get("vgg16")((1, 8, 8), 0))
    x = images(0, 2)
    single = network(x, None)
    double = network.double()(x.double(), None)
    assert all(weight.dtype == torch.float64 for weight in network.frozen())
    for first, second in zip(single, double, strict=True):
        torch.testing.assert_close(first.double(), second, rtol=1e-3, atol=1e-5)


def test_a_missing_or_foreign_backbone_is_named(vgg, tmp_path, monkeypatch):
    network = DISCRIMINATORS.get("vgg16")
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    with pytest.raises(MissingAssetError, match=r"vgg16-397923af\.pth"):
        network((3, 8, 8), 0)
    path = tmp_path / "vgg16-397923af.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)  # noqa: TID251 - a file of others
    monkeypatch.setattr(assets, "VGG16", Asset(path.name, "https://x", file_digest(path)))
    with pytest.raises(CorruptFileError, match="not torchvision's VGG-16"):
        network((3, 8, 8), 0)


# ---- the adversary ----


def test_the_students_gradient_reaches_the_images_and_not_the_discriminator():
    found = adversary()
    before = state(found)
    fake = images(0).requires_grad_()
    loss = found.generator_loss(fake, labels(), 4, slice(0, 6), 0)
    loss.backward()
    assert float(fake.grad.abs().sum()) > 0
    assert all(parameter.grad is None for parameter in found.trained)
    assert same(state(found), before)


def test_the_generator_loss_is_the_hinge_of_the_augmented_images():
    found = adversary()
    fake = images(0)
    loss = found.generator_loss(fake[2:5], labels()[2:5], 4, slice(2, 5), 0)
    augmented = diff_augment(fake, draw_numbers(0, "fake", 4, slice(0, 6)), KINDS)[2:5]
    torch.testing.assert_close(loss, -found.discriminator(augmented, labels()[2:5])[0].mean())


def test_the_discriminators_loss_and_gradient_by_hand():
    found, mine, (data, drawn) = precise(adversary()), precise(adversary()), pair()
    values = found.backward([(data, drawn)], 3, 0)
    mine.discriminator.requires_grad_(True)
    real = diff_augment(data.x0.double(), draw_numbers(0, "real", 3, slice(0, 6)), KINDS)
    fake = diff_augment(drawn.double(), draw_numbers(0, "fake", 3, slice(0, 6)), KINDS)
    first, second = (mine.discriminator(x, data.labels)[0] for x in (real, fake))
    loss = (1 - first).clamp(min=0).mean() + (1 + second).clamp(min=0).mean()
    loss.backward()
    assert float(values["discriminator"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert float(values["logit_real"]) == pytest.approx(float(first.detach().mean()), rel=1e-5, abs=1e-6)
    assert float(values["logit_fake"]) == pytest.approx(float(second.detach().mean()), rel=1e-5, abs=1e-6)
    for one, two in zip(gradients(found), gradients(mine), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_the_discriminators_step_does_not_reach_the_student():
    found, (data, fake) = adversary(), pair()
    fake.requires_grad_()
    found.backward([(data, fake)], 3, 0)
    assert fake.grad is None
    assert not any(parameter.requires_grad for parameter in found.trained)


def test_micro_batches_and_processes_change_nothing():
    """Unequal parts of a batch, and the averages over two processes of half of it each, are the whole."""
    whole, parts, *halves = (precise(adversary()) for _ in range(4))
    values = whole.backward([pair(0, 12)], 3, 0)
    split = parts.backward((pair(0, size, start) for start, size in ((0, 4), (4, 2), (6, 6))), 3, 0)
    several = [half.backward([pair(0, 6, start)], 3, 0) for half, start in zip(halves, (0, 6), strict=True)]
    averages = [(a + b) / 2 for a, b in zip(*(gradients(half) for half in halves), strict=True)]
    for name, value in values.items():
        assert float(split[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6)
        assert float(several[0][name] + several[1][name]) / 2 == pytest.approx(float(value), rel=1e-5, abs=1e-6)
    for first, second, third in zip(gradients(whole), gradients(parts), averages, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(third, first, rtol=1e-9, atol=1e-12)


def test_gradients_and_losses_are_averaged_over_processes():
    """A stand-in for a process whose partner's tensors are all three times its own."""
    asked = []

    def reduce(tensor, reduction):
        asked.append(reduction)
        return 2 * tensor

    alone, paired = adversary(), adversary(SimpleNamespace(device=torch.device("cpu"), reduce=reduce))
    values, doubled = (found.backward([pair()], 3, 0) for found in (alone, paired))
    assert asked == ["mean", "mean"]
    assert {name: 2 * float(value) for name, value in values.items()} == {k: float(v) for k, v in doubled.items()}
    for first, second in zip(gradients(alone), gradients(paired), strict=True):
        torch.testing.assert_close(second, 2 * first)


def test_nothing_is_read_on_the_host():
    class Guard(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default, "a tensor is read"
            return function(*args, **(kwargs or {}))

    found = adversary()
    with Guard():
        with pytest.raises(AssertionError, match="a tensor is read"):
            float(torch.ones(()))
        found.generator_loss(images(0).requires_grad_(), labels(), 4, slice(0, 6), 0).backward()
        found.backward([pair()], 5, 0)


def test_a_nan_poisons_nothing_unless_it_is_stepped_along():
    found, fresh, (data, fake) = adversary(), adversary(), pair()
    before = state(found)
    fake[0] = torch.nan
    values = found.backward([(data, fake)], 3, 0)
    assert values["discriminator"].isnan()
    assert same(state(found), before)
    for one in (found, fresh):
        one.backward([pair(1)], 5, 0)
        one.update()
    assert same(state(found), state(fresh))
    assert all(value.isfinite().all() for value in state(found).values())


def test_an_update_moves_weights_and_spectral_norms_alike():
    found = adversary()
    before = state(found)
    found.backward([pair()], 1, 0)
    found.update()
    after = state(found)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == ["discriminator head.linear.parametrizations.weight.0._u"]  # of one output: it is 1 or -1


def test_equal_seeds_begin_equal_and_leave_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = adversary()
    assert torch.equal(torch.rand(3), expected)
    assert same(state(first), state(adversary()))
    assert not same(state(first), state(adversary(seed=1)))


@pytest.mark.parametrize(("classes", "done"), [(0, 7), (10, 7), (10, 0)])
def test_a_checkpoint_continues_bit_for_bit(tmp_path, classes, done):
    """Also one from before the discriminator's first step."""
    first, second = (adversary(classes=classes) for _ in range(2))

    def steps(found, begin, end):
        for index in range(begin, end):
            data, fake = pair(index)
            found.backward([(data if classes else batch_of(data.x0, None, data.rows), fake)], index, 0)
            found.update()

    steps(first, 0, done)
    save_checkpoint(tmp_path, done, first.groups(), {}, 1)
    groups, _ = load_checkpoint(list_checkpoints(tmp_path)[-1])
    second.load({**groups, "weights": {}})
    assert set(groups) == {"discriminator", "discriminator_optimizer"}
    for found in (first, second):
        steps(found, done, 12)
    assert same(state(first), state(second))


def test_it_learns_to_tell_apart_and_draws_fakes_to_the_real():
    """Real images are bright above, fake ones on the left; the student's loss then moves the fakes to the real."""
    above, left = torch.zeros(2, 1, 8, 8)
    above[:, :4], left[:, :, :4] = 1, 1

    def noisy(pattern, step):
        return pattern + 0.2 * torch.randn(16, 1, 8, 8, generator=generator(step, "noise"))

    found = adversary(classes=0)
    for step in range(120):
        values = found.backward(
            [(batch_of(noisy(above, 2 * step), None, slice(0, 16)), noisy(left, 2 * step + 1))], step, 0
        )
        found.update()
    assert float(values["logit_real"] - values["logit_fake"]) > 1
    fake = noisy(left, 1000)
    correlation = [float(((fake - fake.mean()) * (above - 0.5)).mean())]
    for step in range(200, 230):
        fake = fake.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(found.generator_loss(fake, None, step, slice(0, 16), 0), fake)
        fake = fake - 0.5 * gradient / gradient.square().mean().sqrt() / 30
        correlation.append(float(((fake - fake.mean()) * (above - 0.5)).mean().detach()))
    assert abs(correlation[0]) < 0.02
    assert correlation[-1] > 0.05


def test_other_samples_than_images_are_refused():
    for shape in ((1,), (2, 8, 8)):
        with pytest.raises(RecipeError, match=r"gan\.discriminator: 'small' judges grey or RGB images"):
            Adversary(GanSection(), shape, 0, Accelerator(cpu=True), 0)


def test_a_discriminator_on_features_trains_too(vgg):
    found = Adversary(GanSection(discriminator="vgg16"), (1, 8, 8), 10, Accelerator(cpu=True), 0)
    before = [weight.clone() for weight in found.discriminator.frozen()]
    losses = []
    for _ in range(3):
        losses.append(float(found.backward([pair()], 1, 0)["discriminator"]))
        found.update()
    assert losses[-1] < losses[0]
    for weight, old in zip(found.discriminator.frozen(), before, strict=True):
        assert torch.equal(weight, old)


# ---- the recipe and the plan ----


@pytest.mark.parametrize(("iterations", "start"), [(480, 160), (7, 0), (8, 3), (9, 8), (1, 0)])
def test_the_plan_counts_the_steps_of_the_discriminator(iterations, start):
    share = sum(discriminates(index, start) for index in range(iterations)) / iterations
    assert gan_cost(GanSection(start=start), iterations, (1, 8, 8), 10)[0] == pytest.approx(share)
    assert gan_cost(None, iterations, (1, 8, 8), 10) == (0, 0, 0, 0)


def test_the_plan_counts_the_discriminator_by_hand():
    """The last convolution of a trunk for 4x4 images: 2 * 16 * (32 * 9 + 32 * 32 * 9) a forward pass, 32 w.h."""
    forward = 2 * 16 * 9 * (32 + 32 * 32) + 2 * 32
    to_weights = 2 * forward - 2 * 16 * 9 * 32  # the first layer has no gradient to its input
    to_images = forward
    share = 0.5
    _, flop, state_bytes, _ = gan_cost(GanSection(), 2, (1, 4, 4), 0)
    expected = share * (2 * (forward + to_weights) + forward + to_images)
    norms = flop - expected  # what the spectral norms cost, for two images together
    assert 0 <= norms < 0.1 * expected
    assert state_bytes == 16 * count_parameters(ImageDiscriminator((1, 4, 4), 0))


def test_the_plan_of_a_recipe_has_the_discriminators_part():
    plain, gan = (plan(load_any_recipe(shipped_recipes()[name]), 1) for name in ("digits-paper", "digits-gan"))
    parts, others = ({name: part for name, *part in found.parts} for found in (gan, plain))
    assert others["discriminator"] == [0, 0]
    assert parts["discriminator"][1] > 0
    solver = "teacher (Heun's solver)"
    assert parts[solver][0] == pytest.approx(others[solver][0] * 320 / 480)
    assert gan.state_bytes > plain.state_bytes
