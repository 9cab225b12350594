"""What a checkpoint costs training: ours is copied in memory and then written beside training, the first thought writes it while training waits.

    python -m benchmarks.checkpoints --scratch DIR --pairs 9

One Ray Train worker trains ResNet-34, everything unfrozen, with Adam: 85 MB of weights, 170 MB of moments. Three kinds of rounds take turns, each of
a few steps on random patches: without a checkpoint, with one as `ray_jobs.train` makes it, and with one that is written and synced before the steps
go on. Prints how long training waits for each kind, the part that this is (goal: ours at most a quarter of the other, met where the interval reaches
it), and the rounds' lengths beside those without: on a machine whose cores are all taken by training, writing beside it takes time from it too. Ends
with exit code 1 where the goal is missed.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ratios import median_of

GOAL = 0.25


def rounds(given: dict[str, Any]) -> dict[str, list[float]]:
    """Ray Train's per-worker function: the seconds of each kind of round."""

    from benchmarks.train_gpu import random_patches
    from ray_jobs.checkpoint_writers import CheckpointWriter, _Copy
    from sentinode.config import TrainConfig
    from sentinode.ingest import ResidentRows
    from sentinode.learner import Learner
    from sentinode.locations import locate
    from sentinode.model import build_model
    from sentinode.training import Progress, train_epochs
    from sentinode.worker import set_up_worker

    set_up_worker(1)
    folder = Path(given["folder"])
    config = TrainConfig(weights="none", unfreeze_depth=5, input_size_px=96, batch_size=32, epochs=10**6, early_stopping_patience_epochs=None)
    patches = random_patches(given["steps"] * config.batch_size, 0)
    val = patches.take(np.array([0, 3]))
    learner, source = Learner(build_model(config.arch), config), ResidentRows(patches, "cpu")
    progress = Progress()
    writer = CheckpointWriter(locate(folder), "1", config, "resident", 0, 1, 0)

    def steps() -> None:
        until = config.model_copy(update={"epochs": progress.epochs_done + 1})
        train_epochs(learner, source, val, until, progress)

    def in_turn(number: int) -> None:
        about = {"number": number, "world_size": 1, "ingest": "resident", "progress": asdict(progress)}
        _Copy.of(learner, 0, about).write(locate(folder), "1", locate(folder / f"waited_{number}"))

    kinds = {"none": lambda number: None, "ours": lambda number: writer.save(learner, progress), "waiting": in_turn}
    seconds: dict[str, list[float]] = {name: [] for kind in kinds for name in (kind, f"{kind} waits")}
    steps()
    for number in range(given["pairs"]):
        for kind in sorted(kinds, reverse=bool(number % 2)):
            started = time.monotonic()
            kinds[kind](number)
            seconds[f"{kind} waits"].append(time.monotonic() - started)
            steps()
            seconds[kind].append(time.monotonic() - started)
            writer._written.wait()  # what is still being written belongs to no other round
    return seconds


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", required=True, type=Path, help="folder on the disk to write to; what is made there stays")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="steps of a round")
    args = parser.parse_args()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from ray_jobs.cluster import connected
    from ray_jobs.run_folder import REQUEST_FILE

    folder = args.scratch.resolve() / f"checkpoints-{os.getpid()}"
    folder.mkdir(parents=True)
    (folder / REQUEST_FILE).write_text(json.dumps({"id": "1"}))
    with connected(1):
        trainer = TorchTrainer(
            rounds,
            train_loop_config={"folder": str(folder), "steps": args.steps, "pairs": args.pairs},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name=folder.name, storage_path=str(folder.parent), checkpoint_config=CheckpointConfig(num_to_keep=2)),
        )
        seconds = trainer.fit().return_value
    for kind in ("ours", "waiting"):
        longer = median_of([with_one / without for with_one, without in zip(seconds[kind], seconds["none"], strict=True)])
        waits = median_of(seconds[f"{kind} waits"]).value
        print(f"{kind}: training waits {waits:.2f} s; a round of {median_of(seconds['none']).value:.1f} s takes {longer} times as long")
    part = median_of([ours / other for ours, other in zip(seconds["ours waits"], seconds["waiting waits"], strict=True)])
    met = part.low <= GOAL
    print(f"training waits for ours {part} of the time that it waits for the other; goal {GOAL}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
