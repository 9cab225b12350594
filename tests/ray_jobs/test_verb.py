import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.cli import main as sentinode
from ray_jobs.verb import add_common_arguments, config_from, execute
from sentinode.config import TrainConfig
from sentinode.errors import ConfigError, SentinodeError, UsageError
from tests.processes import ROOT


def _arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_common_arguments(parser, TrainConfig)
    return parser.parse_args(argv)


@pytest.mark.parametrize(("error", "code"), [(SentinodeError("x"), 1), (UsageError("x"), 2), (KeyboardInterrupt(), 3)])
def test_each_kind_of_error_has_its_exit_code_and_one_line(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: argparse.Namespace) -> dict[str, Any]:
        raise error

    assert execute(fail, _arguments()) == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def _say_twice_into(stdout: int) -> "subprocess.CompletedProcess[str]":
    script = "import sys; from ray_jobs.verb import say; say('one'); say('two'); sys.exit(3)"
    return subprocess.run([sys.executable, "-c", script], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, cwd=ROOT)


def test_a_reader_that_has_gone_ends_nothing_and_hides_no_exit_code() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = _say_twice_into(writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_stops_nobody() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    done = _say_twice_into(full)
    os.close(full)
    # Python says at the end that not everything could be written; the work itself went on to its end.
    assert "Traceback" not in done.stderr


def test_sigterm_takes_the_road_of_ctrl_c() -> None:
    def wait_for_it(args: argparse.Namespace) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
        return {}

    assert execute(wait_for_it, _arguments()) == 3


def test_sigterm_ends_a_command_that_ignores_ctrl_c() -> None:
    """As shells start background commands."""

    def wait_for_it(args: argparse.Namespace) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
        return {}

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert execute(wait_for_it, _arguments()) == 3
    finally:
        signal.signal(signal.SIGINT, before)


def test_json_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(lambda args: {"rows": 3}, _arguments("--json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": 3}


def test_settings_win_over_preset_and_preset_over_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 7\naugment: {dihedral: true, colour_jitter: 0.7}\n")
    config = config_from(_arguments("--config", str(file), "--preset", "seed", "--set", "augment.rotation_deg=5", "seed=1"), TrainConfig)
    assert (config.epochs, config.seed) == (7, 1)
    assert (config.augment.dihedral, config.augment.flip, config.augment.colour_jitter, config.augment.rotation_deg) == (False, True, 0.3, 5)


@pytest.mark.parametrize("name", ["nonsense", "../presets/seed"])
def test_an_unknown_preset_names_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--preset {name}: no such preset; there are: seed"):
        config_from(_arguments("--preset", name), TrainConfig)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--data", "{tmp}/none", "--out", "{tmp}/run"], "not a prepared data set: {tmp}/none (no dataset.json there)"),
        (["train", "--data", "{tmp}", "--out", "{tmp}/run", "--set", "epoch=3"], "unknown key epoch; did you mean epochs?"),
        (["train", "--data", "{tmp}", "--out", "{tmp}/run", "--set", "epochs=many"], "epochs: got 'many'"),
        (["train", "--data", "{tmp}", "--out", "{tmp}/run", "--set", "epochs"], "--set 'epochs': expected key=value"),
        (["tune", "--data", "{tmp}", "--out", "{tmp}/s"], "--config: a sweep needs its YAML"),
        (["tune", "--data", "{tmp}", "--out", "{tmp}/s", "--config", "{tmp}/none.yaml"], "config file {tmp}/none.yaml: No such file"),
        (["tune", "--data", "{tmp}", "--out", "{tmp}/s", "--config", "tune_configs/smoke.yaml"], "not a prepared data set: {tmp} "),
        (["evaluate", "--bundle", "{tmp}/none", "--data", "{tmp}", "--out", "{tmp}/r"], "not a model bundle: {tmp}/none (no bundle.json there)"),
        (["predict", "--bundle", "{tmp}/none", "--source", "{tmp}", "--out", "{tmp}/p"], "not a model bundle: {tmp}/none (no bundle.json there)"),
        (["export", "--bundle", "{tmp}/none", "--data", "{tmp}", "--engine", "openvino"], "not a model bundle: {tmp}/none (no bundle.json there)"),
        (["serve", "--bundle", "{tmp}/none", "--set", "auth=none"], "not a model bundle: {tmp}/none (no bundle.json there)"),
        (["serve", "--bundle", "{tmp}/none", "--set", "max_replica=3"], "unknown key max_replica; did you mean max_replicas?"),
        (["prepare", "--source", "{tmp}/none", "--out", "{tmp}/d"], "{tmp}/none"),
        (
            ["evaluate", "--bundle", "ftp://host/b", "--data", "{tmp}", "--out", "{tmp}/r"],
            "ftp:// is not supported; use a local path or one of s3://",
        ),
        (["synth", "--out", "{tmp}/x", "--count", "0"], "count"),
        (["verify", "{tmp}"], "nothing to verify"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(argv: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentinode([word.format(tmp=tmp_path) for word in argv]) == 2
    error = capsys.readouterr().err
    assert expected.format(tmp=tmp_path) in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["train"], ["train", "--data"]])
def test_argparse_errors_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sentinode(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("sentinode: ")
    assert error.count("\n") == 1
    assert "--help` tells how it is used" in error


@pytest.mark.parametrize("verb", ["prepare", "train", "tune", "evaluate", "predict", "export", "verify", "serve", "synth"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        sentinode([verb, "--help"])
    assert stop.value.code == 0
    assert f"usage: sentinode {verb}" in capsys.readouterr().out
