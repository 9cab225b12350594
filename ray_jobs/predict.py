"""Run a bundle over images: a folder, an archive, a table, HDF5 files or a prepared data set, local or s3://.

    python -m ray_jobs.predict --bundle out/run/bundle --source folder/of/patches --out out/predictions.parquet
    python -m ray_jobs.predict --bundle out/run/bundle --source kaggle/test --out out/test.parquet --submission out/submission.csv

Writes a folder of Parquet parts with a _manifest.json. An image that cannot be read is a row with `error`, never a lost row. Killed at any moment,
the same command continues with the parts that are not there yet.
"""

import argparse
import csv
import hashlib
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_jobs.cluster import connected, wants_gpus
from ray_jobs.inference import run_units
from ray_jobs.predict_inputs import Inputs, open_inputs
from ray_jobs.predict_parts import PREDICTION_SCHEMA, PartNote, Work, predict_part
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode import RESEARCH_USE_NOTICE, __version__
from sentinode.bundle import Bundle
from sentinode.config import PredictConfig
from sentinode.engines import choose_engine
from sentinode.errors import ManifestError, SentinodeError, StorageError, UsageError
from sentinode.locations import Location, locate
from sentinode.manifests import PREDICTIONS_FORMAT_VERSION, PredictionsManifest, read_predictions_manifest
from sentinode.sole_writer import sole_writer
from sentinode.storage import canonical_json, exclusive, json_bytes, publish, sha256_file, staging_path, temporary_name
from sentinode.versions import git_commit, library_versions

__all__ = ["PREDICTION_SCHEMA", "PredictResult", "main", "predict", "write_submission"]

_PLAN_FORMAT = 1
"""Raised whenever what an interrupted run left must not be continued by a newer program."""
_LISTED_EXAMPLE_CHARACTERS = 200


@dataclass(frozen=True)
class PredictResult:
    """Where the predictions lie, and their manifest.

    Attributes
    ----------
    path : Location
    manifest : PredictionsManifest
    already_complete : bool
        They were there, and nothing was done.
    predicted : int
        Inputs that this run has done; an interrupted one may have done the others.
    seconds : float
        From the beginning of this run's first part to the end of its last: without the start of Ray and of the network. 0 where nothing was done.
    """

    path: Location
    manifest: PredictionsManifest
    already_complete: bool = False
    predicted: int = 0
    seconds: float = 0.0


def predict(config: PredictConfig, bundle: str | Path, source: str | Path | Location, out: str | Path, *, verbose: bool = False) -> PredictResult:
    """Predict every input of `source` (`predict_inputs.open_inputs`); labels are ignored. A repeated call continues, or finds its work done.

    Raises
    ------
    ManifestNotFoundError, ManifestError
        `bundle` is not a bundle, or is damaged; or the data set is.
    UsageError
        `source` holds no inputs or patches of another size than the bundle accepts, or `out` holds something else.
    StorageError
        The storage does not answer; the same call continues later.
    SentinodeError
        The work failed, e.g. the network's answer is not a number. Nothing was published.
    """
    model, target = Bundle.open(bundle), locate(out)
    if not (target / "_manifest.json").exists() and not _may_be_begun(target):
        raise UsageError(f"{target} exists; remove it or use another --out")
    inputs = open_inputs(source if isinstance(source, Location) else str(source))
    accepted = model.manifest.patch_size_px
    if inputs.patch_size_px not in (None, accepted):
        raise UsageError(f"{inputs.where} holds patches of {inputs.patch_size_px} px; the bundle accepts {accepted} px")
    plan = _plan(config, model, inputs)
    key = hashlib.sha256(canonical_json(plan)).hexdigest()
    if (manifest := _finished(target, key)) is not None:
        _clear_up(target)
        return PredictResult(target, manifest, already_complete=True)
    with sole_writer(target, say) as confirm_sole_writer:
        if (manifest := _finished(target, key)) is not None:  # another process may have finished it since
            return PredictResult(target, manifest, already_complete=True)
        with connected(config.workers * config.cpus_per_worker, verbose=verbose):
            if target.is_local:
                work = _open_work_on_disk(staging_path(target.local), key, plan, inputs, config)
            else:
                work = _open_work_in_store(target, plan, inputs, config)
            notes, predicted, seconds = _predict_parts(work, model, inputs, config)
        rows = sum(note.part.rows for note in notes)
        if rows != len(inputs):
            raise SentinodeError(f"{rows} predictions for {len(inputs)} inputs; nothing was published")
        manifest = PredictionsManifest(
            format_version=PREDICTIONS_FORMAT_VERSION,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            source=str(inputs.where),
            rows=rows,
            errors=sum(note.errors for note in notes),
            model={
                "name": model.manifest.name,
                "version": model.manifest.version,
                "digest": model.manifest.digest,
                "engine": notes[0].engine,
            },
            parts=[note.part for note in notes],
            plan_sha256=key,
            notice=RESEARCH_USE_NOTICE,
            config=config.model_dump(mode="json"),
            library_versions=library_versions(),
            git_commit=git_commit(),
        )
        confirm_sole_writer()
        _publish(work, manifest, target)
    return PredictResult(target, manifest, predicted=predicted, seconds=seconds)


def _may_be_begun(target: Location) -> bool:
    """Tell whether there is nothing at `target`, or in a store what an interrupted run left."""
    if not target.exists():
        return True
    work = Work.in_store(target)
    return not target.is_local and (work.plan.exists() or {entry.name for entry in target.entries()} == {work.folder.name})


def _plan(config: PredictConfig, model: Bundle, inputs: Inputs) -> dict[str, Any]:
    """Return all that decides what the parts hold; parts of equal plans may stand side by side."""
    exported = sorted(model.path.rglob("engine.json"))
    return {
        "plan_format": _PLAN_FORMAT,
        "sentinode": __version__,
        "source": str(inputs.where),
        "inputs": inputs.sha256,
        "bundle": model.manifest.digest,
        # What `auto` chooses depends on what is there.
        "engines": {str(file.parent.relative_to(model.path)): sha256_file(file) for file in exported},
        # Not workers: whichever actor makes a part, it is the same. Threads and the size of batches decide how sums are rounded.
        **config.model_dump(mode="json", exclude={"workers", "use_gpu"}),
    }


def _finished(target: Location, key: str) -> PredictionsManifest | None:
    """Return the manifest of predictions of this plan at `target`, None if there is nothing.

    Raises
    ------
    UsageError
        Something else is there.
    """
    if not (target / "_manifest.json").exists():
        return None
    manifest = read_predictions_manifest(target)
    if manifest.plan_sha256 != key:
        raise UsageError(f"{target} exists and holds predictions of other inputs, another bundle or other settings; remove it or use another --out")
    for part in manifest.parts:
        file = target / part.path
        try:
            is_whole = file.size() == part.bytes
        except FileNotFoundError:
            is_whole = False
        if not is_whole:
            raise ManifestError(f"{file}: is missing or damaged; remove {target} and repeat the command")
    return manifest


def _clear_up(target: Location) -> None:
    """Remove what a run left that was killed between publishing and the end."""
    if not target.is_local:
        _remove_work(target)
    elif (staging := staging_path(target.local)).exists():
        with suppress(UsageError), exclusive(target.local):
            shutil.rmtree(staging, ignore_errors=True)


def _remove_work(target: Location) -> None:
    work = Work.in_store(target).folder
    with suppress(OSError, StorageError):
        work.remove_tree()


def _open_work_on_disk(staging: Path, key: str, plan: dict[str, Any], inputs: Inputs, config: PredictConfig) -> Work:
    """Keep what an interrupted run of the same plan left, remove anything else; returns the folder, ready for parts."""
    work = Work.on_disk(staging, key)
    if work.plan.exists():
        for leftover in work.folder.local.rglob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        return work
    if staging.exists():
        say(f"starting anew: {staging} holds unfinished work of another command{_difference(staging.glob('*/plan.json'), plan)}")
        shutil.rmtree(staging)
    work.data.local.mkdir(parents=True)
    _begin(work, plan, inputs, config)
    return work


def _open_work_in_store(target: Location, plan: dict[str, Any], inputs: Inputs, config: PredictConfig) -> Work:
    """As on disk, but work of another plan is refused: its parts lie where the predictions will."""
    work = Work.in_store(target)
    if not work.plan.exists():
        _begin(work, plan, inputs, config)
    elif canonical_json(json.loads(work.plan.read_bytes())) != canonical_json(plan):
        differs = _difference([work.plan], plan)
        raise UsageError(f"{target}: holds unfinished work of another command{differs}; remove it or use another --out")
    return work


def _begin(work: Work, plan: dict[str, Any], inputs: Inputs, config: PredictConfig) -> None:
    buffer = io.BytesIO()
    pq.write_table(inputs.table, buffer, row_group_size=config.rows_per_part)
    work.inputs.write_bytes(buffer.getvalue())
    work.plan.write_bytes(json_bytes(plan))


def _publish(work: Work, manifest: PredictionsManifest, target: Location) -> None:
    """Write the manifest, which makes predictions of the parts."""
    data = json_bytes(manifest.model_dump(mode="json"))
    if not target.is_local:
        (target / "_manifest.json").write_bytes(data)
        _remove_work(target)
        return
    # Of an actor that outlived its driver, for instance.
    for leftover in work.data.local.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    (work.data / "_manifest.json").write_bytes(data)
    publish(work.data.local, target.local)
    shutil.rmtree(staging_path(target.local), ignore_errors=True)


def _difference(plans: Iterable[Path | Location], plan: dict[str, Any]) -> str:
    """Say in brackets what in a plan differs from the one that unfinished work was begun with; "" where that cannot be read."""
    for file in plans:
        with suppress(OSError, ValueError):
            old = json.loads(file.read_bytes())
            return f" (other {', '.join(name for name in plan if old.get(name) != plan[name])})"
    return ""


def _predict_parts(work: Work, model: Bundle, inputs: Inputs, config: PredictConfig) -> tuple[list[PartNote], int, float]:
    """Make the parts that are not whole; returns the notes of all, and how many inputs were done in how many seconds."""
    parts = -(-len(inputs) // config.rows_per_part)
    use_gpu = wants_gpus(config.use_gpu, min(config.workers, parts))
    device = "cuda" if use_gpu else "cpu"
    # Chosen before looking: what `auto` finds depends on the libraries that are installed here today.
    engine = choose_engine(model, config.engine, device)
    whole = {unit: note for unit in range(parts) if (note := work.whole_part(unit, engine, device)) is not None}
    missing = [unit for unit in range(parts) if unit not in whole]
    if whole:
        say(f"continuing: {len(whole)} of {parts} parts are whole")
    if not missing:
        return [whole[unit] for unit in range(parts)], 0, 0.0
    done = run_units(
        model,
        missing,
        partial(predict_part, work, dict(inputs.reader), config.batch_size, config.cpus_per_worker, str(model.where)),
        config.model_copy(update={"use_gpu": use_gpu, "engine": engine}),
        "predict",
        lambda finished: say(f"predict: {len(whole) + finished}/{parts} parts"),
    )
    for unit in missing:
        if (note := work.whole_part(unit, engine, device)) is None:
            raise SentinodeError(f"{work.part(unit)}: is not what was written there; is {work.folder} the same folder on every node?")
        whole[unit] = note
    seconds = pc.max(done["ended"]).as_py() - pc.min(done["begun"]).as_py()
    return [whole[unit] for unit in range(parts)], pc.sum(done["rows"]).as_py(), seconds


def write_submission(predictions: PredictResult, file: Location) -> None:
    """Write Kaggle's `id,label`, one line per input, `label` the calibrated probability of class 1; atomic.

    Raises
    ------
    SentinodeError
        An input has no prediction, or an id stands there twice: Kaggle takes neither. Nothing is written.
    """
    errors: list[str] = []
    repeated: list[str] = []
    seen: set[str] = set()
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "label"])
    for id_, probability, error in _rows_of(predictions, "id", "probability", "error"):
        if error is not None:
            errors.append(f"{id_} ({error})")
        elif id_ in seen:
            repeated.append(id_)
        else:
            # repr: the shortest text that reads back as the same number.
            writer.writerow([id_, repr(probability)])
        seen.add(id_)
    for found, what in ((errors, "inputs have no prediction"), (repeated, "inputs have the id of another one")):
        if found:
            raise SentinodeError(
                f"{file}: not written, since {len(found)} of {predictions.manifest.rows} {what}, first {found[0][:_LISTED_EXAMPLE_CHARACTERS]}; "
                f"Kaggle wants one line per id; the predictions are whole: {predictions.path}"
            )
    try:
        file.write_bytes(buffer.getvalue().encode())
    except OSError as error:
        raise SentinodeError(f"{file}: cannot be written ({error.strerror}); the predictions are whole: {predictions.path}") from error


def _rows_of(predictions: PredictResult, *columns: str) -> Iterator[tuple[Any, ...]]:
    for part in predictions.manifest.parts:
        with (predictions.path / part.path).open_input() as file:
            table = pq.ParquetFile(file).read(columns=list(columns))
        yield from zip(*(table[name].to_pylist() for name in columns), strict=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--bundle", required=True, metavar="BUNDLE", help="folder made by train or tune")
    parser.add_argument(
        "--source", required=True, metavar="PATH", help="images: a folder (recursive), .zip, .tar, .h5 or a table of paths; or a prepared data set"
    )
    parser.add_argument("--out", required=True, metavar="NAME.parquet", help="folder of Parquet parts to make")
    parser.add_argument("--submission", metavar="FILE.csv", help="also write Kaggle's `id,label`")
    add_common_arguments(parser, PredictConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    submission = _submission_file(args.submission) if args.submission is not None else None
    result = predict(config_from(args, PredictConfig), args.bundle, args.source, args.out, verbose=args.verbose)
    predicted = Counter(prediction or "error" for (prediction,) in _rows_of(result, "prediction"))
    if result.already_complete:
        say("already complete")
    elif result.seconds:
        say(f"{result.predicted} inputs in {result.seconds:.1f} s: {result.predicted / result.seconds:.1f}/s, the start left out")
    say(f"{result.manifest.rows} inputs: {', '.join(f'{count} {name}' for name, count in sorted(predicted.items()))}")
    say(f"engine: {result.manifest.model['engine']}\npredictions: {result.path}")
    if result.manifest.errors:
        say("column `error` says why an input could not be used")
    outcome = {
        "predictions": str(result.path),
        "engine": result.manifest.model["engine"],
        "rows": result.manifest.rows,
        "errors": result.manifest.errors,
        "already_complete": result.already_complete,
    }
    if submission is not None:
        write_submission(result, submission)
        say(f"submission: {submission}")
        outcome["submission"] = str(submission)
    return outcome


def _submission_file(text: str) -> Location:
    """Return where the submission goes; refuses before the work what could only fail after it."""
    file = locate(text)
    if file.is_dir():
        raise UsageError(f"--submission {file}: is a folder; name a file")
    if not file.is_local:
        return file
    try:
        probe = temporary_name(file.local)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--submission {file}: cannot be written ({error.strerror})") from error
    return file


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.predict") -> int:
    """Entry point of `python -m ray_jobs.predict`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
