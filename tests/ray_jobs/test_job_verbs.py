"""Every verb as a job of a real head with its job server and a token: by plain `ray job submit`, and by `sentinode submit`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.synth import synthesize
from ray_jobs.cli import JOBS
from sentinode.bundle import Bundle
from sentinode.dataset import PreparedDataset
from sentinode.manifests import read_engine_manifest, read_predictions_manifest, read_report
from sentinode.verify import verify_folder
from tests.heads import Head, head_with_token

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRAIN = ["arch=resnet18", "weights=none", "unfreeze_depth=5", "input_size_px=32", "epochs=1", "batch_size=16", "workers=1"]
SWEEP = """\
space: {learning_rate: {grid: [2.0e-3, 2.0e-4]}}
searcher: grid
base: {arch: resnet18, weights: none, unfreeze_depth: 5, input_size_px: 32, epochs: 1, batch_size: 16}
"""
WAYS = ["ray job submit", "sentinode submit"]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_with_token() as head:
        yield head


def commands(source: Path, folder: Path, sweep: str | Path) -> list[list[str | Path]]:
    """The whole road, each verb once, into `folder`."""
    data, run, searched, both = (folder / name for name in ("data", "run", "sweep", "both"))
    return [
        ["prepare", "--source", source, "--out", data],
        ["train", "--data", data, "--out", run, "--set", *TRAIN],
        ["tune", "--data", data, "--out", searched, "--config", sweep],
        ["evaluate", "--bundle", run / "bundle", "--data", data, "--out", folder / "report", "--set", "bootstrap_samples=100", "robustness_rows=0"],
        ["predict", "--bundle", run / "bundle", "--source", source / "train", "--out", folder / "p.parquet"],
        ["ensemble", "--bundles", run / "bundle", searched / "bundle", "--data", data, "--out", both, "--set", "bootstrap_samples=100"],
        ["export", "--bundle", run / "bundle", "--data", data, "--engine", "onnxruntime", "--set", "timing_rounds=1"],
    ]


def submit(head: Head, way: str, command: list[str | Path]) -> int:
    """Run a verb as a job and return the exit code of the command that submitted it."""
    if way == "sentinode submit":
        done = head.run("sentinode", "submit", *command)
    else:
        verb, *arguments = command
        done = head.run("ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", f"ray_jobs.{verb}", *arguments)
    # Shown where the test fails.
    print(way, *command, done.stdout, done.stderr, sep="\n")
    return done.returncode


def made(folder: Path) -> dict[str, Any]:
    """What tells whether two roads came to the same, after every manifest was found whole."""
    for name in ("data", "run/bundle", "sweep/bundle", "both", "p.parquet"):
        assert verify_folder(folder / name)[1] == []
    report, predictions = read_report(folder / "report"), read_predictions_manifest(folder / "p.parquet")
    engine = read_engine_manifest(folder / "run/bundle/engines/onnxruntime")
    return {
        "data": PreparedDataset.open(folder / "data").manifest.fingerprint,
        "bundles": [Bundle.open(folder / name).manifest.digest for name in ("run/bundle", "sweep/bundle", "both")],
        "report": (report.bundle["digest"], report.roc_auc, report.confusion),
        "predictions": predictions.rows,
        "engine": engine.bundle_digest,
    }


@pytest.mark.timeout(1500)
def test_every_verb_runs_as_a_job_and_both_ways_come_to_the_same(head: Head, tmp_path: Path) -> None:
    source = synthesize(tmp_path / "source", 200, 1)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(SWEEP)
    results = []
    for number, way in enumerate(WAYS):
        road = commands(source, tmp_path / f"road-{number}", sweep)
        assert {command[0] for command in road} == set(JOBS)
        for command in road:
            assert submit(head, way, command) == 0, (way, command)
        results.append(made(tmp_path / f"road-{number}"))
    assert results[0] == results[1]
    assert results[0]["predictions"] == 200


@pytest.mark.parametrize("way", WAYS)
def test_a_verb_that_fails_fails_the_command_that_submitted_it(head: Head, way: str, tmp_path: Path) -> None:
    nowhere = ["prepare", "--source", tmp_path / "nowhere", "--out", tmp_path / "out"]
    # Ray's own command knows one code for every failure.
    assert submit(head, way, nowhere) == (2 if way == "sentinode submit" else 1)
    assert not (tmp_path / "out").exists()
