"""Evaluating and combining are killed for real: there is no report and no bundle, never half a one, and the same command makes a whole one."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sentinode.bundle import Bundle
from sentinode.dataset import PreparedDataset
from tests.factories import make_bundle, make_dataset
from tests.processes import running, sentinode
from tests.ray_jobs.conftest import wait_until_all_free
from tests.ray_jobs.test_ensemble import trained_on

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

# Resampling so often takes seconds: a command that is killed when the answers are in has not yet written anything.
SAMPLES = "bootstrap_samples=3000"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("chaos") / "data", train=97, val=41, test=200)


def _kill_at(line: str, argv: Sequence[str | Path], ray_address: str) -> None:
    with running(*argv, ray_address=ray_address) as command:
        command.wait_for_line(line, 120)
        command.process.kill()
        assert command.process.wait() == -signal.SIGKILL
    wait_until_all_free(60)


def _run(argv: Sequence[str | Path], ray_address: str) -> None:
    done = sentinode(*argv, ray_address=ray_address)
    assert done.returncode == 0, done.stderr


def _report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    del content["created_at"]
    return content


def test_a_killed_evaluation_leaves_no_report_and_the_same_command_makes_it(dataset: PreparedDataset, ray_address: str, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle").path

    def evaluate(out: Path) -> list[str | Path]:
        return ["evaluate", "--bundle", bundle, "--data", dataset.path, "--out", out, "--set", SAMPLES, "robustness_rows=20"]

    _run(evaluate(tmp_path / "undisturbed"), ray_address)
    _kill_at("evaluate: 200/200", evaluate(tmp_path / "report"), ray_address)
    assert not (tmp_path / "report").exists()
    _run(evaluate(tmp_path / "report"), ray_address)
    assert _report(tmp_path / "report") == _report(tmp_path / "undisturbed")
    # An older report stays whole until the new one is.
    before = {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()}
    _kill_at("evaluate: 200/200", evaluate(tmp_path / "report"), ray_address)
    assert {file.name: file.read_bytes() for file in (tmp_path / "report").iterdir()} == before


def test_a_killed_ensemble_leaves_no_bundle_and_the_same_command_makes_it(dataset: PreparedDataset, ray_address: str, tmp_path: Path) -> None:
    members = [trained_on(dataset, fold, tmp_path / f"fold{fold}", bias=0.1 * fold).path for fold in (0, 1)]
    out = tmp_path / "ensemble"
    argv = ["ensemble", "--bundles", *members, "--data", dataset.path, "--out", out, "--set", SAMPLES]
    for line in ("member 00: ", "member 01: "):
        _kill_at(line, argv, ray_address)
        assert not out.exists()
    _run(argv, ray_address)
    assert len(Bundle.open(out).manifest.members) == 2
    assert not [path.name for path in tmp_path.iterdir() if "staging" in path.name]
