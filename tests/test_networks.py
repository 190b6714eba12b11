import pytest
import torch

from cdistill.networks.denoiser import EDMDenoiser, edm_coefficients, freeze, positional_embedding
from cdistill.networks.song import SongUNet
from cdistill.networks.unet import Attention
from cdistill.randomness import generator
from cdistill.teachers import load_teacher

SHAPE = (1, 8, 8)


def small_denoiser(num_classes: int = 3) -> EDMDenoiser:
    torch.manual_seed(0)
    network = SongUNet(8, 1, num_classes, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    with torch.no_grad():
        for parameter in network.parameters():  # leave the tiny initial values of the "zero" layers behind
            parameter.add_(0.05 * torch.randn_like(parameter))
    return EDMDenoiser(network, SHAPE, 0.5, num_classes)


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = generator(0, "batch")
    x = torch.randn(count, *SHAPE, generator=draw)
    t = torch.logspace(-2, 1.5, count, dtype=torch.float64)
    return x, t, torch.arange(count) % 3


def test_student_equals_the_teacher_bit_for_bit_for_every_s():
    teacher = freeze(small_denoiser())
    student = freeze(teacher.student())
    x, t, labels = batch()
    expected = teacher(x, t, None, labels)
    for s in (t, t / 2, torch.full_like(t, 0.002)):
        assert torch.equal(student(x, t, s, labels), expected)


def test_the_s_branch_trains_from_the_first_step():
    student = small_denoiser().student()
    x, t, labels = batch()
    student(x, t, t / 2, labels).square().sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    projections = [g for name, g in gradients.items() if "affine_s" in name]
    assert len(projections) == len([name for name in gradients if name.endswith("affine.weight")]) * 2
    assert all(float(g.abs().sum()) > 0 for g in projections)


def test_two_steps_make_the_student_depend_on_s():
    student = small_denoiser().student()
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
    qkv = torch.randn(2, 12, 3, 3, generator=generator(0, "qkv"), dtype=torch.float64)
    q, k, v = qkv.reshape(2, 4, 3, 9).permute(2, 0, 3, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).mT.reshape(2, 4, 3, 3)
    torch.testing.assert_close(Attention()(qkv), expected, rtol=1e-6, atol=1e-6)


def test_forward_and_reverse_mode_derivatives_agree():
    denoiser = freeze(small_denoiser().double())
    x, t, labels = batch()
    x = x.double()
    v = torch.randn(x.shape, generator=generator(1, "v"), dtype=torch.float64)
    _, jv = torch.func.jvp(lambda point: denoiser(point, t, None, labels), (x,), (v,))
    _, pullback = torch.func.vjp(lambda point: denoiser(point, t, None, labels), x)
    torch.testing.assert_close((pullback(v)[0] * v).sum(), (jv * v).sum(), rtol=1e-8, atol=0)


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
