"""How well recipes for few patches do: ROC-AUC on grouped folds, with several seeds, on the same rows for each.

    sentinode prepare --source kaggle/ --out out/data --set folds=5
    python -m benchmarks.recipes --data out/data --recipes loop small_data --folds 0 1 --seeds 0 1

A recipe is `loop` (what one would write first: AdamW, one-cycle to 1e-3, batches of 64, dihedral and light colours, ten epochs of 96 px), a preset of
`train`, or one of these with changes: `small_data+ema_decay=null+epochs=20`. `--set` changes all of them alike, for instance
`--set arch=resnet18 input_size_px=64 epochs=12` for a quick look.

A fold is validated on with the network of the last epoch, the others train; nothing is chosen by the fold, so that the figure is not optimistic. The
test split is not touched. Each run is a line in `--results`, which the same command continues.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_jobs.verb import PRESETS
from sentinode.config import TrainConfig, load_config
from sentinode.dataset import PreparedDataset
from sentinode.inference import network_logits
from sentinode.ingest import ResidentRows
from sentinode.learner import Learner
from sentinode.metrics import roc_auc
from sentinode.model import build_model
from sentinode.training import Progress, train_epochs
from sentinode.versions import git_commit
from sentinode.worker import set_up_worker

LOOP = (
    "weights=none",
    "unfreeze_depth=5",
    "input_size_px=96",
    "epochs=10",
    "batch_size=64",
    "optimiser=adamw",
    "learning_rate=0.001",
    "weight_decay=0.01",
    "schedule=one_cycle",
    "class_weight=1.0",
)


def config_of(recipe: str, shared: Iterable[str], **overrides: Any) -> TrainConfig:
    """Return the configuration of a recipe as the command line writes it; raises ConfigError."""
    name, *changes = recipe.split("+")
    files, settings = ([], [*LOOP]) if name == "loop" else ([PRESETS / f"{name}.yaml"], [])
    return load_config(TrainConfig, files, [*settings, *shared, *changes, "early_stopping_patience_epochs=null"], **overrides)


def name_of(data: str, config: TrainConfig) -> str:
    """Return a short name of what decides a run: rows, settings and the commit of this program."""
    fingerprint = PreparedDataset.open(data).manifest.fingerprint
    return hashlib.sha256(f"{fingerprint} {git_commit()} {config.model_dump_json()}".encode()).hexdigest()[:12]


def run(data: str, recipe: str, shared: list[str], fold: int, seed: int, threads: int) -> dict[str, Any]:
    """Train once and return the ROC-AUC on the fold, of the last epoch."""
    set_up_worker(threads)
    config = config_of(recipe, shared, fold=fold, seed=seed)
    train, val = PreparedDataset.open(data).read_train_and_val(fold)
    torch.manual_seed(seed)
    learner = Learner(build_model(config.arch, input_size_px=config.input_size_px), config)
    # Two rows, one of each class: what the loop validates on after each epoch is not looked at here.
    few = val.take(np.array([int(np.flatnonzero(val.labels == label)[0]) for label in (0, 1)]))
    started = time.monotonic()
    train_epochs(learner, ResidentRows(train, "cpu"), few, config, Progress())
    seconds = time.monotonic() - started
    with learner.evaluating() as network:
        size, mean, std = config.input_size_px, config.mean, config.std
        logits = network_logits(network, val.images, input_size_px=size, mean=mean, std=std, tta=config.tta)
    result = {"run": name_of(data, config), "recipe": recipe, "set": shared, "fold": fold, "seed": seed, "commit": git_commit()}
    return result | {"rows": len(train), "seconds": round(seconds), "roc_auc": float(roc_auc(val.labels, logits))}


def table(lines: list[dict[str, Any]], recipes: list[str]) -> str:
    """Return one line per recipe: its mean, and what it differs by from the first one, over the folds and seeds that both were run on."""
    value = {(line["recipe"], line["fold"], line["seed"]): line["roc_auc"] for line in lines}
    rows = ["| recipe | runs | mean ROC-AUC (range) | beside the first, same folds and seeds (range) |", "|---|---|---|---|"]
    for recipe in recipes:
        mine = {key[1:]: auc for key, auc in value.items() if key[0] == recipe}
        first = {key[1:]: auc for key, auc in value.items() if key[0] == recipes[0]}
        both = [mine[key] - first[key] for key in mine.keys() & first.keys()]
        aucs = list(mine.values())
        mean = f"{np.mean(aucs):.4f} ({min(aucs):.4f} to {max(aucs):.4f})" if aucs else "-"
        rows.append(f"| {recipe} | {len(aucs)} | {mean} | {f'{np.mean(both):+.4f} ({min(both):+.4f} to {max(both):+.4f})' if both else '-'} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set prepared with folds")
    parser.add_argument("--recipes", nargs="+", default=["loop", "small_data"])
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all recipes")
    parser.add_argument("--results", type=Path, default=Path("recipes.jsonl"), help="lines of runs that are done")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    args = parser.parse_args(argv)
    for recipe in args.recipes:
        config_of(recipe, args.set)
    text = args.results.read_text() if args.results.exists() else ""
    wanted = {
        name_of(args.data, config_of(recipe, args.set, fold=fold, seed=seed)): (recipe, fold, seed)
        for seed, fold, recipe in itertools.product(args.seeds, args.folds, args.recipes)
    }
    lines = {line["run"]: line for line in map(json.loads, text.splitlines()) if line["run"] in wanted}
    # spawn: torch's threads do not survive a fork.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        missing = [key for name, key in wanted.items() if name not in lines]
        futures = [pool.submit(run, args.data, recipe, args.set, fold, seed, args.threads) for recipe, fold, seed in missing]
        for future in as_completed(futures):
            line = future.result()
            lines[line["run"]] = line
            with args.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
    print(table(list(lines.values()), args.recipes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
