"""What samples are compared with: real data, or statistics of them in a file; a network sees each of them once.

The files are EDM's .npz, `mu` (d,) and `sigma` (d, d), with what else we write beside them.
"""

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from cdistill.data import Source
from cdistill.data.memory import check_memory
from cdistill.errors import CdistillError, CorruptFileError, MismatchError, MissingAssetError, RecipeError
from cdistill.evaluation.features import BATCH, FeatureNetwork, Pixels, check_dimensions
from cdistill.evaluation.frechet import Sums
from cdistill.formats.npz import npz_errors, read_array
from cdistill.runtime import signals
from cdistill.runtime.console import progress, say_once
from cdistill.runtime.randomness import generator
from cdistill.storage.assets import EDM_STATISTICS, digest
from cdistill.storage.files import replacing

KEEP = 10_000  # features that are kept of the data, for metrics that compare points and not moments
_READ = 1024  # images that are read together, by one process
_MOST = 2**31  # bytes of the covariance: 16,384 dimensions
_MOST_FEATURES = 2**34
_MOST_TEXT = 2**22
_TOLERANCE = 1e-6  # relative, of symmetry: other people's covariances are the sums of float32 products

Result = TypeVar("Result")


@dataclass(frozen=True)
class Statistics:
    """What samples are compared with, as a feature network sees it.

    Attributes:
        facts: Where the numbers come from, as JSON; empty for other people's files.
    """

    mean: Tensor  # (d,), float64
    covariance: Tensor  # (d, d), float64, unbiased
    features: Tensor | None = None  # features of some of the data (m, d), float32, if they are kept
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Reference:
    """What samples are compared with.

    A file of statistics, `stats`, replaces the data, `source`, wherever its network may be the one that is asked for;
    the data serve for what it does not hold. So many features of theirs as `keep` are kept, of a fixed random choice.
    """

    source: Source | None
    stats: Path | None = None
    accelerator: Accelerator | None = None
    keep: int = KEEP
    _results: dict[str, Any] = field(default_factory=dict, init=False)

    def check(self, network: FeatureNetwork, features: bool = False) -> None:
        """Raises CdistillError if the moments as `network` sees them, or `features`, cannot be had; runs nothing."""
        if self.source is not None:
            network.check(self.source.shape)
        self._stored(network, features)

    def moments(self, network: FeatureNetwork) -> tuple[Tensor, Tensor]:
        """Returns mean (d,) and unbiased covariance (d, d), float64, of the file or of all the data."""
        statistics = self._stored(network, False) or self._measured(network)
        return statistics.mean, statistics.covariance

    def features(self, network: FeatureNetwork) -> Tensor:
        """Returns the features (m, d), float32, that the file holds, or those of at most `keep` of the data."""
        statistics = self._stored(network, True) or self._measured(network)
        assert statistics.features is not None
        return statistics.features

    def once(self, key: str, compute: Callable[[], Result]) -> Result:
        """Returns what `compute` makes of the data; computed once for each `key`."""
        if key not in self._results:
            self._results[key] = compute()
        result: Result = self._results[key]
        return result

    def digest(self) -> str:
        """Returns the SHA-256 of the file of statistics, or of the data."""
        if self.stats is not None:
            return file_facts(self.stats)["sha256"]
        return self.source.digest if self.source is not None else ""

    def _stored(self, network: FeatureNetwork, features: bool) -> Statistics | None:
        """Returns the statistics in the file, None where the data have to serve; CdistillError where neither can."""
        path = self.stats
        stored = None if path is None else self.once("file", lambda: read_statistics(path))
        if stored is not None and path is not None and self._serves(network, stored):
            check_made_for(path, stored, network.name, network.digest)
            if not features or stored.features is not None:
                return stored
        if self.source is None:
            what = "features (cdistill reference-stats --keep writes some)" if features else "moments"
            raise CdistillError(f"{self.stats or 'reference'}: no {what} for {network.name!r}, and no data; name some")
        if stored is not None:
            say_once(
                f"{self.stats}: holds no {'features' if features else 'moments'} of {network.name!r}: the data serve"
            )
        return None

    def _serves(self, network: FeatureNetwork, stored: Statistics) -> bool:
        """Whether the file is for this network; pixels are compared beside a network's features, with the data."""
        return network.name != Pixels.name or stored.facts.get("features", {}).get("name") == network.name

    def _measured(self, network: FeatureNetwork) -> Statistics:
        source = self.source
        assert source is not None
        return self.once(f"statistics {network.name}", lambda: measure(source, network, self.keep, self.accelerator))


def kept_indices(count: int, keep: int) -> Tensor:
    """Returns which of `count` data are kept, in their order."""
    order = torch.arange(count) if keep >= count else torch.randperm(count, generator=generator(0, "reference"))[:keep]
    return order.sort().values


def measure(
    source: Source, network: FeatureNetwork, keep: int = KEEP, accelerator: Accelerator | None = None
) -> Statistics:
    """Returns the statistics of all the data in one pass, holding one part of them at a time.

    Every process takes its turn at parts of a fixed size; their sums are merged in a fixed order. CdistillError of
    fewer than two samples, or features that are not finite.
    """
    if len(source) < 2:
        raise CdistillError(f"data {source.name!r}: got {len(source)} samples; statistics need at least 2")
    wanted, sums = kept_indices(len(source), keep), Sums()
    kept: Tensor | None = None
    for start, features in _own_parts(source, network, accelerator):
        if kept is None:
            check_dimensions(features.shape[1], network.name)
            check_memory(4 * len(wanted) * features.shape[1], f"{len(wanted):,} kept features {network.name!r}")
            kept = torch.zeros(len(wanted), features.shape[1])
        first, last = torch.searchsorted(wanted, torch.tensor([start, start + len(features)])).tolist()
        kept[first:last] = features[wanted[first:last] - start]
        sums.add(features)
    if kept is None:  # more processes than parts
        kept = torch.zeros(len(wanted), network(source.samples[:1]).shape[1])
    sums, kept = _merged(sums, kept, accelerator)
    if not sums.scatter.isfinite().all():
        raise CdistillError(f"features {network.name!r}: not finite on data {source.name!r}; choose another network")
    return Statistics(sums.mean, sums.covariance, kept)


def _own_parts(
    source: Source, network: FeatureNetwork, accelerator: Accelerator | None
) -> Iterator[tuple[int, Tensor]]:
    """Yields this process's parts: where each begins, and its features (B, d), float32, on the CPU."""
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    with progress(len(source), f"reference ({network.name})", "img") as advance:
        for number, start in enumerate(range(0, len(source), _READ)):
            size = min(_READ, len(source) - start)
            if number % world == rank:
                signals.check("reference statistics")
                images = source.samples[start : start + size]
                yield start, torch.cat([network(part).float().cpu() for part in images.split(BATCH)])
            advance(size, "")


def _merged(sums: Sums, kept: Tensor, accelerator: Accelerator | None) -> tuple[Sums, Tensor]:
    """Returns the sums and features of all processes, the sums merged in the order of the processes."""
    if accelerator is None or accelerator.num_processes == 1:
        return sums, kept
    size = kept.shape[1]
    packed = torch.zeros(accelerator.num_processes, size + 2, size, dtype=torch.float64)
    packed[accelerator.process_index] = torch.cat(
        [sums.scatter.expand(size, size), sums.mean.expand(1, size), torch.full((1, size), float(sums.count))]
    )
    packed, kept = (accelerator.reduce(part.to(accelerator.device), "sum").cpu() for part in (packed, kept))
    total = Sums()
    for part in packed:
        if count := int(part[-1, 0]):
            total.merge(count, part[-2], part[:-2])
    return total, kept


def find_statistics(name: str, data: str) -> Path:
    """Returns the file of statistics that `name` stands for: a path, or "edm" for what EDM published for the data.

    Raises:
        RecipeError: EDM published none for these data.
        MissingAssetError: It is not there and cannot be downloaded; the message says what to put where.
        CorruptFileError: It is not what it was at first use.
    """
    if name != "edm":
        if not Path(name).is_file():
            raise MissingAssetError(f"--reference: {name}: no such file; cdistill reference-stats makes one")
        return Path(name)
    if data not in EDM_STATISTICS:
        raise RecipeError(
            f"--reference: EDM has no statistics of {data!r}; known: {', '.join(sorted(EDM_STATISTICS))}; give a file, "
            "cdistill reference-stats makes one"
        )
    return EDM_STATISTICS[data].find("or give another file with --reference FILE")


def write_statistics(path: Path, statistics: Statistics) -> None:
    """Writes an .npz that EDM's fid.py reads too, atomically; DiskFullError if it did not fit."""
    arrays: dict[str, NDArray[Any]] = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()}
    if statistics.features is not None:
        arrays["features"] = statistics.features.numpy()
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays, provenance=np.array(json.dumps(statistics.facts)))


def read_statistics(path: Path) -> Statistics:
    """Reads an .npz of EDM's or ours; nothing in it is executed.

    Raises:
        MissingAssetError: There is no such file.
        CorruptFileError: It is damaged, its numbers cannot be moments, or it is a pickle.
    """
    if path.suffix == ".pkl":
        raise CorruptFileError(
            f"{path}: a pickle (EDM2's format), which is never opened; take the .npz of EDM, or make one by "
            "cdistill reference-stats"
        )
    with npz_errors(path), zipfile.ZipFile(path) as archive:
        held = {name.removesuffix(".npy") for name in archive.namelist()}
        if not {"mu", "sigma"} <= held:
            raise CorruptFileError(f"{path}: holds {sorted(held)[:5]}; reference statistics are arrays mu and sigma")
        mean, covariance = (_numbers(archive, name, path, _MOST) for name in ("mu", "sigma"))
        features = _numbers(archive, "features", path, _MOST_FEATURES).float() if "features" in held else None
        facts = _facts(archive, path) if "provenance" in held else {}
    _check_moments(path, mean, covariance)
    if features is not None and (features.dim() != 2 or features.shape[1] != len(mean)):
        raise CorruptFileError(f"{path}: features of shape {tuple(features.shape)} beside a mean of {len(mean)}")
    return Statistics(mean, covariance, features, facts)


def check_made_for(path: Path, statistics: Statistics, name: str, sha256: str) -> None:
    """Raises MismatchError if the file was made by another feature network than `name` with these weights."""
    made_by = statistics.facts.get("features", {})
    if path in [asset.path for asset in EDM_STATISTICS.values()]:
        made_by = {"name": "legacy_tensorflow", "sha256": sha256}
    if not made_by:
        return say_once(f"{path}: does not say which features it is made of; taken for those of {name!r}")
    if (made_by.get("name"), made_by.get("sha256")) == (name, sha256):
        return None
    raise MismatchError(
        f"{path}: made by features {made_by.get('name')!r} (sha256 {str(made_by.get('sha256'))[:12]}...), not {name!r} "
        f"({sha256[:12]}...); choose its --features, or make another by cdistill reference-stats"
    )


def file_facts(path: Path) -> dict[str, str]:
    """Returns which file it is, for a record."""
    return {"file": str(path), "sha256": digest(path)}


def _numbers(archive: zipfile.ZipFile, name: str, path: Path, most: int) -> Tensor:
    array = read_array(archive, name, str(path), most)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8) or not np.isfinite(array).all():
        raise CorruptFileError(f"{path}: {name}: {array.dtype}; needs finite numbers in float32 or float64")
    kind = np.float32 if name == "features" else np.float64
    return torch.from_numpy(array.astype(kind, copy=False))


def _facts(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    array = read_array(archive, "provenance", str(path), _MOST_TEXT)
    facts = json.loads(str(array)) if array.dtype.kind == "U" and array.shape == () else None
    if not isinstance(facts, dict) or not isinstance(facts.get("features", {}), dict):
        raise CorruptFileError(f"{path}: provenance is no JSON object; make the file again")
    return facts


def _check_moments(path: Path, mean: Tensor, covariance: Tensor) -> None:
    size = len(mean) if mean.dim() == 1 else 0
    if not size or covariance.shape != (size, size):
        shapes = f"{tuple(mean.shape)} and {tuple(covariance.shape)}"
        raise CorruptFileError(f"{path}: mu and sigma of shapes {shapes}; needs (d,) and (d, d)")
    scale = covariance.abs().max()
    skew, least = (covariance - covariance.T).abs().max(), covariance.diagonal().min()
    if skew > _TOLERANCE * scale or least < -_TOLERANCE * scale:
        raise CorruptFileError(f"{path}: sigma is no covariance (not symmetric, or a negative variance)")
