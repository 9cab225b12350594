"""Post test patches to a running endpoint and compare each probability with the offline one.

    sentinode predict --bundle BUNDLE --source KAGGLE/train --out predictions.parquet
    sentinode serve --bundle BUNDLE --set auth=none &
    python benchmarks/http_equals_offline.py --url http://127.0.0.1:8000 --data DATASET --predictions predictions.parquet --count 50

Prints the largest difference; exit code 1 if it is above 1e-5 or a decision differs.
"""

import argparse
import sys
from pathlib import Path

import httpx
import pyarrow.parquet as pq

from sentinode.dataset import PreparedDataset

TOLERANCE = 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--data", required=True, help="the prepared data set whose test patches are posted")
    parser.add_argument("--predictions", required=True, help="made by predict with the bundle that is served")
    parser.add_argument("--count", type=int, default=50)
    args = parser.parse_args()
    dataset = PreparedDataset.open(args.data)
    source = Path(dataset.manifest.source["path"])
    rows = [row for row in dataset.index.to_pylist() if row["split"] == "test"]
    rows = sorted(rows, key=lambda row: str(row["id"]))[: args.count]
    offline = {row["id"]: row for row in pq.read_table(args.predictions).to_pylist()}
    largest, wrong = 0.0, 0
    with httpx.Client(base_url=args.url, timeout=60, trust_env=False) as client:
        for row in rows:
            content = (source / row["source_path"]).read_bytes()
            answer = client.post("/predict", files={"file": ("patch", content)}).raise_for_status().json()
            expected = offline[row["id"]]
            largest = max(largest, abs(answer["probabilities"]["Metastatic"] - expected["probability"]))
            wrong += answer["prediction"] != expected["prediction"] or answer["model"]["digest"] != expected["model_digest"]
    print(f"{len(rows)} patches posted; largest difference of probabilities {largest:.2e}; {wrong} other decisions")
    return int(largest > TOLERANCE or wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
