"""How fast rows reach a training loop that does nothing with them: resident and streamed, beside DataLoaders over the TIF files and over Parquet.

    sentinode prepare --source kaggle/ --out out/data
    python -m benchmarks.ingest --source kaggle/ --data out/data --pairs 9

One epoch over the split train in batches of 32, in random order, as uint8 on the CPU; files in the page cache. Prints, for each peer, the median
ratio of its time to ours with its interval. The time of an epoch counts whole; the wait for its first batch is also shown apart.

Peers, each with 0, 1 and 2 worker processes, which stay from epoch to epoch: torch's `DataLoader(shuffle=True)` with the default collate over a
Dataset that opens a TIF with Pillow, and over a Dataset that takes a row of pyarrow tables, one per shard, in memory. The floor is copying each row
once, in order. Ends with exit code 1 where a goal is missed: 10x the best of the first, met where the interval reaches it.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.ratios import Median, median_of
from sentinode.dataset import PreparedDataset
from sentinode.images import UInt8Array
from sentinode.ingest import ResidentRows, RowSource, StreamedRows

GOAL_OVER_TIFS = 10.0
_BATCH_ROWS = 32
_WORKERS = (0, 1, 2)

Epoch = Callable[[int], Iterable[torch.Tensor]]


class TifRows(Dataset[tuple[torch.Tensor, int]]):
    """What a user would write first."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int]) -> None:
        self.paths, self.labels = paths, labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.paths[row]) as image:
            return torch.from_numpy(np.array(image)), self.labels[row]


class ParquetRows(Dataset[tuple[torch.Tensor, int]]):
    """The prepared rows, one table per shard."""

    def __init__(self, dataset: PreparedDataset) -> None:
        self.tables = [pq.read_table((dataset.root / shard.path).uri, columns=["label", "image"]) for shard in dataset.shards("train")]
        self.starts = np.cumsum([0, *(len(table) for table in self.tables)])
        self.side_px = dataset.manifest.patch_size_px

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        table, row = self.tables[shard], row - int(self.starts[shard])
        pixels = np.frombuffer(table["image"][row].as_py(), np.uint8).reshape(self.side_px, self.side_px, 3)
        return torch.from_numpy(pixels.copy()), table["label"][row].as_py()


def loader_epochs(rows: Dataset[tuple[torch.Tensor, int]], workers: int) -> Epoch:
    """Epochs of a DataLoader."""
    loader = DataLoader(rows, batch_size=_BATCH_ROWS, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    return lambda epoch: (batch for batch, _ in loader)


def source_epochs(source: RowSource) -> Epoch:
    """Epochs of ours."""

    def run(epoch: int) -> Iterator[torch.Tensor]:
        order = source.order(0, epoch, 1, _BATCH_ROWS)
        return source.batches([order[start : start + _BATCH_ROWS] for start in range(0, len(order), _BATCH_ROWS)])

    return run


def timed(run: Epoch, epoch: int, rows: int) -> tuple[float, float]:
    """Return the seconds of one epoch, and those until its first batch."""
    start, first, seen = time.perf_counter(), 0.0, 0
    for batch in run(epoch):
        first = first or time.perf_counter() - start
        seen += len(batch)
    seconds = time.perf_counter() - start
    if seen != rows:
        raise SystemExit(f"{seen} rows arrived, not {rows}")
    return seconds, first


def floor_us(images: UInt8Array) -> float:
    """Return the microseconds that copying a row takes, each once and in order."""
    batch = np.empty_like(images[:_BATCH_ROWS])

    def run() -> float:
        start = time.perf_counter()
        for first in range(0, len(images) - _BATCH_ROWS, _BATCH_ROWS):
            np.copyto(batch, images[first : first + _BATCH_ROWS])
        return time.perf_counter() - start

    return 1e6 * min(run() for _ in range(5)) / len(images)


def compare(name: str, ours: Epoch, peers: dict[str, Epoch], pairs: int, rows: int) -> dict[str, Median]:
    """Run ours and each peer in turns, print, and return the ratios peer / ours."""
    print(f"\n{name}", flush=True)
    times: dict[str, list[tuple[tuple[float, float], tuple[float, float]]]] = {peer: [] for peer in peers}
    for number in range(pairs):
        for peer, run in peers.items():
            if number % 2:
                theirs, own = timed(run, number, rows), timed(ours, number, rows)
            else:
                own, theirs = timed(ours, number, rows), timed(run, number, rows)
            times[peer].append((theirs, own))
    ratios = {}
    for peer, pair in times.items():
        ratios[peer] = median_of([theirs[0] / own[0] for theirs, own in pair])
        (theirs_s, theirs_first_s), (own_s, own_first_s) = np.median(np.asarray(pair), axis=0)
        print(
            f"  {peer:30} {rows / theirs_s:7.0f} rows/s (first batch {1e3 * theirs_first_s:4.0f} ms), "
            f"ours {rows / own_s:7.0f} ({1e3 * own_first_s:4.0f} ms): ratio {ratios[peer]}",
            flush=True,
        )
    return ratios


def main() -> int:
    """Run all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, metavar="DIR", help="folder in the Kaggle layout")
    parser.add_argument("--data", required=True, metavar="DATASET", help="what prepare made of it")
    parser.add_argument("--window-rows", type=int, default=1024, help="of stream; less than the rows, so that it streams (default 1024)")
    parser.add_argument("--pairs", type=int, default=7, help="turns of each pair, at least 7 (default 7)")
    args = parser.parse_args()
    if args.pairs < 7:
        parser.error("--pairs: at least 7")
    dataset = PreparedDataset.open(args.data)
    train = dataset.read_split("train")
    paths = dict(zip(dataset.index["id"].to_pylist(), dataset.index["source_path"].to_pylist(), strict=True))
    tifs = TifRows([str(Path(args.source) / paths[id_]) for id_ in train.ids.tolist()], train.labels.tolist())
    print(
        f"{len(train)} patches of {dataset.manifest.patch_size_px} px, batches of {_BATCH_ROWS}, {len(os.sched_getaffinity(0))} cores, "
        f"torch {torch.__version__}, Pillow {Image.__version__}, pyarrow {pq.core.pa.__version__}"
    )
    parquet = ParquetRows(dataset)
    over_tifs = {f"DataLoader over TIFs, {workers} workers": loader_epochs(tifs, workers) for workers in _WORKERS}
    over_parquet = {f"DataLoader over Parquet, {workers} workers": loader_epochs(parquet, workers) for workers in _WORKERS}
    peers, met = over_tifs | over_parquet, True
    streamed = StreamedRows(dataset, None, "cpu", args.window_rows)
    sources = {"resident": ResidentRows(train, "cpu"), f"stream, windows of {args.window_rows} rows": streamed}
    for run in (*peers.values(), *map(source_epochs, sources.values())):
        timed(run, 0, len(train))  # worker processes started, buffers made, files in the page cache
    for name, source in sources.items():
        ratios = compare(name, source_epochs(source), peers, args.pairs, len(train))
        for group, goal in ((over_tifs, GOAL_OVER_TIFS), (over_parquet, None)):
            best = min(group, key=lambda peer: ratios[peer].value)
            verdict = "" if goal is None else f"; goal {goal}: {'met' if ratios[best].high >= goal else 'missed'}"
            met &= goal is None or ratios[best].high >= goal
            print(f"  best: {best}, {ratios[best]}{verdict}")
        source.close()
    print(f"\nfloor, copying each row once: {floor_us(train.images):.1f} us a row")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
