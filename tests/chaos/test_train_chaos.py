"""Training is killed for real; what comes out must be bitwise what an undisturbed run makes."""

import signal
from pathlib import Path

import psutil
import pytest

from sentinode.bundle import Bundle
from sentinode.dataset import PreparedDataset
from tests.factories import make_dataset
from tests.processes import running, sentinode

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

SETTINGS = ["arch=resnet18", "weights=none", "unfreeze_depth=5", "input_size_px=48", "epochs=6", "batch_size=8", "learning_rate=1e-3", "workers=2"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return make_dataset(tmp_path_factory.mktemp("chaos") / "data", train=201, val=41)


@pytest.fixture(scope="module")
def undisturbed(dataset: PreparedDataset, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the bundle of a run that nobody disturbed."""
    import ray

    out = tmp_path_factory.mktemp("chaos") / "undisturbed"
    done = sentinode(*_train(dataset, out), ray_address=ray.get_runtime_context().gcs_address)
    assert done.returncode == 0, done.stderr
    return Bundle.open(out / "bundle").manifest.digest


def _train(dataset: PreparedDataset, out: Path) -> list[str | Path]:
    return ["train", "--data", dataset.path, "--out", out, "--set", *SETTINGS]


def test_a_killed_driver_is_continued_by_the_same_command(dataset: PreparedDataset, undisturbed: str, ray_address: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running(*_train(dataset, out), ray_address=ray_address) as command:
        command.wait_for_line("epoch 2/6", 180)
        command.process.send_signal(signal.SIGKILL)
        command.process.wait(30)
    assert not (out / "bundle").exists()
    again = sentinode(*_train(dataset, out), ray_address=ray_address)
    assert again.returncode == 0, again.stderr
    assert "epoch 1/6" not in again.stdout
    assert Bundle.open(out / "bundle").manifest.digest == undisturbed


def test_sigterm_ends_with_code_3_and_the_same_command_continues(
    dataset: PreparedDataset, undisturbed: str, ray_address: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with running(*_train(dataset, out), ray_address=ray_address) as command:
        command.wait_for_line("epoch 2/6", 180)
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(90) == 3
    again = sentinode(*_train(dataset, out), ray_address=ray_address)
    assert again.returncode == 0, again.stderr
    assert "epoch 1/6" not in again.stdout
    assert Bundle.open(out / "bundle").manifest.digest == undisturbed


def test_a_killed_worker_is_replaced_without_being_asked(dataset: PreparedDataset, undisturbed: str, ray_address: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running(*_train(dataset, out), ray_address=ray_address) as command:
        command.wait_for_line("epoch 2/6", 180)
        workers = [process for process in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(process.cmdline())]
        assert len(workers) == 2
        workers[1].kill()
        command.wait_for_line("bundle: ", 240)
        assert command.process.wait(60) == 0
    assert Bundle.open(out / "bundle").manifest.digest == undisturbed
