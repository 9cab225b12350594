"""How fast training is on a GPU, and how much of that the input costs. Needs no Ray.

    python -m benchmarks.train_gpu                             # random patches, as many as the whole Kaggle set has for training and validation
    python -m benchmarks.train_gpu --data out/data             # a prepared data set
    python -m benchmarks.train_gpu --device cpu --rows 128 --val-rows 16 --steps 2 --pairs 6 --sizes 32     # the code path, wherever

For 224 and 96 px and unfreeze_depth 1 and 5, default augmentation and precision: images/s of training, and the ratio to a ceiling, in turns: the same
loop with a source that hands out the same batch on the device again and again. Goal: the interval of the ratio reaches 0.95. Then, with --full, the
run that counts: 15 epochs over all rows with validation after each, 224 px, depth 1. Goal on one H200: under 300 s. Ends with exit code 1 where one
is missed.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.ratios import median_of
from sentinode.config import TrainConfig
from sentinode.dataset import Patches, PreparedDataset
from sentinode.epoch_plan import IntArray
from sentinode.ingest import ResidentRows, RowSource, StreamedRows
from sentinode.learner import Learner
from sentinode.model import build_model
from sentinode.training import Group, Progress, train_epochs

# Of the whole Kaggle set, 220,025 patches, split 70/15/15.
FULL_ROWS, FULL_VAL_ROWS = 154_017, 33_004
GOAL_OF_CEILING = 0.95
GOAL_FULL_SECONDS = 300.0


class MockRows:
    """A source that costs nothing: the ceiling."""

    def __init__(self, source: RowSource, batch_size: int) -> None:
        self.labels = source.labels
        self._source = source
        # A copy: a source may use the memory of its batches again.
        largest = min(batch_size + batch_size // 4, len(source.labels))
        self._batch = next(iter(source.batches([np.arange(largest)]))).clone()

    def order(self, seed: int, epoch: int, world_size: int, batch_size: int) -> IntArray:
        """As the real source's."""
        return self._source.order(seed, epoch, world_size, batch_size)

    def batches(self, rows: Sequence[IntArray]) -> Iterator[torch.Tensor]:
        """The same pixels for every batch."""
        for batch in rows:
            yield self._batch[: len(batch)]

    def close(self) -> None:
        """Nothing to give back."""


def random_patches(rows: int, seed: int) -> Patches:
    """Patches of noise: what is in them does not change how long they take."""
    generator = np.random.default_rng(seed)
    images = np.frombuffer(generator.bytes(rows * 96 * 96 * 3), np.uint8).reshape(rows, 96, 96, 3)
    return Patches(np.arange(rows).astype(np.str_), np.arange(rows) % 5 // 3, np.arange(rows).astype(np.str_), images)


def make_learner(config: TrainConfig, device: torch.device) -> Learner:
    """A learner of random weights: their values do not change how long they take."""
    torch.manual_seed(0)
    return Learner(build_model(config.arch), config, device=device)


def epoch_seconds(learner: Learner, source: RowSource, val: Patches, progress: Progress, group: Group) -> dict[str, Any]:
    """Train one more epoch and return its record; its seconds end when the device has done the work."""
    until = learner.config.model_copy(update={"epochs": progress.epochs_done + 1})
    train_epochs(learner, source, val, until, progress, group=group)
    return progress.history[-1]


def against_ceiling(config: TrainConfig, source: RowSource, rows: int, val: Patches, group: Group, pairs: int) -> bool:
    """Print images/s and the ratio to the ceiling; return whether the goal is met."""
    sides = {"real": source, "ceiling": MockRows(source, config.batch_size)}
    learner = make_learner(config, group.device)
    progress = Progress()
    first = epoch_seconds(learner, source, val, progress, group)["first_batch_seconds"]
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name in sorted(sides, reverse=bool(pair % 2)):
            seconds[name].append(epoch_seconds(learner, sides[name], val, progress, group)["seconds"])
    ratio = median_of([ceiling / real for ceiling, real in zip(seconds["ceiling"], seconds["real"], strict=True)])
    speed = rows / median_of(seconds["real"]).value
    met = ratio.high >= GOAL_OF_CEILING
    print(
        f"{config.input_size_px} px, depth {config.unfreeze_depth}, batch {config.batch_size}: {speed:,.0f} images/s; {ratio} of the ceiling, "
        f"goal {GOAL_OF_CEILING}: {'met' if met else 'MISSED'}; first batch {first:.2f} s",
        flush=True,
    )
    return met


def full_run(config: TrainConfig, train: Patches, val: Patches, group: Group) -> bool:
    """Print the seconds of 15 epochs of rows in memory, with their way to the device and validation; return whether the goal is met."""
    learner = make_learner(config, group.device)
    started = time.monotonic()
    source, progress = ResidentRows(train, group.device), Progress()
    train_epochs(learner, source, val, config.model_copy(update={"epochs": 15, "early_stopping_patience_epochs": None}), progress, group=group)
    seconds = time.monotonic() - started
    source.close()
    met = seconds < GOAL_FULL_SECONDS
    training, validation = (sum(record[key] for record in progress.history) for key in ("seconds", "val_seconds"))
    print(
        f"15 epochs of {len(source.labels):,} + {len(val):,} patches, {config.input_size_px} px, depth {config.unfreeze_depth}, "
        f"batch {config.batch_size}, without checkpoints and the start of Ray: {seconds:.0f} s "
        f"({training:.0f} s training, {validation:.0f} s validation); goal {GOAL_FULL_SECONDS:.0f} s: {'met' if met else 'MISSED'}"
    )
    return met


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a prepared data set; without it random patches")
    parser.add_argument("--rows", type=int, default=FULL_ROWS, help="random patches to train on")
    parser.add_argument("--val-rows", type=int, default=FULL_VAL_ROWS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ingest", choices=["resident", "stream"], default="resident", help="stream needs --data")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 96])
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100, help="steps of one measurement")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--full", action="store_true", help="also the run of 15 epochs")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; --device cpu runs the same code on small numbers")
    if args.ingest == "stream" and not args.data:
        parser.error("--ingest stream needs --data")
    group = Group(device=torch.device(args.device))
    if args.data:
        dataset = PreparedDataset.open(args.data)
        train, val = dataset.read_train_and_val(None)
    else:
        train, val = random_patches(args.rows, 0), random_patches(args.val_rows, 1)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.ingest}, {len(train):,} + {len(val):,} patches", flush=True)
    met = []
    few = val.take(np.array([int(np.flatnonzero(val.labels == label)[0]) for label in (0, 1)]))
    shared: dict[str, Any] = {"weights": "none", "batch_size": args.batch_size, "schedule": "constant", "compile": args.compile}
    for size in args.sizes:
        for depth in args.depths:
            config = TrainConfig(input_size_px=size, unfreeze_depth=depth, early_stopping_patience_epochs=None, epochs=10**6, **shared)
            rows = min(len(train), args.steps * args.batch_size)
            if args.ingest == "stream":
                source: RowSource = StreamedRows(dataset, None, group.device, config.stream_window_rows)
                rows = len(source.labels)
            else:
                source = ResidentRows(train.take(np.arange(rows)), group.device)
            met.append(against_ceiling(config, source, rows, few, group, args.pairs))
            source.close()
    if args.full:
        met.append(full_run(TrainConfig(weights="none", unfreeze_depth=1, batch_size=args.batch_size, compile=args.compile), train, val, group))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
