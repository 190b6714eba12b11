import pytest
import torch

from cdistill.errors import CorruptFileError, MissingAssetError
from cdistill.objectives import lpips as perceptual
from cdistill.runtime.randomness import generator
from cdistill.storage import assets
from cdistill.storage.assets import Asset
from cdistill.storage.files import file_digest


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A file like torchvision's, with random weights, and the same weights by their names."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    weights = {f"features.{name}": value for name, value in vgg16(weights=None).features.state_dict().items()}
    path = tmp_path_factory.mktemp("assets") / "vgg16-397923af.pth"
    torch.save(weights, path)  # noqa: TID251 - what a download would bring
    return path, weights


@pytest.fixture
def lpips_distance(backbone, monkeypatch):
    path, _ = backbone
    monkeypatch.setenv("CDISTILL_ASSETS", str(path.parent))
    monkeypatch.setattr(assets, "VGG16", Asset(path.name, "https://x", file_digest(path)))
    monkeypatch.setattr(perceptual, "RESOLUTION", 64)
    return perceptual.LPIPS()


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def images(seed: int) -> torch.Tensor:
    return torch.rand(2, 1, 8, 8, generator=generator(seed, "images")) * 2 - 1


def test_it_is_the_lpips_package_with_torchvisions_weights(lpips_distance, backbone):
    import lpips
    import torch.nn.functional as F

    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for name, parameter in model.net.state_dict().items():
        parameter.copy_(backbone[1][f"features.{name.split('.', 1)[1]}"])
    x, y = images(0), images(1)
    large = [F.interpolate(part.expand(-1, 3, -1, -1), size=64, mode="bilinear") for part in (x, y)]
    torch.testing.assert_close(lpips_distance(x, y), model(*large).flatten().detach(), rtol=1e-4, atol=1e-6)


def test_it_is_zero_for_equal_images_with_a_finite_gradient(lpips_distance):
    x = images(0).requires_grad_()
    distance = lpips_distance(x, images(0))
    assert distance.tolist() == [0, 0]
    distance.sum().backward()
    assert x.grad.isfinite().all()


def test_zero_features_have_a_finite_gradient():
    features = torch.zeros(1, 4, 2, 2, requires_grad=True)
    perceptual._unit(features).sum().backward()
    assert features.grad.isfinite().all()


def test_the_gradient_reaches_the_images_and_no_weights(lpips_distance):
    x = images(0).requires_grad_()
    lpips_distance(x, images(1)).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is None for p in lpips_distance.model.parameters())


def in_bf16(distance, x, y):
    """As a training with precision = "bf16" calls it."""
    with torch.autocast("cpu", torch.bfloat16):
        return distance(x, y)


def test_under_autocast_features_are_half_and_differences_single(lpips_distance):
    """Within a few roundings of float32; so are small distances, whose squares would vanish."""
    kinds = []
    for layer in lpips_distance.model.net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(lambda module, inputs, out: kinds.append(out.dtype))
    x = images(0).requires_grad_()
    found = in_bf16(lpips_distance, x, images(1))
    assert set(kinds) == {torch.bfloat16}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, lpips_distance(x, images(1)), rtol=4 * 2**-8, atol=0)
    kinds.clear()
    (half,) = torch.autograd.grad(found.sum(), x)
    (exact,) = torch.autograd.grad(lpips_distance(x, images(1)).sum(), x)
    assert half.dtype == torch.float32
    assert float((half - exact).norm() / exact.norm()) < 20 * 2**-8


def test_differences_are_not_rounded_to_half(lpips_distance, monkeypatch):
    """From features that half precision holds exactly, autocast gives what float32 does, bit for bit."""
    draw = generator(2, "features")
    features = {
        seed: [torch.randn(2, width, 4, 4, generator=draw).bfloat16() for width in (64, 128, 256, 512, 512)]
        for seed in (0, 1)
    }

    def lookup(x: torch.Tensor) -> list[torch.Tensor]:
        found = features[int(x)]
        return found if torch.is_autocast_enabled("cpu") else [part.float() for part in found]

    monkeypatch.setattr(lpips_distance, "_features", lookup, raising=False)
    one, two = torch.zeros(1), torch.ones(1)
    assert torch.equal(in_bf16(lpips_distance, one, two), lpips_distance(one, two))


def test_in_half_precision_equal_images_have_a_finite_gradient(lpips_distance):
    x = images(0).requires_grad_()
    distance = in_bf16(lpips_distance, x, images(0))
    assert distance.tolist() == [0, 0]
    distance.sum().backward()
    assert x.grad.isfinite().all()


def test_a_missing_backbone_names_file_address_and_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    with pytest.raises(MissingAssetError) as caught:
        perceptual.LPIPS()
    assert str(tmp_path / "vgg16-397923af.pth") in str(caught.value)
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in str(caught.value)


def test_another_file_of_that_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CDISTILL_ASSETS", str(tmp_path))
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"not it")
    with pytest.raises(CorruptFileError, match="sha256 is"):
        perceptual.LPIPS()
