"""``cdistill doctor``."""

import platform
import shutil
from importlib import metadata
from pathlib import Path

from cdistill import __version__
from cdistill.console import table
from cdistill.launch import thread_count


def print_doctor() -> None:
    """Prints what this machine and installation have."""
    import torch

    from cdistill.assets import ASSETS
    from cdistill.teachers.embedded import ASSETS as teachers

    rows = [["cdistill", __version__], ["python", platform.python_version()]]
    for package in ("torch", "torchvision", "accelerate", "safetensors", "lpips", "clean-fid"):
        rows.append([package, _version(package)])
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    rows.append(["device", ", ".join(gpus) or f"cpu, {thread_count()} threads"])
    rows.append(["free disk here", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"])
    rows += [[f"teacher {path.stem}", "ships with the package"] for path in sorted(teachers.glob("*.safetensors"))]
    for asset in ASSETS:
        rows.append([asset.name, str(asset.path) if asset.path.is_file() else f"missing; put it at {asset.path}"])
    table("cdistill doctor", ["what", "found"], rows)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing; pip install it"
