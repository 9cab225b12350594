"""Turn patches and labels into a prepared data set: sharded Parquet with leak-safe splits.

    python -m ray_jobs.prepare --source kaggle/ --out out/data                          # kaggle/train/<id>.tif, kaggle/train_labels.csv
    python -m ray_jobs.prepare --source kaggle/ --out out/data --slides patch_id_wsi.csv --set split=slide
    python -m ray_jobs.prepare --source pcam/ --out out/pcam --set split=predefined     # camelyonpatch_level_2_split_*.h5 or .h5.gz
    python -m ray_jobs.prepare --source s3://bucket/patches.csv --out s3://bucket/data  # path,label[,slide,centre,x_px,y_px,split]
    python -m ray_jobs.prepare --from out/data --out out/folds --set folds=5            # split anew without decoding again

The output is whole or absent. Killed at any moment, the same command continues.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from data_prep.output import PrepareRequest, is_complete, request_of
from data_prep.prepare import PrepareResult, prepare
from data_prep.tasks import works_elsewhere
from ray_jobs.autoscaling import growth
from ray_jobs.cluster import Need, check_capacity, connected
from ray_jobs.prepare_one_node import prepare_on_one_node
from ray_jobs.prepare_progress import ProgressLines, summary_table
from ray_jobs.verb import add_common_arguments, config_from, main_of, say
from ray_jobs.waiting import data_tasks_run, wait_told
from sentinode.config import PrepareConfig


def run_prepare(request: PrepareRequest, *, verbose: bool = False) -> PrepareResult:
    """Prepare on the Ray at hand; Ray is not even started where the output is complete. Errors: `data_prep.prepare.prepare`."""
    if is_complete(request):
        return prepare(request)  # which clears up what a killed run has left, and needs no Ray for it
    with connected(0, verbose=verbose):
        check_capacity(Need(workers=1, other_cpus=0), "prepare")
        # Machines that are still to come see no more of this one's disk than those that are there.
        if request.work_is_private and (works_elsewhere() or growth() is not None):
            return prepare_on_one_node(request, ProgressLines())
        with wait_told(1, 0, "prepare the data set", data_tasks_run):
            return prepare(request, progress=ProgressLines())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--source", metavar="PATH", help="folder or table of patches, in any layout of docs/data.md; a path or s3:// URI")
    source.add_argument("--from", dest="from_dataset", metavar="DATASET", help="a prepared data set to split anew, without decoding again")
    parser.add_argument("--out", required=True, metavar="DIR", help="the prepared data set to make; a path or s3:// URI")
    parser.add_argument("--labels", metavar="CSV", help="labels, `id,label` (default: train_labels.csv in the source)")
    parser.add_argument("--slides", metavar="CSV", help="slide of each patch, `id,wsi`; for --set split=slide")
    parser.add_argument(
        "--work",
        metavar="DIR",
        help="where --out is s3://: folder for the work that all machines see (default: temporary files; of several machines one does it all then)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a prepared data set of other inputs or configuration")
    add_common_arguments(parser, PrepareConfig)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the verb from parsed arguments."""
    request = request_of(
        config_from(args, PrepareConfig),
        args.source,
        args.out,
        labels=args.labels,
        slides=args.slides,
        from_dataset=args.from_dataset,
        work=args.work,
        overwrite=args.overwrite,
    )
    result = run_prepare(request, verbose=args.verbose)
    manifest = result.manifest
    if result.already_complete:
        say(f"already complete: {result.path}")
    say(summary_table(manifest))
    say(f"data set: {result.path}  (report.html; fingerprint {manifest.fingerprint[:16]}…)")
    return {"data": str(result.path), "fingerprint": manifest.fingerprint, "already_complete": result.already_complete}


def main(argv: Sequence[str] | None = None, prog: str = "python -m ray_jobs.prepare") -> int:
    """Entry point of `python -m ray_jobs.prepare`; returns the exit code."""
    return main_of(prog, __doc__, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
