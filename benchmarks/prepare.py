"""How fast patches become Parquet: prepare beside the ways that people use today, on the same files, in turns.

    python -m benchmarks.prepare --source kaggle/ --pairs 9                # a folder in the Kaggle layout, 20,000 patches or more

Prints, for each peer, the median ratio of its time to ours with its interval:

- decode and write, one core: every file to pixels in Parquet. Ours reads, decodes, spools, gathers in random order and writes, without hashes.
- the whole job, all cores of this machine: ours also hashes, searches overlaps, splits, writes the report and reads back what it wrote. The peers
  do none of that.

Peers: `ray.data.read_images` -> `write_parquet` (Ray running already, for both); a Pillow loop -> pyarrow, alone and in as many processes as there
are cores; Hugging Face `datasets` image folder -> Parquet (with `pip install datasets`), which stores the files' bytes without decoding them. The
floor is reading every byte once. Ends with exit code 1 where a goal is missed: 4x and 2x of the best peer, met where the interval reaches them.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

# Before Ray and Hugging Face are imported: nothing is fetched, and nothing written outside the temporary folder.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="sentinode-bench-hf-"))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from PIL import Image

from benchmarks.ratios import Median, median_of
from data_prep.decode import read_patches
from data_prep.output import request_of
from data_prep.prepare import prepare
from data_prep.shards import write_rows
from data_prep.sources.base import Source
from data_prep.sources.detect import open_source, reader_of
from data_prep.spool import Spool, checksums
from ray_jobs.cluster import connected
from sentinode.config import PrepareConfig

GOAL_DECODE_AND_WRITE = 4.0
GOAL_WHOLE_JOB = 2.0
_ROWS_PER_FILE = 4096
_BLOCK_ROWS = 2048

Run = Callable[[Path], None]


def decode_and_write(source: Source) -> Run:
    """Ours on one core: what prepare does with pixels, without figures about them."""
    config = PrepareConfig()
    reader, size_px = reader_of(source.reader), config.patch_size_px

    def run(out: Path) -> None:
        files, rows, sums = [], [], []
        for start in range(0, len(source.entries), _BLOCK_ROWS):
            files.append(out / f"{start}.pixels")
            rows.append(0)
            with files[-1].open("wb") as file:
                for images, _, _ in read_patches(reader, source.entries.slice(start, _BLOCK_ROWS), size_px):
                    sums.append(checksums(images))
                    rows[-1] += len(images)
                    file.write(images.data)
        spool = Spool(tuple(files), tuple(rows), size_px)
        order = np.random.default_rng(0).permutation(len(spool))
        entries = source.entries.select(["id", "label", "slide"]).append_column("group", source.entries["id"])
        plan = entries.append_column("position", pa.array(np.arange(len(spool)))).append_column("checksum", pa.array(np.concatenate(sums)))
        for start in range(0, len(spool), _ROWS_PER_FILE):
            part = plan.take(pa.array(order[start : start + _ROWS_PER_FILE]))
            write_rows(out / f"{start}.parquet", part, spool, row_group_rows=config.row_group_rows, compression=config.compression)

    return run


def whole_job(folder: str) -> Run:
    """Ours, everything, on the Ray that runs."""

    def run(out: Path) -> None:
        prepare(request_of(PrepareConfig(), folder, out / "data"))

    return run


def pillow_loop(paths: Sequence[str], labels: Sequence[int], pool: ProcessPoolExecutor | None = None) -> Run:
    """The script that everybody writes: Pillow, a list, pyarrow; in the processes of `pool` if there is one."""
    parts = [(paths[start : start + _ROWS_PER_FILE], labels[start : start + _ROWS_PER_FILE], start) for start in range(0, len(paths), _ROWS_PER_FILE)]

    def run(out: Path) -> None:
        list((pool.map if pool else map)(_pillow_part, *zip(*parts, strict=True), [out] * len(parts)))

    return run


def _pillow_part(paths: Sequence[str], labels: Sequence[int], number: int, out: Path) -> None:
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB")).tobytes())
    table = pa.table({"id": [Path(path).stem for path in paths], "label": pa.array(labels, pa.int8()), "image": images})
    pq.write_table(table, out / f"part-{number}.parquet")


def ray_read_images(folder: str) -> Run:
    """Ray Data's own reader and writer."""

    def run(out: Path) -> None:
        ray.data.read_images(folder, include_paths=True, mode="RGB").write_parquet(str(out / "images"))

    return run


def hugging_face(folder: str) -> Run | None:
    """`datasets`, where it is installed."""
    try:
        import datasets
    except ImportError:
        return None
    datasets.disable_progress_bars()

    def run(out: Path) -> None:
        loaded = datasets.load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=str(out / "cache"))
        loaded.to_parquet(str(out / "images.parquet"))

    return run


def read_only(paths: Sequence[str]) -> Run:
    """The floor: every byte once."""

    def run(out: Path) -> None:
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            os.read(descriptor, 1 << 20)
            os.close(descriptor)

    return run


def timed(run: Run) -> float:
    """Return the seconds of one run into a fresh folder."""
    with tempfile.TemporaryDirectory(prefix="sentinode-bench-") as out:
        start = time.perf_counter()
        run(Path(out))
        return time.perf_counter() - start


def compare(title: str, ours: Run, peers: dict[str, Run], floor: Run | None, pairs: int, count: int) -> dict[str, Median]:
    """Run ours and each peer in turns, print, and return the ratios peer / ours."""
    print(f"\n{title}", flush=True)
    timed(ours)  # files in the page cache, libraries loaded
    times: dict[str, list[float]] = {name: [] for name in peers}
    own: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(pairs):
        for name, peer in peers.items():
            both = [(times[name], peer), (own[name], ours)]
            for seconds, run in both if number % 2 else reversed(both):
                seconds.append(timed(run))
    ratios = {}
    for name in peers:
        ratios[name] = median_of([theirs / mine for theirs, mine in zip(times[name], own[name], strict=True)])
        per_patch = [1e6 * float(np.median(seconds)) / count for seconds in (times[name], own[name])]
        print(f"  {name:42} {per_patch[0]:7.0f} us/patch, ours {per_patch[1]:6.0f}: ratio {ratios[name]}", flush=True)
    if floor is not None:
        print(f"  {'floor: reading every byte once':42} {1e6 * min(timed(floor) for _ in range(3)) / count:7.0f} us/patch")
    return ratios


def meets(ratios: dict[str, Median], goal: float) -> bool:
    """Say whether the ratio to the best peer reaches a goal."""
    best = min(ratios, key=lambda name: ratios[name].value)
    met = ratios[best].high >= goal
    print(f"  best peer: {best}, {ratios[best]}; goal {goal}: {'met' if met else 'missed'}")
    return met


def main() -> int:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, metavar="DIR", help="folder in the Kaggle layout")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each pair, at least 7 (default 7)")
    parser.add_argument("--part", choices=("decode", "whole", "all"), default="all", help="which comparison (default all)")
    args = parser.parse_args()
    if args.pairs < 7:
        parser.error("--pairs: at least 7")
    source = open_source(PrepareConfig(), args.source)
    paths = [str(Path(args.source) / path) for path in source.entries["path"].to_pylist()]
    labels, images = source.entries["label"].to_pylist(), str(Path(args.source) / "train")
    cores = len(os.sched_getaffinity(0))
    print(f"{len(paths)} patches, {cores} cores, Pillow {Image.__version__}, pyarrow {pa.__version__}, ray {ray.__version__}")
    # Its processes are forked now, before Ray has threads, and are not counted in any time.
    pool = ProcessPoolExecutor(cores)
    list(pool.map(abs, range(64 * cores)))
    loop, met = pillow_loop(paths, labels), True
    if args.part != "whole":
        peers = {"Pillow loop -> pyarrow, one process": loop}
        if (face := hugging_face(images)) is not None:
            peers["datasets imagefolder -> Parquet"] = face
        else:
            print("datasets is not installed: left out")
        ratios = compare("decode and write, one core", decode_and_write(source), peers, read_only(paths), args.pairs, len(paths))
        met &= meets(ratios, GOAL_DECODE_AND_WRITE)
    if args.part != "decode":
        with connected(0):
            peers = {"ray.data.read_images -> write_parquet": ray_read_images(images), "Pillow loop -> pyarrow, one process": loop}
            if cores > 1:
                peers[f"Pillow loop -> pyarrow, {cores} processes"] = pillow_loop(paths, labels, pool)
            met &= meets(compare("the whole job, all cores", whole_job(args.source), peers, None, args.pairs, len(paths)), GOAL_WHOLE_JOB)
    pool.shutdown()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
