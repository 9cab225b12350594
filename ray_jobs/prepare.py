"""Turn patches and labels into a prepared data set: sharded Parquet with leak-safe splits.

    python -m ray_jobs.prepare --source kaggle/ --out out/data                          # kaggle/train/<id>.tif, kaggle/train_labels.csv
    python -m ray_jobs.prepare --source kaggle/ --out out/data --slides patch_id_wsi.csv --set split=slide

The output is whole or absent. Killed at any moment, the same command continues.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from data_prep.output import is_complete, request_of
from data_prep.prepare import PrepareResult, prepare
from ray_jobs.cluster import Need, check_capacity, connected
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from sentinode.config import PrepareConfig
from sentinode.manifests import LEAK_MEANING, read_dataset_manifest
from sentinode.storage import local_path

_SECONDS_BETWEEN_LINES = 5.0


def run_prepare(
    config: PrepareConfig,
    source: str,
    out: str,
    *,
    labels: str | None = None,
    slides: str | None = None,
    overwrite: bool = False,
    verbose: bool = False,
) -> PrepareResult:
    """Prepare on the Ray at hand; Ray is not even started where the output is complete. Parameters and errors: `data_prep.prepare.prepare`."""
    if is_complete(request_of(config, source, labels=labels, slides=slides), out, overwrite=overwrite):
        return PrepareResult(local_path(out), read_dataset_manifest(out), already_complete=True)
    with connected(0, verbose=verbose):
        check_capacity(Need(workers=1, other_cpus=0), "prepare")
        return prepare(config, source, out, labels=labels, slides=slides, overwrite=overwrite, progress=_progress_lines())


def _progress_lines() -> Callable[[str, int, int], None]:
    """Show the first, the last and now and then a line in between of each stage."""
    stage_started: dict[str, float] = {}
    last_line = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        started = stage_started.setdefault(stage, now)
        if 0 < done < total and now - last_line < _SECONDS_BETWEEN_LINES:
            return
        last_line = now
        left = f", {(now - started) / done * (total - done):.0f} s left" if 0 < done < total else ""
        say(f"{stage}: {done}/{total} blocks{left}")

    return show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--source", required=True, metavar="DIR", help="folder in the Kaggle layout: train/<id>.tif and train_labels.csv")
    parser.add_argument("--out", required=True, metavar="DIR", help="the prepared data set to make")
    parser.add_argument("--labels", metavar="CSV", help="labels, `id,label` (default: train_labels.csv in the source)")
    parser.add_argument("--slides", metavar="CSV", help="slide of each patch, `id,wsi`; for --set split=slide")
    parser.add_argument("--overwrite", action="store_true", help="replace a prepared data set of other inputs or configuration")
    add_common_arguments(parser, PrepareConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    config = config_from(args, PrepareConfig)
    result = run_prepare(config, args.source, args.out, labels=args.labels, slides=args.slides, overwrite=args.overwrite, verbose=args.verbose)
    manifest = result.manifest
    if result.already_complete:
        say(f"already complete: {result.path}")
    for split, counts in manifest.counts.items():
        share = 100 * counts.metastatic / max(counts.rows, 1)
        say(f"{split:>5}: {counts.rows:>7} patches in {counts.groups} groups, {counts.metastatic} metastatic ({share:.1f} %)")
    say(f"refused: {sum(manifest.rejected.values())} {manifest.rejected or ''}".rstrip())
    for note in [LEAK_MEANING[manifest.leak_level], *manifest.split.notes]:
        say(f"note: {note}")
    say(f"data set: {result.path}  (report.html; fingerprint {manifest.fingerprint[:16]}…)")
    return {"data": str(result.path), "fingerprint": manifest.fingerprint, "already_complete": result.already_complete}


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.prepare") -> int:
    """Entry point of `python -m ray_jobs.prepare`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
