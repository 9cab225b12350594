"""What a sweep costs beside its trainings by hand, and what halving saves of a grid.

    sentinode prepare --source kaggle/ --out out/data
    python -m benchmarks.tune --data out/data --parts overhead halving share

overhead  Wall clock of `tune` over a grid, one trial at a time, on a Ray that runs already, beside the same trainings one after the other: in one
          process that holds the rows and writes the same checkpoints (`loop`, the least that it can cost), and by the command `train` on that Ray
          (`train`). The trial's process, its import of torch, journal, report and bundle are on the sweep's clock. Goal: 1.10 of the loop.
halving   Image-steps of ASHA and of successive halving beside the whole grid, on the same points with the same seed, and the best validation ROC-AUC
          of all. Goals, of halving: at most a third of the steps, and within 0.005. Nothing is timed.

share     CPU time of trials of one depth with a finite set of looks, sharing what the frozen stages make of them, beside the same trials that
          compute it each time. Goal: 2 times less at depth 0 and at depth 1.

Sides take turns; each training has one thread. Ends with exit code 1 where a goal is missed; a goal is met where the interval of the median
reaches it.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ratios import median_of
from ray_jobs.cluster import connected
from ray_jobs.run_folder import REQUEST_FILE
from ray_jobs.sweep.lone_training import LoneTraining
from ray_jobs.train import best_checkpoint, initial_weights, train
from ray_jobs.tune import tune
from sentinode.config import SweepConfig, TrainConfig
from sentinode.dataset import Patches, PreparedDataset
from sentinode.finishing import finish_bundle
from sentinode.ingest import ResidentRows
from sentinode.locations import locate
from sentinode.storage import write_json

OVERHEAD_GOAL, STEPS_GOAL, AUC_GOAL = 1.10, 1 / 3, 0.005
# The space of tune_configs/smoke.yaml as a grid.
RATES = [1.0e-4, 2.0e-4, 4.0e-4, 7.0e-4, 1.0e-3, 1.5e-3, 2.0e-3, 3.0e-3]
BASE = {"arch": "resnet18", "weights": "none", "input_size_px": 32, "batch_size": 64, "trackers": [], "early_stopping_patience_epochs": None}


def sweep_config(rates: list[float], depths: list[int], epochs: int, **changes: Any) -> SweepConfig:
    """Return a grid over the smoke space."""
    space = {"learning_rate": {"grid": rates}, "unfreeze_depth": {"grid": depths}}
    return SweepConfig(space=space, base=BASE | {"epochs": epochs}, searcher="grid", **changes)


class _InMemory:
    """Rows that one process holds itself."""

    ingest = "resident"

    def __init__(self, dataset: PreparedDataset) -> None:
        self.train, self.val = dataset.read_train_and_val(None)

    def source(self, config: TrainConfig, device: torch.device) -> ResidentRows:
        """Return the rows to train on."""
        return ResidentRows(self.train, device)

    def validation(self, config: TrainConfig) -> Patches:
        """Return the rows to validate on."""
        return self.val


def by_hand(configs: list[TrainConfig], data: Path, out: Path) -> None:
    """Train one after the other in this process, and make a bundle of the best, as a sweep does."""
    dataset = PreparedDataset.open(data)
    rows = _InMemory(dataset)
    best: tuple[float, TrainConfig, Path] | None = None
    for number, config in enumerate(configs):
        folder = out / f"{number}"
        folder.mkdir(parents=True)
        write_json(folder / REQUEST_FILE, {"id": "hand"})
        training = LoneTraining(config, locate(folder), "hand", rows, lambda config=config: initial_weights(config), use_gpu=False)  # type: ignore[arg-type, misc]
        while training.next_epoch():
            pass
        training.close()
        value = training.progress.best_value or 0.0
        if best is None or value > best[0]:
            best = (value, config, folder)
    assert best is not None
    kept = best_checkpoint(locate(best[2]))
    assert kept is not None
    finish_bundle(kept[0], rows.val, best[1], dataset.manifest, out / "bundle", name="hand")


def overhead(data: Path, pairs: int, train_pairs: int, epochs: int) -> bool:
    """Print the ratios of the first part; tell whether the goal is met."""
    config = sweep_config([3.0e-4, 1.0e-3], [4, 5], epochs, max_concurrent_trials=1)
    configs = [config.train_config({"learning_rate": rate, "unfreeze_depth": depth}) for rate in (3.0e-4, 1.0e-3) for depth in (4, 5)]
    loop_ratios, train_ratios, starts = [], [], []
    with connected(2):
        for number in range(pairs):
            scratch = Path(tempfile.mkdtemp(prefix="sn-bench-"))
            seconds: dict[str, float] = {}
            sides = {
                "loop": lambda scratch=scratch: by_hand(configs, data, scratch / "loop"),  # type: ignore[misc]
                "sweep": lambda scratch=scratch: starts.extend(_starts(tune(config, data, scratch / "sweep"))),  # type: ignore[misc]
            }
            if number < train_pairs:
                sides["train"] = lambda scratch=scratch: [train(one, data, scratch / f"train{index}") for index, one in enumerate(configs)]  # type: ignore[misc]
            for side in list(sides)[:: 1 if number % 2 else -1]:
                started = time.monotonic()
                sides[side]()
                seconds[side] = time.monotonic() - started
            shutil.rmtree(scratch, ignore_errors=True)
            loop_ratios.append(seconds["sweep"] / seconds["loop"])
            if "train" in seconds:
                train_ratios.append(seconds["sweep"] / seconds["train"])
            print({side: round(value, 1) for side, value in seconds.items()}, flush=True)
    ratio = median_of(loop_ratios)
    print(f"overhead: sweep / loop {ratio}; goal {OVERHEAD_GOAL}")
    print(f"overhead: sweep / train {', '.join(f'{value:.2f}' for value in train_ratios)}")
    print(f"start of a trial: {', '.join(f'{value:.1f}' for value in starts[: len(configs)])} s in the first sweep")
    return ratio.low <= OVERHEAD_GOAL


def _starts(result: Any) -> list[float]:
    return [start["seconds"] for trial in result.trials for start in trial.starts]


def halving(data: Path, epochs: int) -> bool:
    """Print image-steps and best figures of the second part; tell whether the goals are met."""
    scratch = Path(tempfile.mkdtemp(prefix="sn-bench-"))
    rungs = {"grace_period_epochs": 3, "reduction_factor": 6}
    schedulers = {"grid": {"kind": "none"}, "asha": {"kind": "asha", **rungs}, "halving": {"kind": "halving", **rungs}}
    steps, best = {}, {}
    with connected(4):
        for name, scheduler in schedulers.items():
            config = sweep_config(RATES, [4, 5], epochs, scheduler=scheduler, max_concurrent_trials=2)
            result = tune(config, data, scratch / name)
            steps[name] = sum(trial.image_steps for trial in result.trials)
            best[name] = result.standings[0].value
            print(
                f"{name}: {len(result.trials)} trials, {steps[name]} image-steps, best val_roc_auc {best[name]:.4f} {result.standings[0].trial.point}"
            )
    shutil.rmtree(scratch, ignore_errors=True)
    for name in ("asha", "halving"):
        share, lost = steps[name] / steps["grid"], best["grid"] - best[name]
        print(f"{name}: {share:.3f} of the grid's image-steps (goal {STEPS_GOAL:.3f}), best {lost:+.4f} below the grid's (goal {AUC_GOAL})")
    return share <= STEPS_GOAL and lost <= AUC_GOAL


def share(data: Path, pairs: int, epochs: int, trials: int) -> bool:
    """Print the ratios of the third part; tell whether the goal is met."""
    dataset = PreparedDataset.open(data)
    rows = _InMemory(dataset)
    met = True
    for depth in (0, 1):
        ratios = []
        base = BASE | {"arch": "resnet34", "input_size_px": 96, "epochs": epochs, "unfreeze_depth": depth, "augment": {"views": 2}}
        for number in range(pairs):
            scratch = Path(tempfile.mkdtemp(prefix="sn-bench-"))
            spent = {}
            for side, room in list({"shared": 8.0, "anew": 0.0}.items())[:: 1 if number % 2 else -1]:
                started = time.process_time()
                for trial in range(trials):
                    config = TrainConfig(**base | {"learning_rate": 1e-4 * 2**trial, "feature_cache_gib": room})
                    folder = scratch / side / f"{trial}"
                    folder.mkdir(parents=True)
                    write_json(folder / REQUEST_FILE, {"id": "share"})
                    start = lambda config=config: initial_weights(config)  # noqa: E731
                    training = LoneTraining(config, locate(folder), "share", rows, start, use_gpu=False, features=scratch / side / "features")  # type: ignore[arg-type]
                    while training.next_epoch():
                        pass
                    training.close()
                spent[side] = time.process_time() - started
            shutil.rmtree(scratch, ignore_errors=True)
            ratios.append(spent["anew"] / spent["shared"])
            print(f"depth {depth}", {side: round(value, 1) for side, value in spent.items()}, flush=True)
        ratio = median_of(ratios)
        print(f"share: depth {depth}, {trials} trials of {epochs} epochs, 2 looks: computing anew / sharing {ratio}; goal 2")
        met = met and ratio.high >= 2
    return met


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a prepared data set")
    parser.add_argument("--parts", nargs="+", choices=["overhead", "halving", "share"], default=["overhead", "halving", "share"])
    parser.add_argument("--pairs", type=int, default=6, help="of overhead and share")
    parser.add_argument("--train-pairs", type=int, default=1, help="of these, how many beside the command train too")
    parser.add_argument("--epochs", type=int, default=None, help="of each trial; 5 for overhead, 16 for halving, 4 for share")
    args = parser.parse_args(argv)
    met = []
    if "overhead" in args.parts:
        met.append(overhead(args.data, args.pairs, args.train_pairs, args.epochs or 5))
    if "halving" in args.parts:
        met.append(halving(args.data, args.epochs or 16))
    if "share" in args.parts:
        met.append(share(args.data, args.pairs, args.epochs or 4, 3))
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
