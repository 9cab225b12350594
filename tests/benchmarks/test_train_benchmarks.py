"""The code paths of the training benchmarks, on a CPU and with next to no rows: that they run, compare the same thing and judge."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import train as train_benchmark
from benchmarks import train_gpu
from sentinode.config import TrainConfig
from sentinode.training import Group
from tests.factories import learnable_patches


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the benchmark, with a network and pixels that take no time."""

    def config_of(part: str, batch_size: int) -> TrainConfig:
        full = original(part, batch_size)
        return full.model_copy(update={"arch": "resnet18", "input_size_px": 32})

    original = train_benchmark.config_of
    monkeypatch.setattr(train_benchmark, "config_of", config_of)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("part", ["full", "frozen"])
def test_both_sides_train_the_same(part: str) -> None:
    config = train_benchmark.config_of(part, 4)
    rows = learnable_patches(12, 0, side_px=32)
    group = Group()
    ours = train_benchmark.Ours(config, rows, group)
    plain = train_benchmark.Plain(config, rows, group, train_benchmark.from_memory(config, rows, group))
    result = train_benchmark.compare(ours, plain, pairs=2)
    assert len(result["ratios"]) == 2
    # In the part where losses are compared, layers that train see the same batches; the others' rounding is amplified by Adam.
    assert max(result["loss_differences"]) < (1e-3 if part == "frozen" else 0.05)
    assert plain.epochs_done == ours.progress.epochs_done == 3


@pytest.mark.usefixtures("tiny")
def test_the_rest_of_a_step_is_a_part_of_it() -> None:
    parts = train_benchmark.outside(train_benchmark.config_of("outside", 4), learnable_patches(12, 0, side_px=32), epochs=2)
    assert all(0 < part < 1 for part in parts)


def test_a_missed_goal_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    result = {"ratios": [0.5] * 7, "first_batch_seconds": (1.0, 2.0), "loss_differences": [0.0], "peer_differences": [0.0]}
    assert not train_benchmark.report("full", result)
    assert "MISSED" in capsys.readouterr().out
    assert train_benchmark.report("full", result | {"ratios": [1.0] * 7})
    assert not train_benchmark.report("frozen", result | {"ratios": [1.4] * 7, "loss_differences": [0.0, 0.01]})


def test_the_gpu_benchmark_runs_wherever(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpu, "GOAL_OF_CEILING", 0.0)
    monkeypatch.setattr(train_gpu, "GOAL_FULL_SECONDS", 1e6)
    sizes = ["--rows", "12", "--val-rows", "6", "--steps", "2", "--batch-size", "4", "--pairs", "6", "--sizes", "32", "--depths", "1"]
    monkeypatch.setattr("sys.argv", ["train_gpu", "--device", "cpu", *sizes])
    assert train_gpu.main() == 0
    printed = capsys.readouterr().out
    assert "32 px, depth 1, batch 4" in printed
    assert "of the ceiling" in printed


def test_a_gpu_that_is_not_there_is_wrong_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["train_gpu"])
    with pytest.raises(SystemExit) as stopped:
        train_gpu.main()
    assert stopped.value.code == 2


def test_the_ceiling_hands_out_the_same_pixels(tmp_path: Path) -> None:
    source = train_gpu.ResidentRows(learnable_patches(8, 0, side_px=32), "cpu")
    mock = train_gpu.MockRows(source, 4)
    first, second = (batch.clone() for batch in mock.batches([np.array([0, 1, 2, 3]), np.array([4, 5])]))
    assert torch.equal(first[:2], second)
    np.testing.assert_array_equal(mock.order(0, 0, 1, 4), source.order(0, 0, 1, 4))
