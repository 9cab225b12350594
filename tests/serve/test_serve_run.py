"""`serve run` and the shipped config file, as a platform team uses them."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
import yaml

from sentinode.predictor import Predictor
from serve.auth import new_key
from serve.check import check_serve_file
from serve.local import usable_port
from tests.factories import make_bundle, random_patches
from tests.processes import ROOT
from tests.serve.patch_files import encode

pytestmark = [pytest.mark.ray, pytest.mark.serve, pytest.mark.slow]


def test_serve_run_answers_with_the_shipped_config(ray_address: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    key, line = new_key("test")
    (tmp_path / "keys").write_text(line + "\n")
    config = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    port = usable_port("127.0.0.1", 0)
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"bundle": str(bundle.path), "api_keys_file": str(tmp_path / "keys"), "max_replicas": 1}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    check_serve_file(tmp_path / "config.yaml")
    patch = random_patches(1)[0]
    expected = Predictor(bundle).decide(patch[None])[0]
    command = [str(Path(sys.executable).parent / "serve"), "run", str(tmp_path / "config.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"RAY_ADDRESS": ray_address}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            _wait_until_ready(client, process, 120)
            files = {"file": ("p.tif", encode(patch, "TIFF"))}
            assert client.post("/predict", files=files).status_code == 401
            answer = client.post("/predict", files=files, headers={"X-API-Key": key}).raise_for_status().json()
        assert answer["probabilities"]["Metastatic"] == pytest.approx(expected.probability, abs=1e-5)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _wait_until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]", deadline_s: float) -> None:
    end, poll = time.monotonic() + deadline_s, threading.Event()
    while True:
        assert process.poll() is None, "serve run has ended"
        assert time.monotonic() < end, "not ready in time"
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        poll.wait(0.2)
