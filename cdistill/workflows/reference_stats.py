"""``cdistill reference-stats``: statistics of real data in a file, for `evaluate` and for EDM's own fid.py."""

from pathlib import Path
from typing import Any

from cdistill.data import load_source
from cdistill.evaluation.features import load_features
from cdistill.evaluation.references import measure
from cdistill.evaluation.statistics_files import Statistics, file_facts, write_statistics
from cdistill.runtime.console import facts
from cdistill.runtime.processes import versions
from cdistill.training.loop import make_accelerator


def write_reference(data: str, split: str, features: str, keep: int, out: Path) -> dict[str, Any]:
    """Measures all of the data, writes the file, and returns what it is and where it comes from.

    Args:
        data: A data source, or the path of one.
        split: Its part.
        features: The feature network, see `load_features`.
        keep: How many feature vectors the file shall hold beside the moments.
        out: The .npz.

    Raises:
        CdistillError: The network does not take such data.
        MissingAssetError: Its weights, or the data, are missing.
    """
    source, network = load_source(data, split), load_features(features)
    network.check(source.shape)
    accelerator = make_accelerator("fp32")
    found = measure(source, network, keep, accelerator)
    kept = 0 if found.features is None else len(found.features)
    record = {
        "schema": 1,
        "data": {"name": source.name, "split": split, "count": len(source), "sha256": source.digest},
        "features": {"name": network.name, "sha256": network.digest, "dimensions": len(found.mean), "kept": kept},
        "images": "uint8, as the data have them; not mirrored",
        "moments": "float64, unbiased covariance",
        "device": str(accelerator.device),
        "versions": versions(),
    }
    if accelerator.is_main_process:
        write_statistics(out, Statistics(found.mean, found.covariance, found.features if kept else None, record))
    accelerator.wait_for_everyone()
    facts(
        "reference statistics",
        [
            ["file", str(out)],
            ["data", f"{source.name} ({split}): {len(source):,}, sha256 {source.digest[:12]}..."],
            ["features", f"{network.name}: {len(found.mean):,} dimensions, {kept:,} vectors kept"],
        ],
    )
    return {**file_facts(out), **record}
