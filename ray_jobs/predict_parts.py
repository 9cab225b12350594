"""One part of the predictions, made in an actor: read and decode ahead of the network, decide, write, note that the part is whole.

The work for one plan lies in a folder of its own below the staging folder, named by the plan's digest, so that an actor that outlives its
driver cannot write into the work of another plan:

    <out>.staging/<digest>/plan.json, inputs.parquet           what is to be done; a row group of inputs per part
    <out>.staging/<digest>/part-00000.json                     note: that part is whole; made after the part has its name
    <out>.staging/<digest>/data/part-00000.parquet             what will be published, and nothing else

In an object store nothing can be renamed, so parts are written to where they stay, beside the rest of the work, which is removed in the end:

    <out>/_work/plan.json, inputs.parquet, part-00000.json     readers of Parquet folders pass over what begins with "_"
    <out>/part-00000.parquet
"""

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from data_prep.decode import read_patches
from data_prep.sources.base import Reader
from data_prep.sources.detect import reader_of
from sentinode.errors import SentinodeError
from sentinode.images import UInt8Array
from sentinode.locations import Location, locate
from sentinode.manifests import Manifest, PredictionPart
from sentinode.predictor import Predictor
from sentinode.probability import Decision
from sentinode.storage import json_bytes

PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("path", pa.string()),
        pa.field("logit", pa.float64()),
        pa.field("probability", pa.float64()),
        pa.field("prediction", pa.string()),
        pa.field("needs_review", pa.bool_()),
        pa.field("review_reasons", pa.list_(pa.string())),
        pa.field("model_digest", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)
"""One row per input. `probability` is calibrated and of class 1; everything but id, path and model_digest is null where `error` is set."""


class PartNote(Manifest):
    """What is noted of a part once it is whole."""

    part: PredictionPart
    errors: int
    engine: str
    device: str


@dataclass(frozen=True)
class Work:
    """The folder of one plan.

    Attributes
    ----------
    folder : Location
        Of plan, inputs and notes.
    data : Location
        Of the parts.
    """

    folder: Location
    data: Location

    @classmethod
    def on_disk(cls, staging: Path, key: str) -> "Work":
        """Return the work for predictions that are published by a rename."""
        folder = locate(staging / key[:16])
        return cls(folder, folder / "data")

    @classmethod
    def in_store(cls, out: Location) -> "Work":
        """Return the work for predictions in an object store."""
        return cls(out / "_work", out)

    @property
    def plan(self) -> Location:
        """The plan in words, written last when the work is begun."""
        return self.folder / "plan.json"

    @property
    def inputs(self) -> Location:
        """INPUT_SCHEMA, a row group per part."""
        return self.folder / "inputs.parquet"

    def part(self, unit: int) -> Location:
        """The file of one part."""
        return self.data / f"part-{unit:05d}.parquet"

    def note(self, unit: int) -> Location:
        """The note of one part."""
        return self.folder / f"part-{unit:05d}.json"

    def _holds(self, unit: int, part: PredictionPart) -> bool:
        file = self.part(unit)
        # What is put into a store is there whole or not at all, and reading it again would cost more than making it.
        return hashlib.sha256(file.read_bytes()).hexdigest() == part.sha256 if file.is_local else file.size() == part.bytes

    def whole_part(self, unit: int, engine: str, device: str) -> PartNote | None:
        """Return the note of a part that is whole and was made by this engine on this kind of device, since others round differently; else None."""
        try:
            note = PartNote.model_validate_json(self.note(unit).read_bytes())
            is_whole = (note.engine, note.device) == (engine, device) and self._holds(unit, note.part)
        except (OSError, ValidationError):
            return None
        return note if is_whole else None


def predict_part(work: Work, reader: Mapping[str, Any], batch_size: int, threads: int, bundle: str, predictor: Predictor, unit: int) -> pa.Table:
    """Predict one part, write it and its note; returns one row: part, rows, and when it was begun and ended (seconds of the wall clock).

    Raises
    ------
    SentinodeError
        The network's answer is not a number.
    StorageError
        The storage of the inputs does not answer.
    ManifestError
        The data set that is read is damaged.
    """
    begun = time.time()
    with work.inputs.open_input() as file:
        inputs = pq.ParquetFile(file).read_row_group(unit)
    outcomes: list[Decision | str | None] = inputs["error"].to_pylist()
    slices = _read_ahead(reader_of(reader), inputs, predictor.manifest.patch_size_px, batch_size, threads)
    for images, rows in full_batches(slices, outcomes, batch_size):
        try:
            decisions = predictor.decide(images, batch_size)
        except SentinodeError as error:
            raise SentinodeError(f"{bundle}: {error}") from error
        for row, decision in zip(rows, decisions, strict=True):
            outcomes[row] = decision
    _write(work, unit, predictor, inputs, outcomes)
    return pa.table({"unit": [unit], "rows": [len(inputs)], "begun": [begun], "ended": [time.time()]})


@dataclass(frozen=True)
class Slice:
    """Some inputs of a part, read and decoded.

    Attributes
    ----------
    images : ndarray of uint8, shape (n, side, side, 3), RGB
    rows : list of int, length n
        Place of each in the part.
    errors : dict of int to str
        Place of an input that is no patch -> why.
    """

    images: UInt8Array
    rows: list[int]
    errors: dict[int, str] = field(default_factory=dict)


def full_batches(slices: Iterable[Slice], outcomes: list[Any], batch_size: int) -> Iterator[tuple[UInt8Array, list[int]]]:
    """Yield images and their rows, `batch_size` at a time but for the last ones; errors on the way are written into `outcomes`."""
    images: list[UInt8Array] = []
    rows: list[int] = []
    for found in slices:
        for row, error in found.errors.items():
            outcomes[row] = error
        if not found.rows:
            continue
        images.append(found.images)
        rows += found.rows
        while len(rows) >= batch_size:
            joined = images[0] if len(images) == 1 else np.concatenate(images)
            yield joined[:batch_size], rows[:batch_size]
            images, rows = [joined[batch_size:]] if len(joined) > batch_size else [], rows[batch_size:]
    if rows:
        yield np.concatenate(images), rows


def _read_ahead(reader: Reader, inputs: pa.Table, size_px: int, batch_size: int, threads: int) -> Iterator[Slice]:
    """Yield the inputs that can be read, a batch's number at a time; each of `threads` threads is one such slice ahead, so memory is bounded."""
    readable = np.flatnonzero(pc.is_null(inputs["error"]).to_numpy())
    with ThreadPoolExecutor(threads, "sentinode-decode") as pool:
        ahead: deque[Future[Slice]] = deque()
        for first in range(0, len(readable), batch_size):
            ahead.append(pool.submit(_read_slice, reader, inputs, readable[first : first + batch_size].tolist(), size_px))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _read_slice(reader: Reader, inputs: pa.Table, rows: list[int], size_px: int) -> Slice:
    entries = inputs.take(rows).combine_chunks()
    images = np.empty((len(rows), size_px, size_px, 3), np.uint8)
    accepted: list[int] = []
    errors: dict[int, str] = {}
    places = iter(rows)
    for found, reasons, details in read_patches(reader, entries, size_px):
        images[len(accepted) : len(accepted) + len(found)] = found
        # The longer one last: zip asks the first one first, and must not take a place that it then cannot use.
        for reason, detail, place in zip(reasons, details, places, strict=False):
            if reason is None:
                accepted.append(place)
            else:
                errors[place] = f"{reason}: {detail}"
    return Slice(images[: len(accepted)], accepted, errors)


def _write(work: Work, unit: int, predictor: Predictor, inputs: pa.Table, outcomes: list[Decision | str | None]) -> None:
    rows = []
    for id_, path, outcome in zip(inputs["id"].to_pylist(), inputs["shown"].to_pylist(), outcomes, strict=True):
        row: dict[str, Any] = {"id": id_, "path": path, "model_digest": predictor.manifest.digest}
        if isinstance(outcome, Decision):
            row |= {"logit": outcome.logit, "probability": outcome.probability, "prediction": outcome.prediction}
            row |= {"needs_review": outcome.needs_review, "review_reasons": list(outcome.review_reasons)}
        else:
            row["error"] = outcome
        rows.append(row)
    part, buffer = work.part(unit), BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA), buffer)
    data = buffer.getvalue()
    part.write_bytes(data)
    note = PartNote(
        part=PredictionPart(rows=len(rows), path=part.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),
        errors=sum(not isinstance(outcome, Decision) for outcome in outcomes),
        engine=predictor.engine,
        device=predictor.device,
    )
    work.note(unit).write_bytes(json_bytes(note.model_dump(mode="json")))
