"""How pixels are best stored in Parquet: bytes, write and read time of every layout, compression and row-group size, on the same patches in turns.

    python -m benchmarks.parquet_formats --source kaggle/ --count 1000 --rounds 7

One core, files in a temporary folder, so in the page cache: what is compared is the work, not the disk. Writing starts from pixels in memory and
ends with a closed file; reading ends with uint8 (n, 96, 96, 3) in memory, PNG and WebP decoded by Pillow. Medians of the rounds; the ratio columns
are medians of per-round ratios to raw pixels as fixed-size binary, uncompressed, in row groups of 256, with the interval of the sign test.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.ratios import median_of
from data_prep.decode import read_patches
from data_prep.sources.detect import open_source, reader_of
from sentinode.config import PrepareConfig
from sentinode.dataset import column_to_images, images_to_column
from sentinode.images import UInt8Array

_SIDE = 96


@dataclass(frozen=True)
class Layout:
    """One way to make a column of patches, and back."""

    name: str
    encode: Callable[[UInt8Array], pa.Array]
    decode: Callable[[pa.ChunkedArray], UInt8Array]


def _tensor(images: UInt8Array) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))


def _from_tensor(column: pa.ChunkedArray) -> UInt8Array:
    return np.concatenate([chunk.to_numpy_ndarray() for chunk in column.chunks])


def _encoded(**options: object) -> Callable[[UInt8Array], pa.Array]:
    def encode(images: UInt8Array) -> pa.Array:
        files = []
        for image in images:
            buffer = BytesIO()
            Image.fromarray(image).save(buffer, **options)
            files.append(buffer.getvalue())
        return pa.array(files, pa.binary())

    return encode


def _decoded(column: pa.ChunkedArray) -> UInt8Array:
    return np.stack([np.asarray(Image.open(BytesIO(value.as_py())).convert("RGB")) for value in column])


LAYOUTS = (
    Layout("fixed-size binary", images_to_column, lambda column: column_to_images(column, _SIDE)),
    Layout("fixed-shape tensor", _tensor, _from_tensor),
    Layout("PNG", _encoded(format="PNG"), _decoded),
    Layout("WebP lossless", _encoded(format="WEBP", lossless=True), _decoded),
)
CASES = [
    *((LAYOUTS[0], compression, 256) for compression in ("none", "lz4", "snappy", "zstd")),
    *((LAYOUTS[0], "none", rows) for rows in (16, 64, 1024, 4096)),
    *((layout, compression, 256) for layout in LAYOUTS[1:] for compression in ("none", "zstd")),
]


def write(case: tuple[Layout, str, int], images: UInt8Array, path: Path) -> None:
    """Make one file."""
    layout, compression, rows = case
    with pq.ParquetWriter(
        path, pa.schema([("image", layout.encode(images[:1]).type)]), compression=compression, use_dictionary=False, write_statistics=False
    ) as writer:
        for start in range(0, len(images), rows):
            writer.write_table(pa.table({"image": layout.encode(images[start : start + rows])}), row_group_size=rows)


def read(case: tuple[Layout, str, int], path: Path) -> UInt8Array:
    """Read one file back into pixels."""
    return case[0].decode(pq.read_table(path, use_threads=False)["image"])


def main() -> int:
    """Measure every case in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, metavar="DIR", help="folder in the Kaggle layout")
    parser.add_argument("--count", type=int, default=1000, help="patches (default 1000)")
    parser.add_argument("--rounds", type=int, default=7, help="at least 7 (default 7)")
    args = parser.parse_args()
    if args.rounds < 7:
        parser.error("--rounds: at least 7")
    source = open_source(PrepareConfig(), args.source)
    images = np.concatenate([part.copy() for part, _, _ in read_patches(reader_of(source.reader), source.entries.slice(0, args.count), _SIDE)])
    print(f"{len(images)} patches, pyarrow {pa.__version__}, Pillow {Image.__version__}, one core\n")
    seconds: dict[int, tuple[list[float], list[float]]] = {number: ([], []) for number in range(len(CASES))}
    sizes: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="sentinode-bench-") as folder:
        for _ in range(args.rounds):
            for number, case in enumerate(CASES):
                path = Path(folder) / "patches.parquet"
                start = time.perf_counter()
                write(case, images, path)
                written = time.perf_counter()
                back = read(case, path)
                seconds[number][0].append(written - start)
                seconds[number][1].append(time.perf_counter() - written)
                sizes[number] = path.stat().st_size
                if not np.array_equal(back, images):
                    print(f"{case[0].name}: what was read is not what was written", file=sys.stderr)
                    return 1
    print("| layout | compression | rows a group | bytes a patch | write us | read us | write time, x raw | read time, x raw |")
    print("|---|---|---|---|---|---|---|---|")
    for number, (layout, compression, rows) in enumerate(CASES):
        per_patch = [1e6 * float(np.median(values)) / len(images) for values in seconds[number]]
        ratios = [median_of([own / raw for own, raw in zip(seconds[number][k], seconds[0][k], strict=True)]) for k in (0, 1)]
        texts = [f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for ratio in ratios]
        cells = [layout.name, compression, str(rows), f"{sizes[number] / len(images):.0f}", f"{per_patch[0]:.0f}", f"{per_patch[1]:.0f}", *texts]
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
