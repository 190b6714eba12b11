import math

import pytest
import torch
import torch.nn.functional as F

from cdistill.networks.architecture import build_denoiser, load_denoiser
from cdistill.networks.denoiser import EDMDenoiser, count_parameters, edm_coefficients, freeze, positional_embedding
from cdistill.networks.unet import Attention, FusedDownConv, outer_filter, plain_attention, resample
from cdistill.runtime.randomness import generator
from cdistill.teachers import load_teacher
from cdistill.teachers.official import OFFICIAL
from tests.formula import fill, inputs

SHAPE = (1, 8, 8)
NCSNPP = {"embedding": "fourier", "encoder": "residual", "taps": [1, 3, 3, 1], "channel_mult_noise": 2}
KINDS = {
    "ddpmpp": {"network": "song", "model_channels": 16},
    "ncsnpp": {"network": "song", "model_channels": 16, **NCSNPP},
    "adm": {"network": "adm", "model_channels": 16, "head_channels": 8},
}


def small_denoiser(num_classes: int = 3, kind: str = "ddpmpp") -> EDMDenoiser:
    torch.manual_seed(0)
    common = {"resolution": 8, "channels": 1, "num_classes": num_classes, "dropout": 0.0, "augment_dim": 9}
    levels = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    denoiser = build_denoiser({**common, **levels, **KINDS[kind]}, 0.5)
    with torch.no_grad():
        for parameter in denoiser.parameters():  # leave the tiny initial values of the "zero" layers behind
            parameter.add_(0.05 * torch.randn_like(parameter))
    return denoiser


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = generator(0, "batch")
    x = torch.randn(count, *SHAPE, generator=draw)
    t = torch.logspace(-2, 1.5, count, dtype=torch.float64)
    return x, t, torch.arange(count) % 3


# Parameters and entries of the state dict of the official files (`../shared/spec/edm-formats.md` has them by count).
PUBLISHED = {
    "edm-cifar10": (55_733_891, 425),
    "edm-cifar10-cond": (55_735_299, 427),
    "edm-cifar10-ve": (56_397_827, 432),
    "edm-cifar10-cond-ve": (56_400_643, 434),
    "edm-ffhq64": (61_805_571, 553),
    "edm-ffhq64-ve": (62_761_091, 563),
    "edm-afhqv2-64": (61_805_571, 553),
    "edm-afhqv2-64-ve": (62_761_091, 563),
    "edm-imagenet64": (295_899_267, 553),
}


@pytest.mark.parametrize("name", list(OFFICIAL))
def test_official_networks_have_their_published_sizes(name):
    with torch.device("meta"):
        denoiser = build_denoiser(OFFICIAL[name].architecture, 0.5)
    assert (count_parameters(denoiser), len(denoiser.state_dict())) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "augment_dim", "expected"), [("edm-cifar10", 0, 60_395_267), ("edm-imagenet64", 0, 324_100_611)]
)
def test_students_have_the_sizes_of_ctms(name, augment_dim, expected):
    with torch.device("meta"):
        denoiser = build_denoiser({**OFFICIAL[name].architecture, "augment_dim": augment_dim, "s_branch": True}, 0.5)
    assert count_parameters(denoiser) == expected


# F of EDM's public code (NVlabs/edm, training/networks.py) on the weights and images of tests/formula.py: every 397th
# value, eight of them. 16x16, width 32 (ADM 64), multipliers [1, 2], one block, attention at 8.
EDM_SAYS = {
    "ddpmpp": (0, [-0.198253, -0.394794, 0.0294975, -0.418676, -0.0355984, -0.372223, -0.0473785, -0.378276]),
    "ddpmpp-cond": (3, [-0.198523, -0.395431, 0.0296585, -0.419042, -0.0361211, -0.372962, -0.0492133, -0.380153]),
    "ncsnpp": (0, [-0.204101, -0.413974, 0.027801, -0.429383, -0.0335004, -0.359019, 0.0070783, -0.345168]),
    "ncsnpp-cond": (3, [-0.203028, -0.412366, 0.0260162, -0.423822, -0.0245199, -0.349805, 0.029656, -0.336385]),
    "adm": (0, [-0.0207243, -0.0353019, -0.179595, -0.0172562, 0.00979503, -0.156896, -0.122291, -0.0726925]),
    "adm-cond": (3, [-0.01784, -0.0388757, -0.168002, -0.022402, 0.011058, -0.157929, -0.112555, -0.0803096]),
}


@pytest.mark.parametrize("name", list(EDM_SAYS))
def test_networks_agree_with_edms_own(name):
    num_classes, expected = EDM_SAYS[name]
    kind = name.removesuffix("-cond")
    architecture = {
        "resolution": 16, "channels": 3, "num_classes": num_classes, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [8], **KINDS[kind], "model_channels": 64 if kind == "adm" else 32,
    }  # fmt: skip
    denoiser = freeze(build_denoiser({**architecture, **({"head_channels": 64} if kind == "adm" else {})}, 0.5))
    fill(denoiser)
    x, t, labels = inputs(16, num_classes)
    c_in = 1 / (t.square() + 0.25).sqrt()
    found = denoiser.model(x * c_in[:, None, None, None], t.log() / 4, None, labels)
    torch.testing.assert_close(found.flatten()[::397][:8], torch.tensor(expected), rtol=2e-5, atol=2e-6)
    whole = denoiser(x, t.double(), None, labels)
    c_skip, c_out = 0.25 / (t.square() + 0.25), 0.5 * t * c_in
    edm = c_skip[:, None, None, None] * x + c_out[:, None, None, None] * found
    torch.testing.assert_close(whole, edm, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_student_equals_the_teacher_bit_for_bit_for_every_s(kind):
    teacher = freeze(small_denoiser(kind=kind))
    student = freeze(teacher.student())
    x, t, labels = batch()
    expected = teacher(x, t, None, labels)
    for s in (t, t / 2, torch.full_like(t, 0.002)):
        assert torch.equal(student(x, t, s, labels), expected)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_s_branch_trains_from_the_first_step(kind):
    student = small_denoiser(kind=kind).student()
    x, t, labels = batch()
    student(x, t, t / 2, labels).square().sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    projections = [g for name, g in gradients.items() if "affine_s" in name]
    assert len(projections) == len([name for name in gradients if name.endswith("affine.weight")]) * 2
    assert all(float(g.abs().sum()) > 0 for g in projections)


def test_edms_augmentation_layer_is_kept_and_stays_as_it_is():
    """Distillation has no augmentation labels; a trainable parameter without a gradient would stop DDP."""
    teacher = small_denoiser()
    student = teacher.student()
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert frozen == ["model.map_augment.weight"]
    assert torch.equal(student.state_dict()[frozen[0]], teacher.state_dict()[frozen[0]])


def test_no_label_is_a_label_of_zeros():
    """EDM passes zeros where a conditional network is given no class: the layer's bias still counts."""
    denoiser = small_denoiser()
    with torch.no_grad():
        denoiser.model.map_label.weight.zero_()
        x, t, labels = batch()
        assert torch.equal(denoiser(x, t, None, None), denoiser(x, t, None, labels))


@pytest.mark.parametrize("kind", list(KINDS))
def test_two_steps_make_the_student_depend_on_s(kind):
    student = small_denoiser(kind=kind).student()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    x, t, labels = batch()
    for _ in range(2):
        optimizer.zero_grad()
        (student(x, t, t / 2, labels) - x).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert float((student(x, t, t / 2, labels) - student(x, t, t, labels)).abs().max()) > 1e-6


def test_consistency_model_students_have_no_s_branch():
    student = small_denoiser().student(takes_s=False)
    assert not any("_s" in name for name, _ in student.named_parameters())
    x, t, labels = batch()
    assert torch.equal(student.eval()(x, t, t / 2, labels), student(x, t, None, labels))


def test_edm_scalings():
    c_skip, c_out, c_in = edm_coefficients(torch.tensor([0.5], dtype=torch.float64), 0.5)
    assert (float(c_skip), float(c_out) ** 2, float(c_in) ** 2) == pytest.approx((0.5, 0.125, 2.0))


def test_denoiser_is_the_identity_without_noise():
    """c_skip -> 1 and c_out -> 0: whatever the network says, D(x, t) -> x."""
    x, _, labels = batch()
    out = small_denoiser()(x, torch.full((6,), 1e-6, dtype=torch.float64), None, labels)
    torch.testing.assert_close(out, x, atol=1e-4, rtol=0)


def test_the_state_stays_in_double_precision_around_a_float_network():
    x, t, labels = batch()
    assert small_denoiser()(x.double(), t, None, labels).dtype == torch.float64


def test_positional_embedding_by_hand():
    found = positional_embedding(torch.tensor([0.7], dtype=torch.float64), 4)
    angles = torch.tensor([0.7, 0.7e-4], dtype=torch.float32)
    torch.testing.assert_close(found[0].float(), torch.cat([angles.sin(), angles.cos()]))


def test_attention_is_softmax_attention():
    """Channels lie as (heads, d, 3): by hand, one query at a time."""
    qkv = torch.randn(2, 2 * 4 * 3, 3, 3, generator=generator(0, "qkv"), dtype=torch.float64)
    q, k, v = qkv.reshape(2, 2, 4, 3, 9).unbind(3)
    expected = torch.zeros(2, 2, 4, 9, dtype=torch.float64)
    for place in range(9):
        scores = torch.einsum("nhc,nhcj->nhj", q[..., place], k) / 2
        expected[..., place] = torch.einsum("nhj,nhcj->nhc", scores.softmax(-1), v)
    torch.testing.assert_close(Attention(4)(qkv), expected.reshape(2, 8, 3, 3), rtol=1e-6, atol=1e-6)


def test_fused_and_plain_attention_agree():
    q, k, v = torch.randn(3, 2, 5, 30, 8, generator=generator(0, "qkv"), dtype=torch.float64)
    torch.testing.assert_close(plain_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_resampling_by_hand(taps, direction):
    """Along one side and then the other: zeros between the pixels and the filter, or the filter and every other."""
    x = torch.randn(2, 3, 6, 6, generator=generator(0, "x"), dtype=torch.float64)
    line = torch.tensor(taps, dtype=torch.float64) / sum(taps)

    def along(rows: torch.Tensor) -> torch.Tensor:
        pad = (len(taps) - 1) // 2
        if direction == "up":
            spread = torch.zeros(*rows.shape[:-1], 2 * rows.shape[-1] - 1, dtype=rows.dtype)
            spread[..., ::2] = rows
            padded = F.pad(spread, (len(taps) - 1 - pad, len(taps) - 1 - pad))
            return padded.unfold(-1, len(taps), 1) @ (2 * line)
        return F.pad(rows, (pad, pad)).unfold(-1, len(taps), 1)[..., ::2, :] @ line

    expected = along(along(x).mT).mT
    found = resample(x, outer_filter(taps).double(), direction)
    assert found.shape[-1] == (12 if direction == "up" else 3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_fused_convolution_puts_its_zeros_in_front_only():
    layer = FusedDownConv(2, 4, 3, "down", [1, 3, 3, 1]).double()
    x = torch.randn(1, 2, 8, 8, generator=generator(0, "x"), dtype=torch.float64)
    wide = F.conv2d(F.pad(x, (2, 2, 2, 2)), layer.weight, layer.bias)
    kernel = layer.resample_filter.double().expand(4, 1, 4, 4)
    torch.testing.assert_close(layer(x), F.conv2d(wide, kernel, stride=2, groups=4))


@pytest.mark.parametrize("kind", list(KINDS))
def test_derivatives_agree_with_finite_differences(kind):
    """Forward mode, reverse mode and central differences along one direction, in x and in t, float64."""
    denoiser = freeze(small_denoiser(kind=kind).double())
    x, _, labels = batch()
    x, t = x.double(), torch.logspace(-1, 1, 6, dtype=torch.float64)
    dx, dt = torch.randn_like(x), torch.rand_like(t)
    w = torch.randn_like(x)

    def out(point: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return denoiser(point, level, None, labels)

    h = 1e-6
    difference = ((out(x + h * dx, t + h * dt) - out(x - h * dx, t - h * dt)) / (2 * h) * w).sum()
    forward = (torch.func.jvp(out, (x, t), (dx, dt))[1] * w).sum()
    grad_x, grad_t = torch.func.vjp(out, x, t)[1](w)
    torch.testing.assert_close((grad_x * dx).sum() + (grad_t * dt).sum(), forward, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(forward, difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", list(KINDS))
def test_weights_have_the_gradient_of_finite_differences(kind):
    student = small_denoiser(kind=kind).student(dropout=0.0).double()
    x, _, labels = batch()
    x, t = x.double(), torch.logspace(-1, 1, 6, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return student(x, t, t / 2, labels).square().sum()

    loss().backward()
    trained = [p for p in student.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in trained]
    slope = sum((p.grad * d).sum() for p, d in zip(trained, directions, strict=True))
    values = []
    with torch.no_grad():
        for h in (1e-6, -2e-6):
            for p, d in zip(trained, directions, strict=True):
                p.add_(h * d)
            values.append(loss())
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_second_derivatives_exist_with_plain_attention(kind):
    """As the class says: within torch's context for the mathematical attention."""
    denoiser = freeze(small_denoiser(kind=kind).double())
    x, _, labels = batch(2)
    x, t = x.double(), torch.ones(2, dtype=torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        slope = torch.func.grad(lambda point: denoiser(point, t, None, labels).square().sum())
        second = torch.func.jvp(slope, (x,), (x,))[1]
    assert second.isfinite().all()
    assert float(second.abs().sum()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_networks_can_be_compiled_in_one_graph(kind):
    """Traced by torch.compile with no graph break; the backend is the one that needs no C++ compiler."""
    denoiser = freeze(small_denoiser(kind=kind))
    x, t, labels = batch()
    compiled = torch.compile(denoiser, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, None, labels), denoiser(x, t, None, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_memory_format_changes_nothing_but_rounding(kind):
    denoiser = freeze(small_denoiser(kind=kind))
    x, t, labels = batch()
    expected = denoiser(x, t, None, labels)
    last = denoiser.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, None, labels)
    torch.testing.assert_close(last, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(KINDS))
def test_half_precision_networks_stay_near(kind, dtype):
    """The weights are half, the noise level is embedded in float32, the state keeps its own type."""
    denoiser = freeze(small_denoiser(kind=kind))
    x, t, labels = batch()
    expected = denoiser(x, t, None, labels)
    found = denoiser.to(dtype)(x, t, None, labels)
    assert found.dtype == torch.float32
    size = float((expected - x).square().mean().sqrt())
    assert float((found - expected).square().mean().sqrt()) < size * (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_description_and_tensors_make_the_network_again(kind):
    denoiser = freeze(small_denoiser(kind=kind))
    common = {"resolution": 8, "channels": 1, "num_classes": 3, "augment_dim": 9}
    levels = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    again = freeze(load_denoiser({**common, **levels, **KINDS[kind]}, 0.5, denoiser.state_dict()))
    x, t, labels = batch()
    assert torch.equal(again(x, t, None, labels), denoiser(x, t, None, labels))


BAD_DESCRIPTIONS = {
    "another network": {"network": "vit"},
    "another width": {"model_channels": 32},
    "beyond reason": {"model_channels": 10**9},
    "many blocks": {"num_blocks": 10**9},
    "many levels": {"channel_mult": [1] * 1000},
    "negative": {"num_blocks": -1},
    "text": {"resolution": "8"},
    "an argument of no network": {"windows": 3},
    "another filter": {"taps": [1, 2]},
}


@pytest.mark.parametrize("change", list(BAD_DESCRIPTIONS.values()), ids=list(BAD_DESCRIPTIONS))
def test_descriptions_that_do_not_fit_are_refused(change):
    denoiser = small_denoiser()
    common = {"resolution": 8, "channels": 1, "num_classes": 3, "augment_dim": 9}
    levels = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    with pytest.raises((KeyError, TypeError, ValueError, RuntimeError)):
        load_denoiser({**common, **levels, **KINDS["ddpmpp"], **change}, 0.5, denoiser.state_dict())


def test_fourier_features_are_at_least_float32():
    denoiser = small_denoiser(kind="ncsnpp")
    noise = torch.tensor([math.log(80) / 4])
    angles = 2 * math.pi * denoiser.model.map_noise.freqs * noise
    denoiser.half()
    assert next(denoiser.parameters()).dtype == torch.float16
    torch.testing.assert_close(denoiser.model.map_noise(noise)[0], torch.cat([angles.sin(), angles.cos()]))


@pytest.mark.parametrize("name", ["digits", "patches"])
def test_shipped_teachers_denoise(name):
    """The error at t = 0.5 is well below that of the best constant, and below the noise itself."""
    from cdistill.data import load_source

    teacher = load_teacher(name)
    x0, labels = load_source(teacher.data).batch(torch.arange(256))
    z = torch.randn(x0.shape, generator=generator(0, "z"))
    t = torch.full((256,), 0.5, dtype=torch.float64)
    error = float((teacher.denoiser(x0 + 0.5 * z, t, None, labels) - x0).square().mean())
    assert error < 0.4 * min(0.25, float(x0.var()))
