"""The whole road as jobs of a cluster that asks for a token: three nodes beside the head, all data in an object store, real patches.

In each job that takes a while, a node that is seen to be doing its work is killed, and another one joins. Nothing is lost: every patch is there once,
and the report's figure is what scikit-learn makes of the predictions.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from sentinode.client import Client
from sentinode.dataset import PreparedDataset
from sentinode.locations import locate
from sentinode.verify import verify_folder
from tests import s3
from tests.heads import HeadMachine, machine_for_a_head
from tests.processes import ROOT

HCD = os.environ.get("SENTINODE_HCD")

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.ray,
    pytest.mark.skipif(not HCD, reason="SENTINODE_HCD names no folder of real patches"),
]

NODES, CPUS = 3, 2
NETWORK = ["arch=resnet34", "weights=none", "unfreeze_depth=5", "input_size_px=32", "learning_rate=1e-3"]
API_KEY = "sn_road"
TRIAL = r"ray::(Trial|ResourceTrainable)"
INFERENCE = r"BundleActor\)\)\.submit"
"""The name of an actor while it works on a shard or a part; between two it has a shorter one."""


class Road:
    """The cluster, and what is asked of it."""

    def __init__(self, machine: HeadMachine, temporary: Path) -> None:
        self.machine, self._temporary = machine, temporary
        self.killed: list[str] = []
        for _ in range(NODES):
            self.join()

    def join(self) -> None:
        """Add a node with temporary files of its own."""
        folder = self._temporary / f"node{len(self.machine.nodes)}"
        folder.mkdir()
        self.machine.join(CPUS, {"TMPDIR": str(folder)})

    def wait_for_nodes(self) -> None:
        """Wait until all nodes that live have joined."""
        living = sum(node.poll() is None for node in self.machine.nodes)
        self._until(lambda: self._cpus() == living * CPUS, "the nodes have not joined")

    def submit(self, *argv: str, doing: str | None = None, when: str = "") -> dict[str, Any]:
        """Run a verb as a job to its end; once it has said `when`, kill the node that runs a process like `doing`.

        A log is followed with a delay, in which short work ends: where `when` is said long before the work begins, its process is waited for.
        """
        self.wait_for_nodes()
        command = [sys.executable, "-m", "ray_jobs.cli", "submit", *argv, "--address", self.machine.head.job_server, "--json"]
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self._environment, cwd=ROOT)
        lines: list[str] = []
        assert job.stdout is not None
        for line in job.stdout:
            lines.append(line)
            if doing is not None and line.startswith(when):
                self._kill(doing)
                self.killed.append(f"{argv[0]}: the node with {doing}, after {line.strip()!r}")
                self.join()
                doing = None
        assert job.wait() == 0, "".join(lines)
        assert doing is None, "".join(lines)
        self._until(lambda: self._cpus("available") == self._cpus(), "CPUs are still taken")
        result: dict[str, Any] = json.loads(lines[-1])["result"]
        return result

    def serve(self, *argv: str, timeout_s: float = 120) -> str:
        """Run Ray's `serve` against the job server and return what it prints."""
        command = [str(Path(sys.executable).parent / "serve"), *argv, "--address", self.machine.head.job_server]
        done = subprocess.run(command, capture_output=True, text=True, env=self._environment, timeout=timeout_s)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @property
    def _environment(self) -> dict[str, str]:
        return os.environ | self.machine.head.environment

    def _kill(self, doing: str) -> None:
        deadline = time.monotonic() + 120
        while not any(self._killed(node, doing) for node in self.machine.nodes):
            assert time.monotonic() < deadline, f"no node runs {doing}"
            time.sleep(0.02)

    def _killed(self, node: "subprocess.Popen[bytes]", doing: str) -> bool:
        """Kill a node if it runs a process like `doing`."""
        try:
            processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return False
        if not any(re.search(doing, _command_line(process)) for process in processes):
            return False
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        return True

    def _cpus(self, which: str = "total") -> float:
        """CPUs of the nodes that live, by Ray's own account."""
        code = f"import ray; ray.init(address={self.machine.head.ray_address!r}, logging_level='ERROR'); "
        code += f"print(ray.{'cluster' if which == 'total' else 'available'}_resources().get('CPU', 0))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=self._environment, timeout=120)
        assert done.returncode == 0, done.stderr
        return float(done.stdout.splitlines()[-1])

    def _until(self, condition: Any, otherwise: str) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert time.monotonic() < deadline, otherwise
            time.sleep(1)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture
def bucket(s3_server: s3.Server) -> Iterator[str]:
    """A bucket with the real patches in it."""
    with s3.fresh_clients():
        bucket, folder = s3_server.new_bucket(), Path(str(HCD))
        files = [path for path in folder.rglob("*") if path.suffix in (".tif", ".csv")]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda path: (locate(bucket) / "hcd" / path.relative_to(folder).as_posix()).put_file(path), files))
        yield bucket


@pytest.fixture
def road(bucket: str, s3_server: s3.Server, tmp_path: Path) -> Iterator[Road]:
    environment = {**s3_server.environment, "SENTINODE_API_KEYS": API_KEY}
    with machine_for_a_head(cpus=0, environment=environment) as machine:
        machine.start()
        yield Road(machine, tmp_path)


def test_the_whole_road_loses_nothing(road: Road, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, sweep, report, predictions = (f"{bucket}/{name}" for name in ("data", "run", "sweep", "report", "predictions"))
    began = time.monotonic()

    prepared = road.submit("prepare", "--source", f"{bucket}/hcd", "--out", data, doing="_prepare_here", when="decode:")
    dataset = PreparedDataset.open(data)
    assert dataset.verify() == []
    assert sum(counts.rows for counts in dataset.manifest.counts.values()) + sum(dataset.manifest.rejected.values()) == 5000

    settings = ["--set", *NETWORK, "epochs=2", "workers=2", f"cpus_per_worker={CPUS}"]
    trained = road.submit("train", "--data", data, "--out", run, *settings, doing="RayTrainWorker", when="epoch 1/")
    config = tmp_path / "sweep.yaml"
    base = dict(setting.split("=") for setting in NETWORK if "learning_rate" not in setting)
    base |= {"arch": "resnet18", "epochs": 2, "use_gpu": False}
    base = {key: yaml.safe_load(str(value)) for key, value in base.items()}
    config.write_text(yaml.safe_dump({"space": {"learning_rate": {"grid": [1e-4, 1e-3]}}, "trials": 1, "base": base}))
    tuned = road.submit("tune", "--data", data, "--out", sweep, "--config", str(config), doing=TRIAL, when="trial 00000 epoch 1")
    evaluated = road.submit("evaluate", "--bundle", f"{run}/bundle", "--data", data, "--out", report, "--set", "workers=2", doing=INFERENCE)
    small = ["--set", "rows_per_part=200", "workers=2"]
    predicted = road.submit(
        "predict", "--bundle", f"{run}/bundle", "--source", f"{bucket}/hcd", "--out", predictions, *small, doing=INFERENCE, when="predict: "
    )
    assert predicted["rows"] == 5000
    for folder in (f"{run}/bundle", f"{sweep}/bundle", predictions):
        assert verify_folder(folder)[1] == [], folder

    manifest = json.loads((locate(predictions) / "_manifest.json").read_bytes())
    rows = {}
    for part in manifest["parts"]:
        with (locate(predictions) / part["path"]).open_input() as file:
            rows |= {row["id"]: row for row in pq.read_table(file).to_pylist()}
    assert len(rows) == 5000
    test = dataset.index.to_pandas().query("split == 'test'")
    assert roc_auc_score(test["label"], [rows[id_]["logit"] for id_ in test["id"]]) == pytest.approx(evaluated["roc_auc"], abs=1e-9)

    served = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served["http_options"]["port"] = port
    served["applications"][0]["args"] |= {"bundle": f"{run}/bundle", "min_replicas": 2, "max_replicas": 2}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(served))
    road.serve("deploy", str(tmp_path / "serve.yaml"))
    url = f"http://127.0.0.1:{port}"
    _wait_until_ready(url)
    with Client(url, api_key=API_KEY) as client:
        for path in sorted((Path(str(HCD)) / "train").glob("*.tif"))[:20]:
            answer = client.predict(path)
            assert answer.model.digest == trained["digest"]
            assert answer.probabilities.Metastatic == pytest.approx(rows[path.stem]["probability"], abs=1e-5)
    assert httpx.post(f"{url}/predict", trust_env=False).status_code == 401
    with capsys.disabled():
        print(f"\nthe road in {time.monotonic() - began:.0f} s; killed {len(road.killed)} nodes:", *road.killed, sep="\n  ")
        print(f"  data {prepared['fingerprint'][:16]} bundle {trained['digest'][:16]} sweep {tuned['digest'][:16]} AUC {evaluated['roc_auc']:.4f}")


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 300
    while True:
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        assert time.monotonic() < deadline
        time.sleep(1)
