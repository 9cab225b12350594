"""What the overlap search costs per patch on one core, and how that grows with the number of patches.

    python -m benchmarks.overlap --source kaggle/ --count 5000 --rounds 7

Prints microseconds of CPU time per patch for the three steps (anchors; candidates: the join; verify: the comparison of pixels) at a quarter, a half
and all of the patches, drawn at random, in turns: median with its interval. CPU time, because other programs would be measured otherwise; the files
are in the page cache. Also what grows: candidates and overlaps. Ends with exit code 1 if the steps together need more than 300 us per patch.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core is what is measured

import numpy as np

from benchmarks.ratios import median_of
from data_prep.anchors import anchors
from data_prep.overlap_search import candidates, overlaps
from data_prep.spool import Spool
from sentinode.images import UInt8Array, decode_patch

GOAL_US = 300.0
_BLOCK_ROWS = 2048
_STEPS = ("anchors", "candidates", "verify", "together")


def search(images: UInt8Array, folder: Path) -> tuple[list[float], list[float]]:
    """Search once; returns seconds of each step and of all, and anchors per patch, candidates, overlaps (pairs with their offsets)."""
    starts = range(0, len(images), _BLOCK_ROWS)
    blocks = [images[start : start + _BLOCK_ROWS] for start in starts]
    pixel_files, anchor_files = ([folder / f"{start}.{kind}" for start in starts] for kind in ("pixels", "npy"))
    for file, block in zip(pixel_files, blocks, strict=True):
        block.tofile(file)
    spool = Spool(tuple(pixel_files), tuple(map(len, blocks)), images.shape[1])
    seconds = [0.0]
    found = 0
    for file, block in zip(anchor_files, blocks, strict=True):
        begin = time.process_time()
        block_anchors = anchors(block)
        seconds[0] += time.process_time() - begin
        found += block_anchors.shape[1]
        np.save(file, block_anchors)
    part_bits = max(0, (found >> 22).bit_length() - 1)  # as large as the parts of a real search
    part_files = [folder / f"candidates-{part}.npy" for part in range(1 << part_bits)]
    begin = time.process_time()
    for part, file in enumerate(part_files):
        np.save(file, candidates(spool, anchor_files, part, part_bits))
    seconds.append(time.process_time() - begin)
    begin = time.process_time()
    verified = overlaps(spool, part_files, 0, 2**64 - 1)
    seconds.append(time.process_time() - begin)
    distinct = len(np.unique(np.concatenate([np.load(file) for file in part_files])))
    return [*seconds, sum(seconds)], [found / len(images), distinct, len(verified)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--source", required=True, type=Path, help="folder in the Kaggle layout")
    parser.add_argument("--count", type=int, help="patches to take; default all")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    files = sorted((args.source / "train").iterdir())[: args.count]
    images = np.stack([decode_patch(file.read_bytes(), size_px=96) for file in files])
    images = images[np.random.default_rng(0).permutation(len(images))]
    counts = [len(images) // 4, len(images) // 2, len(images)]
    times: dict[int, list[list[float]]] = {count: [] for count in counts}
    grown: dict[int, list[float]] = {}
    for _ in range(args.rounds):
        for count in counts:
            with tempfile.TemporaryDirectory(prefix="sentinode-bench-") as folder:
                seconds, grown[count] = search(images[:count], Path(folder))
            times[count].append([1e6 * value / count for value in seconds])
    for count in counts:
        anchors_each, distinct, pairs = grown[count]
        print(f"{count} patches: {anchors_each:.0f} anchors each, {distinct:.0f} candidates, {pairs:.0f} overlaps")
        for step, values in zip(_STEPS, zip(*times[count], strict=True), strict=True):
            median = median_of(values)
            interval = f"{median.low:.1f} to {median.high:.1f}, {median.pairs} rounds"
            print(f"  {step:10} {median.value:6.1f} us per patch ({interval}; least {min(values):.1f})")
    together = median_of([values[-1] for values in times[len(images)]])
    return int(together.low > GOAL_US)


if __name__ == "__main__":
    sys.exit(main())
