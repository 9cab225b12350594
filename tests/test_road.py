"""The whole road through the command line: TIFs in, an HTTP answer out that equals the offline one."""

import json
import signal
from pathlib import Path

import httpx
import pyarrow.parquet as pq
import pytest

from ray_jobs.cli import main
from sentinode.dataset import PreparedDataset
from sentinode.manifests import read_report
from tests.processes import running, sentinode

pytestmark = [pytest.mark.ray, pytest.mark.serve]

SETTINGS = ["arch=resnet18", "weights=none", "unfreeze_depth=5", "input_size_px=48", "epochs=2", "batch_size=16", "learning_rate=1e-3", "workers=2"]
TOLERANCE = 1e-5


def test_from_a_folder_of_tifs_to_an_http_answer(ray_address: str, tmp_path: Path) -> None:
    patches, data, run, report, predictions = (tmp_path / name for name in ("patches", "data", "run", "report", "predictions.parquet"))

    def step(*argv: str | Path) -> dict[str, object]:
        done = sentinode(*argv, "--json", ray_address=ray_address)
        assert done.returncode == 0, done.stdout + done.stderr
        # Ray's and torch's warnings are for those who ask for them with -v.
        assert "arning" not in done.stderr
        result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return result

    step("synth", "--out", patches, "--count", "240", "--seed", "7")
    step("prepare", "--source", patches, "--out", data, "--set", "workers=2")
    step("train", "--data", data, "--out", run, "--set", *SETTINGS)
    evaluated = step("evaluate", "--bundle", run / "bundle", "--data", data, "--out", report)
    assert evaluated["roc_auc"] == read_report(report).roc_auc
    step("predict", "--bundle", run / "bundle", "--source", patches / "train", "--out", predictions)
    offline = {row["id"]: row for row in pq.read_table(predictions).to_pylist()}
    assert len(offline) == 240
    for folder in (data, run / "bundle", predictions):
        assert main(["verify", str(folder)]) == 0

    dataset = PreparedDataset.open(data)
    test_rows = [row for row in dataset.index.to_pylist() if row["split"] == "test"]
    with running("serve", "--bundle", run / "bundle", "--port", "0", "--set", "auth=none", "max_replicas=1", ray_address=ray_address) as server:
        url = server.wait_for_line("ready: ", 180).split()[1]
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            assert client.get("/readyz").status_code == 200
            assert client.get("/").json()["model_loaded"] is True
            for row in test_rows:
                content = (patches / row["source_path"]).read_bytes()
                answer = client.post("/predict", files={"file": ("p.tif", content)}).raise_for_status().json()
                expected = offline[row["id"]]
                assert answer["probabilities"]["Metastatic"] == pytest.approx(expected["probability"], abs=TOLERANCE)
                assert (answer["prediction"], answer["needs_review"]) == (expected["prediction"], expected["needs_review"])
            problem = client.post("/predict", files={"file": ("p.tif", content[:9000])})
            assert (problem.status_code, problem.headers["content-type"]) == (422, "application/problem+json")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
