"""How prepare grows: time and memory at several sizes and numbers of workers, and whether every planted overlap is found.

    sentinode synth --out patches/ --count 220025
    python -m benchmarks.prepare_growth --synth patches/ --scratch /tmp/growth --counts 20000 60000 220025 --workers 1 2

Each run is `sentinode prepare` as a process of its own, with a Ray of its own, on the patches of randomly chosen fields of the synthetic folder (hard
links), so that the share of overlapping ones stays the same; they are read once before, so that the first run does not wait for the disk more than
the others. Memory is sampled every half second: of the driver its resident set and the anonymous part of it, of the tasks' processes the anonymous
part (files that are mapped, the spool and the anchors, belong to the page cache and can be dropped; Linux only). Expected overlaps are worked out
from truth.csv: patches of one field whose common part covers 5 % of the patch and has a standard deviation above 6. Ends with exit code 1 where one
was missed, or where the driver needed more than 2 GB.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
from PIL import Image

from data_prep.overlap import is_overlap

DRIVER_LIMIT_BYTES = 2_000_000_000
_SIDE = 96

Truth = dict[str, list[tuple[str, int, int]]]


def fields_of(synth: Path, count: int) -> Truth:
    """Return field -> (id, y, x) of its patches, of randomly chosen whole fields with about `count` patches."""
    fields: Truth = defaultdict(list)
    with (synth / "truth.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            fields[row["field"]].append((row["id"], int(row["y"]), int(row["x"])))
    chosen: Truth = {}
    total = 0
    for name in sorted(fields, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if total >= count:
            break
        chosen[name] = fields[name]
        total += len(fields[name])
    return chosen


def link_source(synth: Path, fields: Truth, folder: Path) -> None:
    """Make a Kaggle-layout folder of the chosen patches."""
    (folder / "train").mkdir(parents=True)
    with (synth / "train_labels.csv").open(newline="") as file:
        label = {row["id"]: row["label"] for row in csv.DictReader(file)}
    with (folder / "train_labels.csv").open("w") as file:
        file.write("id,label\n")
        for patches in fields.values():
            for id_, _, _ in patches:
                os.link(synth / "train" / f"{id_}.tif", folder / "train" / f"{id_}.tif")
                file.write(f"{id_},{label[id_]}\n")


def expected_overlaps(synth: Path, fields: Truth) -> set[tuple[str, str]]:
    """Return the pairs that overlap by the definition, by place; texture is looked up in the files."""
    pairs = set()
    for patches in fields.values():
        if len(patches) == 1:
            continue
        images = {id_: np.asarray(Image.open(synth / "train" / f"{id_}.tif")) for id_, _, _ in patches}
        for number, (first, y, x) in enumerate(patches):
            for second, other_y, other_x in patches[number + 1 :]:
                if is_overlap(images[first], images[second], other_y - y, other_x - x):
                    pairs.add((min(first, second), max(first, second)))
    return pairs


def anonymous_bytes(process_id: int) -> int:
    """Return the resident memory of a process that is no page of a file."""
    for line in Path(f"/proc/{process_id}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def run(source: Path, out: Path, workers: int) -> dict[str, Any]:
    """Prepare once; returns seconds, peaks in bytes and the fingerprint."""
    environment = dict(os.environ) | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "ray_jobs.cli", "prepare", "--source", source, "--out", out, "--json", "--set", f"workers={workers}"]
    for path in (source / "train").iterdir():
        path.read_bytes()
    start, driver, driver_own, tasks = time.monotonic(), 0, 0, 0
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                driver, driver_own = max(driver, watched.memory_info().rss), max(driver_own, anonymous_bytes(watched.pid))
                for child in watched.children(recursive=True):
                    if child.name().startswith("ray::"):
                        tasks = max(tasks, anonymous_bytes(child.pid))
            except (psutil.Error, OSError):
                pass  # it has ended since
            time.sleep(0.5)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
    if process.returncode:
        raise SystemExit(f"prepare ended with {process.returncode}")
    seconds = time.monotonic() - start
    stages = [line for line in lines if ", took " in line]
    print("    " + "; ".join(stages), flush=True)
    return {"seconds": seconds, "driver": driver, "driver_own": driver_own, "tasks": tasks, "fingerprint": json.loads(lines[-1])["fingerprint"]}


def main() -> int:
    """Run all sizes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synth", required=True, type=Path, metavar="DIR", help="made by `sentinode synth`")
    parser.add_argument(
        "--scratch", required=True, type=Path, metavar="DIR", help="on the same file system, with three times the size of the patches"
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[20_000, 60_000, 220_025])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    failed = False
    print("| patches | workers | seconds | us a patch | driver MB | of it anonymous | a task MB, anonymous | overlaps expected | missed | more |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for count in args.counts:
        fields = fields_of(args.synth, count)
        total = sum(map(len, fields.values()))
        source, out = args.scratch / f"source-{count}", args.scratch / f"out-{count}"
        link_source(args.synth, fields, source)
        expected = expected_overlaps(args.synth, fields)
        fingerprints = set()
        for workers in args.workers:
            figures = run(source, out, workers)
            table = pq.read_table(out / "overlaps.parquet")
            found = set(zip(table["first_id"].to_pylist(), table["second_id"].to_pylist(), strict=True))
            missed, more = len(expected - found), len(found - expected)
            cells = [total, workers, f"{figures['seconds']:.0f}", f"{1e6 * figures['seconds'] / total:.0f}"]
            cells += [
                f"{figures['driver'] / 1e6:.0f}",
                f"{figures['driver_own'] / 1e6:.0f}",
                f"{figures['tasks'] / 1e6:.0f}",
                len(expected),
                missed,
                more,
            ]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            failed |= missed > 0 or figures["driver"] > DRIVER_LIMIT_BYTES
            fingerprints.add(figures["fingerprint"])
            shutil.rmtree(out)
        if len(fingerprints) > 1:
            print("the fingerprint depends on the number of workers", file=sys.stderr)
            failed = True
        shutil.rmtree(source)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
