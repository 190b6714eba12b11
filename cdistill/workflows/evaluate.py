"""Students, teachers and images measured, compared on the same seeds, records measured again, statistics of data."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import TypeAdapter

from cdistill.data import Source, load_source
from cdistill.errors import CdistillError, CorruptFileError, RecipeError
from cdistill.evaluation.comparison import Repetition, compare, repetition
from cdistill.evaluation.evaluator import Evaluator
from cdistill.evaluation.features import load_features
from cdistill.evaluation.metrics import SampleSet
from cdistill.evaluation.pipeline import evaluate_networks, save_evaluation
from cdistill.evaluation.records import IMAGES, Comparisons, Evaluation, to_json
from cdistill.evaluation.references import file_facts, measure, write_statistics
from cdistill.networks.classes import Classes
from cdistill.runtime.console import rescuing, say
from cdistill.runtime.processes import versions
from cdistill.sampling.samplers import SamplerChoice
from cdistill.storage.bounded import read_bytes
from cdistill.storage.files import check_place, write_text
from cdistill.training.loop import make_accelerator
from cdistill.workflows.targets import LoadedTarget, Target, check_words, load_target

_USUAL = ("nfe", "samples", "split")  # changes that the name of a record shows
DEFAULT = SamplerChoice()
_NOTHING = Target()
_REQUEST = TypeAdapter(tuple[Target, SamplerChoice])


def evaluate(
    target: Target | Path | str, choice: SamplerChoice = DEFAULT, out: Path | None = None, **changes: Any
) -> Evaluation:
    """Measures a run's student, a converted student, a teacher, or images; writes the record beside it.

    Args:
        target: What to measure; of a run or a file its path is enough.
        choice: The student's sampler; without times, at each NFE of the evaluation section.
        out: File of the record, .json; beside what is measured by default.
        **changes: Values in place of those of the evaluation section: ``nfe=[2, 3]``, ``samples=1000``.

    Returns:
        The figures with their intervals, as `table()` and `to_dict()`; `path` is the record.

    Raises:
        RecipeError: Options that contradict each other, or that nothing would read.
        CdistillError: Files are missing or damaged, or the record cannot be written.

    >>> evaluation = evaluate(Target(teacher="mixture-1d"), samples=64)
    >>> [(row.sampler, row.nfe) for row in evaluation.rows]
    [('teacher (Heun)', 34)]
    """
    asked = target if isinstance(target, Target) else Target(str(target))
    asked = replace(asked, changes={**asked.changes, **changes})
    loaded = load_target(asked)
    _check_options([loaded], choice)
    return _measure(loaded, choice, make_accelerator("fp32"), out or _place(loaded, choice))


def evaluate_together(
    targets: Sequence[Target], choice: SamplerChoice = DEFAULT, out: Path | None = None
) -> Comparisons:
    """Measures several targets and compares the others with the first, on the same seeds.

    Args:
        targets: What to measure.
        choice: The students' sampler, see `evaluate`.
        out: File of the comparison; beside the first's results by default.

    Raises:
        RecipeError: Targets that cannot be compared; or as `evaluate`.
    """
    loaded = [load_target(target) for target in targets]  # all, before the first is measured
    _check_options(loaded, choice)
    _check_common(loaded, choice)
    accelerator = make_accelerator("fp32")
    places = [_place(target, choice, out, k) for k, target in enumerate(loaded)]
    written = out or loaded[0].folder / f"comparison-{_digest([asdict(part) for part in targets])}.json"
    for place in (*places, written):
        check_place(place)
    evaluations = [_measure(target, choice, accelerator, place) for target, place in zip(loaded, places, strict=True)]
    pairs = [compare(evaluations[0], other) for other in evaluations[1:]]
    comparisons = Comparisons(comparisons=pairs, records=evaluations)
    comparisons._path = written
    if accelerator.is_main_process:
        with rescuing(comparisons.table()):
            write_text(written, to_json(comparisons))
    return comparisons


def check_record(path: Path, given: Target = _NOTHING) -> Repetition:
    """Measures again what a record describes, and compares every figure with it; writes nothing.

    Args:
        path: The record.
        given: What the person says in place of the record: code and paths, believed of one's own records alone.

    Raises:
        MissingAssetError: No such record, or something that it names is gone.
        CorruptFileError: It is no record, or one without the request that is needed to repeat it.
        RecipeError: Version 0.1 made it with an option that is gone; or it was not written here and names code, or a
            path outside of its folder.
    """
    before = Evaluation.read(path)
    target, choice = _request(path, before)
    target = check_words(path, read_bytes(path), target, given)
    now = _measure(load_target(target), choice, make_accelerator("fp32"))
    return repetition(path, before, now)


def _request(path: Path, record: Evaluation) -> tuple[Target, SamplerChoice]:
    """Returns what a record was asked for."""
    try:
        request = (record.model_extra or {})["request"]
        asked, choice = dict(request["target"]), SamplerChoice(**request["choice"])
        optimised = asked.pop("optimise", False)  # written by version 0.1
        target = Target(**asked)
        _REQUEST.validate_python((asdict(target), asdict(choice)))
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptFileError(f"{path}: not a record that can be repeated; cdistill evaluate writes one") from error
    if optimised:
        raise RecipeError(
            f"{path}: made by cdistill 0.1 with --optimise-steps, which version 0.2 no longer has; evaluate with the "
            "record's own --times"
        )
    return target, choice


def _check_options(targets: Sequence[LoadedTarget], choice: SamplerChoice) -> None:
    """Refuses options that nothing would read.

    Raises:
        RecipeError: There are such.
    """
    for target in targets:
        for options, needed in target.unread(choice):
            raise RecipeError(f"{target.title}: {', '.join(options)}: {needed}")
    if choice.times is not None and any("nfe" in target.request.changes for target in targets):
        raise RecipeError("--times: the times say how many network calls there are; leave --nfe out")
    if targets[0].request.teacher and all(target.is_run for target in targets):
        raise RecipeError(f"{targets[0].title}: a run knows its teacher and its data; leave out --teacher")


def _check_common(targets: Sequence[LoadedTarget], choice: SamplerChoice) -> None:
    """Raises RecipeError unless the others have something in common with the first that can be compared."""
    first = targets[0]
    for other in targets[1:]:
        if (first.images is None) != (other.images is None) or (first.student is None) != (other.student is None):
            raise RecipeError(
                f"{other.title}: cannot be compared with {first.title}: students go with students, images with images"
            )
        if choice.times is None and first.student and not set(first.section.nfe) & set(other.section.nfe):
            raise RecipeError(
                f"{other.title}: NFE {other.section.nfe}, {first.title} {first.section.nfe}: none in common; give --nfe"
            )


def _measure(
    target: LoadedTarget, choice: SamplerChoice, accelerator: Accelerator, out: Path | None = None
) -> Evaluation:
    """Measures one target; writes the record to `out`, if that is given, and pictures beside it."""
    if out is not None:
        check_place(out)
    target.to(accelerator.device)
    source = target.source(accelerator)
    classes = _classes(target, source)
    evaluator = Evaluator(target.section, target.shape, classes, target.teacher, source, accelerator)
    asked = replace(target.request, step=str(target.facts.get("step", target.request.step)))  # "last" may move on
    seeds = None if target.images is not None else f"{evaluator.seeds[0]}..{evaluator.seeds[-1]}"
    facts = {**target.facts, "seeds": seeds, "request": {"target": asdict(asked), "choice": asdict(choice)}}
    if target.images is not None:
        say(f"{target.title}: {len(target.images)} images")
        if source is not None and source.lossy != target.images.lossy:
            kinds = ("with losses (JPEG or the like)", "without (PNG or the like)")
            these, data = kinds if target.images.lossy else kinds[::-1]
            say(f"{target.title}: stored {these}, the data {data}: compression alone moves every distance")
        row = evaluator.measure(IMAGES, 0, SampleSet(target.images.samples[:], None, accelerator))
        evaluation = evaluator.evaluation([row], **facts, **evaluator.facts(), samplers={})
    else:
        say(f"{target.title}: {len(evaluator.seeds)} samples of seeds {seeds}")
        evaluation = evaluate_networks(evaluator, choice, target.student, target.untrained, **facts)
    return evaluation if out is None else save_evaluation(evaluator, evaluation, out.parent, out.stem)


def _place(target: LoadedTarget, choice: SamplerChoice, out: Path | None = None, number: int = 0) -> Path:
    """Returns where a record goes: beside what is measured, or beside `out` if nothing can be written there."""
    place = target.folder / f"{_name(target, choice)}.json"
    try:
        check_place(place)
    except CdistillError:
        return place if out is None else out.with_name(f"{out.stem}-{number}-{place.name}")
    return place


def _classes(target: LoadedTarget, source: Source | None) -> Classes:
    """Returns the classes to draw, as the network knows them, or else as the data to compare with have them."""
    if target.network is None:
        return Classes()
    known = target.network.known_classes
    unknown = known == Classes.unknown(len(known))
    return source.classes if unknown and source is not None and len(source.classes) == len(known) else known


def _name(target: LoadedTarget, choice: SamplerChoice) -> str:
    """Returns the name of a record: what was measured, and a digest of what is unusual about how."""
    section, request = target.section, target.request
    step = target.facts.get("step")
    what = f"step{step}" if step is not None else Path(request.path or f"teacher-{request.teacher}").name
    calls = f"-nfe{'-'.join(map(str, section.nfe))}" if target.student is not None else ""
    name = f"evaluation-{what}-{section.split}{section.samples}{calls[:40]}"
    if step is None:
        return f"{name}-{_digest([asdict(request), asdict(choice)])}"
    unusual = {key: value for key, value in request.changes.items() if key not in _USUAL}
    if not (unusual or len(calls) > 40) and choice == DEFAULT:
        return name
    return f"{name}-{_digest([unusual, asdict(choice), section.nfe])}"


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def write_reference(data: str, split: str, features: str, keep: int, out: Path) -> dict[str, Any]:
    """Writes the statistics of real data, for `evaluate` and for EDM's own fid.py.

    Args:
        data: A data source, or the path of one.
        split: Its split.
        features: The feature network, see `load_features`.
        keep: How many feature vectors the file holds beside the moments.
        out: The .npz.

    Returns:
        What the file is and where its numbers come from, as JSON.

    Raises:
        CdistillError: The network does not take such data.
        MissingAssetError: Its weights, or the data, are missing.
    """
    source, network = load_source(data, split), load_features(features)
    network.check(source.shape)
    accelerator = make_accelerator("fp32")
    statistics = measure(source, network, keep, accelerator)
    kept = None if not keep else statistics.features
    record = {
        "schema": 1,
        "data": {"name": source.name, "split": split, "count": len(source), "sha256": source.digest},
        "features": {
            "name": network.name,
            "sha256": network.digest,
            "dimensions": len(statistics.mean),
            "kept": 0 if kept is None else len(kept),
        },
        "images": "uint8, as the data have them; not mirrored",
        "moments": "float64, unbiased covariance",
        "device": str(accelerator.device),
        "versions": versions(),
    }
    if accelerator.is_main_process:
        write_statistics(out, replace(statistics, features=kept, facts=record))
    accelerator.wait_for_everyone()
    return {**file_facts(out), **record}
