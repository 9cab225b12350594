"""Real patches, where the folder named by SENTINODE_HCD has some."""

import json
import os
from pathlib import Path

import pytest

from tests.processes import sentinode

HCD = os.environ.get("SENTINODE_HCD")

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.ray,
    pytest.mark.skipif(not HCD, reason="SENTINODE_HCD names no folder of real patches"),
]


def test_a_small_network_learns_something_real_in_three_epochs(ray_address: str, tmp_path: Path) -> None:
    settings = ["arch=resnet18", "weights=none", "unfreeze_depth=5", "input_size_px=64", "epochs=3", "learning_rate=1e-3", "workers=2"]
    for argv in (
        ["prepare", "--source", str(HCD), "--out", tmp_path / "data"],
        ["train", "--data", tmp_path / "data", "--out", tmp_path / "run", "--set", *settings],
        ["evaluate", "--bundle", tmp_path / "run" / "bundle", "--data", tmp_path / "data", "--out", tmp_path / "report"],
    ):
        done = sentinode(*argv, "--json", ray_address=ray_address, timeout_s=1200)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["roc_auc"] > 0.75
