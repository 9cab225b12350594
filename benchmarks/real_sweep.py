"""A sweep over learning rate and unfreeze depth on real patches, without weights from elsewhere, from the patches to the winner's test figures.

    python -m benchmarks.real_sweep --source kaggle/ --out out/real_sweep
    python -m benchmarks.real_sweep --source kaggle/ --out out/real_sweep --stages base      # one stage after the other, if time is short

No ImageNet weights are at hand here, and with random ones frozen layers mean nothing. So one half of the patches (by groups: no patch of one half
shares pixels with one of the other) trains a base from random weights; on the other half the sweep starts from it (`weights: BUNDLE`), the winner is
trained again from best.yaml, and it, the base as it is, and the sweep's own bundle are evaluated on the test split of that half. Each stage
continues what an interrupted one began. Nothing is timed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

SWEEP = {
    "space": {"learning_rate": {"loguniform": [1e-5, 3e-3]}, "unfreeze_depth": {"choice": [0, 1, 2, 3, 4, 5]}},
    "base": {
        "arch": "resnet34",
        "input_size_px": 96,
        "epochs": 6,
        "batch_size": 32,
        "optimiser": "adamw",
        "weight_decay": 0.05,
        "schedule": "one_cycle",
        "class_weight": 1.0,
        "early_stopping_patience_epochs": None,
        "precision": "bf16",
    },
    "searcher": "random",
    "trials": 18,
    "scheduler": {"kind": "asha", "grace_period_epochs": 1, "reduction_factor": 2},
    "repeats": 2,
    "repeat_top": 2,
    "max_concurrent_trials": 2,
    "seed": 42,
}


def sentinode(*argv: str | Path) -> None:
    """Run one command; its failure ends this one."""
    print("$ sentinode", *argv, flush=True)
    subprocess.run([sys.executable, "-m", "ray_jobs.cli", *map(str, argv)], check=True)


def prepare(source: Path, out: Path) -> None:
    """Make the data sets of both halves."""
    sentinode("prepare", "--source", source, "--out", out / "all", "--set", "ratios=[0.5,0.25,0.25]")
    index = pd.read_parquet(out / "all" / "index.parquet", columns=["id", "label", "split", "source_path"])
    for half, splits in (("first", ["train"]), ("second", ["val", "test"])):
        rows = index[index["split"].isin(splits)].sort_values("id")
        table = pd.DataFrame({"id": rows["id"], "path": [str(_absolute(source, path)) for path in rows["source_path"]], "label": rows["label"]})
        path = out / f"{half}.csv"
        path.write_text(table.to_csv(index=False))
        # The first half is never tested on.
        ratios = "[0.8,0.2,0]" if half == "first" else "[0.6,0.2,0.2]"
        sentinode("prepare", "--source", path, "--out", out / half, "--set", "source=table", f"ratios={ratios}")


def _absolute(source: Path, path: str) -> Path:
    return Path(path) if Path(path).is_absolute() else (source / path).absolute()


def base(out: Path, epochs: int) -> None:
    """Train the base on the first half."""
    sentinode("train", "--data", out / "first", "--out", out / "base", "--preset", "small_data", "--set", f"epochs={epochs}", "tta=1")


def sweep(out: Path) -> None:
    """Sweep on the second half, from the base's weights."""
    config = out / "sweep.yaml"
    config.write_text(yaml.safe_dump(SWEEP | {"base": SWEEP["base"] | {"weights": str((out / "base" / "bundle").absolute())}}, sort_keys=False))
    sentinode("tune", "--data", out / "second", "--out", out / "sweep", "--config", config)


def winner(out: Path) -> None:
    """Train the winner again, as a user would, and evaluate."""
    sentinode("train", "--data", out / "second", "--out", out / "winner", "--config", out / "sweep" / "best.yaml")
    figures = {}
    for name, bundle in (("base", out / "base"), ("sweep", out / "sweep"), ("winner", out / "winner")):
        report = out / f"report_{name}"
        sentinode("evaluate", "--bundle", bundle / "bundle", "--data", out / "second", "--out", report)
        figures[name] = json.loads((report / "report.json").read_text())
    for name, report in figures.items():
        print(name, "test ROC-AUC", report["roc_auc"], "digest", json.loads((out / name / "bundle" / "bundle.json").read_text())["digest"][:16])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="real patches, in the Kaggle layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stages", nargs="+", choices=["prepare", "base", "sweep", "winner"], default=["prepare", "base", "sweep", "winner"])
    parser.add_argument("--base-epochs", type=int, default=24)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    stages = {
        "prepare": lambda: prepare(args.source, args.out),
        "base": lambda: base(args.out, args.base_epochs),
        "sweep": lambda: sweep(args.out),
        "winner": lambda: winner(args.out),
    }
    for stage in args.stages:
        stages[stage]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
