import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from ray_jobs import checkpoint_writers
from ray_jobs.checkpoint_writers import CheckpointWriter
from ray_jobs.checkpoints import (
    ABOUT_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    Saved,
    best_and_last,
    lacking_room,
    last_good,
    metrics_of,
    remove_newer,
    restore,
    saved_checkpoints,
    tidy,
)
from sentinode.config import TrainConfig
from sentinode.errors import TrainingError, UsageError
from sentinode.learner import Learner
from sentinode.locations import Location, locate
from sentinode.training import PartialEpoch, Progress

CONFIG = TrainConfig(weights="none", unfreeze_depth=5, input_size_px=32, epochs=4)


def _progress(*val_losses: float, partial: bool = False) -> Progress:
    progress = Progress()
    for epoch, loss in enumerate(val_losses):
        progress.add({"epoch": epoch, "val_loss": loss, "val_roc_auc": None}, "val_loss")
    progress.partial = PartialEpoch([[2, 3]], [[1.0, 2.0, 3.0]] * 2, 0.5) if partial else None
    return progress


def _lay_down(run: Path, number: int, progress: Progress, *, world_size: int = 2, value: float = 1.0) -> Path:
    """A checkpoint as workers leave it, with one weight."""
    folder = run / f"checkpoint_{number:06d}_{os.urandom(3).hex()}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.tensor([value])}, folder / WEIGHTS_FILE)
    torch.save({}, folder / STATE_FILE)
    for rank in range(world_size):
        torch.save({}, folder / f"rank{rank}.pt")
    about = {"format_version": 1, "number": number, "world_size": world_size, "ingest": "resident", "device": "cpu", "config": {}}
    (folder / ABOUT_FILE).write_text(json.dumps(about | {"progress": asdict(progress)}))
    return folder


def test_the_best_and_the_newest_are_found_by_what_lies_there(tmp_path: Path) -> None:
    best = _lay_down(tmp_path, 2, _progress(0.9, 0.5))
    newest = _lay_down(tmp_path, 4, _progress(0.9, 0.5, 0.7, partial=True))
    found, last = best_and_last(locate(tmp_path))
    assert found is not None
    assert last is not None
    assert (found.path, last.path) == (locate(best), locate(newest))
    assert last.progress == _progress(0.9, 0.5, 0.7, partial=True)
    assert last.where == "within epoch 4"


def test_equal_values_do_not_confuse_which_epoch_was_the_best(tmp_path: Path) -> None:
    first = _lay_down(tmp_path, 1, _progress(0.5))
    _lay_down(tmp_path, 2, _progress(0.5, 0.5))
    assert best_and_last(locate(tmp_path))[0] == Saved.open(locate(first))


def test_before_the_first_epoch_is_done_there_is_no_best(tmp_path: Path) -> None:
    path = _lay_down(tmp_path, 1, _progress(partial=True))
    assert best_and_last(locate(tmp_path)) == (None, Saved.open(locate(path)))


def test_a_lost_best_checkpoint_is_told(tmp_path: Path) -> None:
    _lay_down(tmp_path, 2, _progress(0.5, 0.9))
    with pytest.raises(TrainingError, match="the checkpoint of the best epoch, 1, is gone"):
        best_and_last(locate(tmp_path))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    "damage",
    [
        *(lambda path, name=name: (path / name).unlink() for name in (ABOUT_FILE, WEIGHTS_FILE, STATE_FILE, "rank0.pt", "rank1.pt")),
        lambda path: _cut(path / ABOUT_FILE),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_never_gone_on_from(damage: Callable[[Path], None], tmp_path: Path) -> None:
    whole = _lay_down(tmp_path, 1, _progress(0.9))
    torn = _lay_down(tmp_path, 2, _progress(0.9, 0.5))
    damage(torn)
    assert Saved.open(locate(torn)) is None
    tidy(locate(tmp_path))
    assert [saved.path for saved in saved_checkpoints(locate(tmp_path))] == [locate(whole)]
    assert not torn.exists()
    assert _what_ray_reads(tmp_path) == ([whole], whole)


@pytest.mark.parametrize(("ours", "other"), [('"format_version": 1', '"format_version": 2'), ('"device": "cpu", ', "")])
def test_a_checkpoint_of_another_version_is_neither_read_nor_cleared_away(ours: str, other: str, tmp_path: Path) -> None:
    path = _lay_down(tmp_path, 1, _progress(0.9))
    about = path / ABOUT_FILE
    assert ours in about.read_text()
    about.write_text(about.read_text().replace(ours, other))
    with pytest.raises(UsageError, match="made by another version"):
        tidy(locate(tmp_path))
    assert about.exists()


def _what_ray_reads(run: Path) -> tuple[list[Path], Path]:
    """(kept, worst first; newest) as Ray Train finds them when a run is started again."""
    from ray.train import Result

    result = Result.from_path(str(run))
    assert result.checkpoint is not None
    assert result.best_checkpoints is not None
    return [Path(checkpoint.path) for checkpoint, _ in result.best_checkpoints], Path(result.checkpoint.path)


@pytest.mark.parametrize("snapshot", [None, "", '{"ray_version": "2.60', '{"checkpoint_results": []}'])
def test_ray_is_told_what_lies_there_whatever_its_own_notes_have_become(snapshot: str | None, tmp_path: Path) -> None:
    _lay_down(tmp_path, 1, _progress(0.9))
    best = _lay_down(tmp_path, 2, _progress(0.9, 0.5))
    _lay_down(tmp_path, 3, _progress(0.9, 0.5, 0.6))
    newest = _lay_down(tmp_path, 4, _progress(0.9, 0.5, 0.6, partial=True))
    if snapshot is not None:
        (tmp_path / "checkpoint_manager_snapshot.json").write_text(snapshot)
    tidy(locate(tmp_path))
    assert _what_ray_reads(tmp_path) == ([newest, best], newest)
    assert {path.name for path in tmp_path.glob("checkpoint_*/")} == {best.name, newest.name}


def test_notes_of_checkpoints_that_are_all_gone_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    tidy(locate(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_a_failed_attempt_wrote_after_the_checkpoint_gone_on_from_is_removed(tmp_path: Path) -> None:
    kept = [_lay_down(tmp_path, number, _progress(0.9)) for number in (1, 2)]
    _lay_down(tmp_path, 3, _progress(0.9, 0.5))
    (tmp_path / "checkpoint_000004_torn").mkdir()
    remove_newer(locate(tmp_path), 2)
    assert sorted(tmp_path.glob("checkpoint_*")) == kept


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("remove", [lambda run: remove_newer(run, 2), tidy])
def test_a_checkpoint_whose_removal_was_killed_no_longer_counts(
    remove: Callable[[Location], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither the best nor the newest one once the run has gone on from number 2.
    kept, removed = _lay_down(tmp_path, 2, _progress(0.9)), _lay_down(tmp_path, 3, _progress(0.9, 0.5))
    if remove is tidy:
        kept = _lay_down(tmp_path, 4, _progress(0.9, 0.5, 0.4))

    def killed(path: Location) -> None:
        raise _Killed

    monkeypatch.setattr(Location, "remove_tree", killed)
    with pytest.raises(_Killed):
        remove(locate(tmp_path))
    assert any(path.name != ABOUT_FILE for path in removed.iterdir())
    assert locate(kept) in [saved.path for saved in saved_checkpoints(locate(tmp_path))]
    assert len(saved_checkpoints(locate(tmp_path))) < len(list(tmp_path.glob("checkpoint_*/")))


def test_a_checkpoint_that_cannot_be_taken_away_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _lay_down(tmp_path, 1, _progress(0.9))

    def refused(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(UsageError, match=r"checkpoint_000001_\w+: cannot be written \(Permission denied\)"):
        remove_newer(locate(tmp_path), 0)


def test_the_last_good_checkpoint_has_finite_weights(tmp_path: Path) -> None:
    good = _lay_down(tmp_path, 1, _progress(0.9))
    _lay_down(tmp_path, 2, _progress(0.9, partial=True), value=float("nan"))
    assert last_good(locate(tmp_path)) == Saved.open(locate(good))


def test_a_checkpoint_within_an_epoch_cannot_be_taken_for_a_finished_one() -> None:
    assert metrics_of(_progress(0.9, 0.5), 7) == {"epoch": 1, "val_loss": 0.5, "number": 7, "epochs_done": 2, "improvement": 2}
    assert metrics_of(_progress(0.9, 0.5, partial=True), 8) == {"number": 8, "epochs_done": 2, "improvement": 0}


# The smallest network of the ResNet kind, 4.9 million weights.
def _learner(config: TrainConfig = CONFIG) -> Learner:
    torch.manual_seed(1)
    learner = Learner(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=2), config)
    _step(learner)
    return learner


def _step(learner: Learner) -> None:
    learner.schedule.before_step(0.5)
    learner.train_mode()
    inputs, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1])
    learner.backward(nn.functional.cross_entropy(learner.forward(inputs), labels))
    learner.step()


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.kept.state_dict().items()}


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class _Ray:
    """Stands for Ray Train's `report` with one thread that uploads."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []
        self.errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def report(self, metrics: dict[str, Any], *, checkpoint_dir_name: str, checkpoint_upload_fn: Any, **_: Any) -> None:
        def upload() -> None:
            try:
                checkpoint_upload_fn(None, checkpoint_dir_name)
            except CheckpointError as error:
                self.errors.append(error)

        self.metrics.append(metrics)
        self._threads.append(threading.Thread(target=upload))
        self._threads[-1].start()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join()


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Ray]:
    fake = _Ray()
    monkeypatch.setattr("ray.train.report", fake.report)
    yield fake
    fake.wait()


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "request.json").write_text('{"id": "1"}')
    return tmp_path


def _writer(run: Path, rank: int = 0, number: int = 0) -> CheckpointWriter:
    return CheckpointWriter(locate(run), "1", CONFIG, "resident", rank, 1, number)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing gets to the disk until the event is set."""
    ready, write = threading.Event(), checkpoint_writers._write

    def wait_and_write(*args: Any) -> None:
        ready.wait()
        write(*args)

    monkeypatch.setattr(checkpoint_writers, "_write", wait_and_write)
    yield ready
    ready.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(run_folder: Path, fake_ray: _Ray, slow_disk: threading.Event) -> None:
    learner = _learner()
    then = _weights(learner)
    _writer(run_folder, number=6).save(learner, _progress(0.9))
    _step(learner)
    assert saved_checkpoints(locate(run_folder)) == []
    slow_disk.set()
    fake_ray.wait()
    (saved,) = saved_checkpoints(locate(run_folder))
    assert (saved.number, saved.world_size, saved.ingest, saved.device, saved.progress) == (7, 1, "resident", "cpu", _progress(0.9))
    assert _equal(saved.weights(), then)
    assert not _equal(_weights(learner), then)


def test_there_is_one_copy_in_memory_at_most(run_folder: Path, fake_ray: _Ray, slow_disk: threading.Event) -> None:
    learner, writer = _learner(), _writer(run_folder)
    writer.save(learner, _progress(0.9))
    second = threading.Thread(target=writer.save, args=(learner, _progress(0.9, 0.5)))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert len(fake_ray.metrics) == 1
    slow_disk.set()
    second.join(60)
    fake_ray.wait()
    assert [saved.number for saved in saved_checkpoints(locate(run_folder))] == [1, 2]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimiser": "sgd", "schedule": "one_cycle", "ema_decay": 0.9, "dropout": 0.3},
        {"optimiser": "adamw", "channels_last": False, "unfreeze_depth": 1},
    ],
)
def test_a_restored_learner_goes_on_bitwise(settings: dict[str, Any], run_folder: Path, fake_ray: _Ray) -> None:
    config = CONFIG.model_copy(update=settings)
    learner = _learner(config)
    _writer(run_folder).save(learner, _progress(0.9))
    fake_ray.wait()
    _step(learner)
    other = _learner(config)
    _step(other)
    (saved,) = saved_checkpoints(locate(run_folder))
    restore(other, saved, rank=0)
    _step(other)
    assert _equal(_weights(other), _weights(learner))


def test_a_full_disk_is_one_line_that_names_the_folder_and_leaves_the_checkpoint_before(
    run_folder: Path, fake_ray: _Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, writer = _learner(), _writer(run_folder)
    writer.save(learner, _progress(0.9))
    fake_ray.wait()
    write = checkpoint_writers._write

    def write_until_full(path: Path, data: bytes, written: list[Path]) -> None:
        if path.name == STATE_FILE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data, written)

    monkeypatch.setattr(checkpoint_writers, "_write", write_until_full)
    writer.save(learner, _progress(0.9, 0.5))
    fake_ray.wait()
    assert [str(error) for error in fake_ray.errors] == [
        f"{run_folder}: a checkpoint cannot be written (No space left on device); make room there and repeat the command"
    ]
    assert [saved.number for saved in saved_checkpoints(locate(run_folder))] == [1]
    assert [path.name for path in run_folder.glob("checkpoint_000002_*/*")] == []
    with pytest.raises(CheckpointError, match="cannot be written"):
        writer.save(learner, _progress(0.9, 0.5, 0.4))


def test_every_worker_adds_its_part(run_folder: Path, fake_ray: _Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    learner = _learner()
    writers = [CheckpointWriter(locate(run_folder), "1", CONFIG, "stream", rank, 2, 0) for rank in range(2)]
    writers[0].save(learner, _progress(0.9))
    fake_ray.wait()
    assert saved_checkpoints(locate(run_folder)) == []
    writers[1].save(learner, _progress(0.9))
    fake_ray.wait()
    (saved,) = saved_checkpoints(locate(run_folder))
    assert {entry.name for entry in saved.path.entries()} == {WEIGHTS_FILE, STATE_FILE, ABOUT_FILE, "rank0.pt", "rank1.pt"}


def test_a_folder_that_is_not_the_run_s_is_not_written_to(tmp_path: Path, fake_ray: _Ray) -> None:
    _writer(tmp_path).save(_learner(), _progress(0.9))
    fake_ray.wait()
    assert "is not the same folder on every node" in str(fake_ray.errors[0])


def test_a_disk_without_room_for_a_checkpoint_is_noticed_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    learner = _learner()
    weights = sum(value.nbytes for value in learner.model.parameters())

    def with_free(free: int, total: int = 2**40) -> str | None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free, total=total))
        return lacking_room(locate(tmp_path), learner)

    assert with_free(3 * weights) is None
    assert with_free(0, total=0) is None
    assert with_free(3 * weights - 2**20) == f"{tmp_path}: no room for a checkpoint (56 MiB needed, 55 MiB free)"
    path = _lay_down(tmp_path, 1, _progress(0.9))
    (path / STATE_FILE).write_bytes(bytes(2**20))
    assert with_free(2**21) is None
    assert "(1 MiB needed, 1 MiB free)" in str(with_free(2**20))
