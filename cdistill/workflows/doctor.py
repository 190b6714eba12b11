"""``cdistill doctor``."""

import platform
import shutil
from importlib import metadata
from pathlib import Path

from cdistill import __version__
from cdistill.runtime.processes import thread_count
from cdistill.storage.files import data_folder


def doctor() -> list[list[str]]:
    """Returns what this machine and installation have: rows of a name and what is known of it."""
    import torch

    from cdistill.sampling.trajectories import stored_trajectories
    from cdistill.storage.assets import ASSETS, EDM_STATISTICS
    from cdistill.teachers.named import ASSETS as teachers
    from cdistill.teachers.official import OFFICIAL

    rows = [["cdistill", __version__], ["python", platform.python_version()]]
    rows += [[package, _version(package)] for package in ("torch", "torchvision", "accelerate", "safetensors", "lpips")]
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    apple = "; Apple's GPU is not used" if torch.backends.mps.is_available() else ""
    rows.append(["device", ", ".join(gpus) or f"cpu, {thread_count()} threads{apple}"])
    rows.append(["free disk here", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"])
    rows += [[f"teacher {path.stem}", "ships with the package"] for path in sorted(teachers.glob("*.safetensors"))]
    rows += [[f"teacher {name}", _place(entry.present(), entry.asset.path)] for name, entry in OFFICIAL.items()]
    files = [*ASSETS, *EDM_STATISTICS.values()]
    rows += [[asset.name, _place(asset.path if asset.path.is_file() else None, asset.path)] for asset in files]
    rows += [
        [
            f"trajectories of {store['teacher']}",
            f"{store['count']:,} in {store['folder']}, {store['bytes'] / 2**30:.2f} GiB",
        ]
        for store in stored_trajectories()
    ]
    here = sorted(path.name for path in data_folder().iterdir()) if data_folder().is_dir() else []
    rows.append(["data folder", f"{data_folder()}: {', '.join(here) or 'nothing'}"])
    return rows


def _place(path: Path | None, place: Path) -> str:
    return str(path) if path is not None else f"missing; put it at {place}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing; pip install it"
