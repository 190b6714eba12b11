"""``--dry-run`` and ``cdistill doctor``."""

import platform
import shutil
from importlib import metadata
from pathlib import Path

from cdistill import __version__
from cdistill.console import out, table
from cdistill.launch import thread_count
from cdistill.recipe import DistillRecipe, to_toml


def print_plan(recipe: DistillRecipe) -> None:
    """Prints the resolved recipe and the network forwards that a step makes for each image."""
    from cdistill.training.cost import step_cost

    section = recipe.training
    cost = step_cost(section.method, section.points, section.max_ode_steps, section.dsm)
    out.print(to_toml(recipe), highlight=False, markup=False, soft_wrap=True)
    parts = {
        "teacher (Heun's solver)": cost.teacher,
        "moving averages, no gradient": cost.target,
        "moving averages, gradient to the input": cost.frozen,
        "student, with gradient": cost.student,
    }
    rows = [[name, f"{count:.2f}", f"{count * section.batch_size:.0f}"] for name, count in parts.items()]
    total = sum(parts.values())
    rows.append(["all forwards", f"{total:.2f}", f"{total * section.batch_size:.0f}"])
    table(f"expected network forwards, {section.iterations} steps", ["", "an image", "a step"], rows)


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
