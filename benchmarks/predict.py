"""How much of the bare network's speed the command `predict` keeps, from files to written parts.

    sentinode synth --out out/patches --count 4096
    sentinode prepare --source out/patches --out out/data
    sentinode train --data out/data --out out/run --set weights=none epochs=0 input_size_px=96
    python -m benchmarks.predict --bundle out/run/bundle --source out/patches --pairs 7

The peer is a loop of the same network over the same batches, decoded and in memory before, with as many threads, in this process. Ours is `predict`
with one actor on a Ray that has been started: reading, decoding, deciding, writing and all that Ray runs beside it count, and so does the network's
first batch; the start of the actor and the loading of the network do not. Both take turns. Under `taskset -c 0` (Linux) everything, Ray included,
shares one core. Prints the median of the ratio of images/s with its interval; exit code 1 where the goal, 0.95, is missed: it is met where the
interval reaches it.
"""

import argparse
import logging
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.ratios import median_of
from data_prep.decode import read_patches
from data_prep.sources.detect import reader_of
from ray_jobs.cluster import connected
from ray_jobs.predict import predict
from ray_jobs.predict_inputs import open_inputs
from sentinode.allocator import keep_freed_memory
from sentinode.config import PredictConfig, load_config
from sentinode.images import UInt8Array
from sentinode.predictor import Predictor
from sentinode.probability import FloatArray

GOAL = 0.95
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Timed:
    """Seconds, and the logits in the order of the inputs."""

    seconds: float
    logits: FloatArray


class Peer:
    """The bare network over pixels in memory."""

    def __init__(self, bundle: str, images: UInt8Array, config: PredictConfig) -> None:
        torch.set_num_threads(config.cpus_per_worker)
        keep_freed_memory()
        self.predictor = Predictor.load(bundle, engine=config.engine, device="cuda" if config.use_gpu is True else "cpu")
        self.images, self.config = images, config
        self.predictor.logits(images[: config.batch_size], config.batch_size)

    def run(self) -> Timed:
        """Answer for all; in parts, so that batches are those of ours."""
        started, parts = time.monotonic(), []
        for first in range(0, len(self.images), self.config.rows_per_part):
            parts.append(self.predictor.logits(self.images[first : first + self.config.rows_per_part], self.config.batch_size))
        return Timed(time.monotonic() - started, np.concatenate(parts))


def decoded(source: str, size_px: int) -> UInt8Array:
    """Return all patches of a source, uint8 (n, size_px, size_px, 3); ends the program where one cannot be read."""
    inputs = open_inputs(source)
    images = [found.copy() for found, _, _ in read_patches(reader_of(inputs.reader), inputs.table, size_px)]
    if sum(map(len, images)) != len(inputs):
        sys.exit(f"{source}: patches that cannot be read; the comparison needs a source without")
    return np.concatenate(images)


def run_ours(config: PredictConfig, bundle: str, source: str) -> Timed:
    """Run the command's function into a scratch folder."""
    with tempfile.TemporaryDirectory() as scratch:
        result = predict(config, bundle, source, Path(scratch) / "out.parquet")
        parts = [pq.read_table(result.path / part.path, columns=["logit"], partitioning=None)["logit"].to_numpy() for part in result.manifest.parts]
    return Timed(result.seconds, np.concatenate(parts))


def report(pairs: list[tuple[Timed, Timed]]) -> bool:
    """Print the ratio of (ours, peer) and whether the goal is met."""
    ratio = median_of([peer.seconds / ours.seconds for ours, peer in pairs])
    difference = max(float(np.abs(ours.logits - peer.logits).max()) for ours, peer in pairs)
    images = len(pairs[0][0].logits)
    speeds = [images / median_of([pair[side].seconds for pair in pairs]).value for side in (0, 1)]
    met = ratio.high >= GOAL and difference <= TOLERANCE
    print(f"predict {speeds[0]:.1f} images/s, bare network {speeds[1]:.1f} images/s; largest difference of logits {difference:.1e}")
    print(f"predict: {ratio} of the bare network's images/s; goal {GOAL}: {'met' if met else 'MISSED'}")
    return met


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--source", required=True, help="what predict takes; every input must be readable")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--set", dest="settings", nargs="+", default=[], help="of predict, e.g. cpus_per_worker=2 use_gpu=true")
    args = parser.parse_args(argv)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    config = load_config(PredictConfig, [], args.settings)
    if config.workers != 1:
        parser.error("one worker is compared with one network; leave workers out")
    if config.use_gpu == "auto":
        config = config.model_copy(update={"use_gpu": False})
    images = decoded(args.source, Predictor.load(args.bundle).manifest.patch_size_px)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = "one GPU" if config.use_gpu else f"{config.cpus_per_worker} of {cores} cores"
    print(f"{len(images)} patches, batches of {config.batch_size}, {where}, torch {torch.__version__}, {platform.machine()}", flush=True)
    peer = Peer(args.bundle, images, config)
    pairs = []
    with connected(config.cpus_per_worker):
        for number in range(args.pairs):
            # The one that comes second may find the machine warmer, or others busier.
            if number % 2:
                ours, theirs = run_ours(config, args.bundle, args.source), peer.run()
            else:
                theirs, ours = peer.run(), run_ours(config, args.bundle, args.source)
            pairs.append((ours, theirs))
    return 0 if report(pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
