"""Ray Train's storage in an object store, and whose a run there is."""

from pathlib import Path

import pytest
from pyarrow.fs import FileSelector, FileType
from ray import cloudpickle

from ray_jobs.checkpoint_writers import LoneCheckpointWriter
from ray_jobs.checkpoints import CheckpointError, saved_checkpoints
from ray_jobs.run_folder import RunRequest, features_folder, problem_with
from ray_jobs.store_file_system import storage_of
from sentinode.config import TrainConfig
from sentinode.errors import UsageError
from sentinode.learner import Learner
from sentinode.locations import Location, locate
from sentinode.model import build_model
from sentinode.search.journal import Journal
from sentinode.training import Progress
from tests import s3

CONFIG = TrainConfig(arch="resnet18", weights="none", input_size_px=32)


def request(folder: str) -> RunRequest:
    return RunRequest(locate(folder), "train", CONFIG, "f", None)


def test_a_local_folder_is_ray_s_own_affair(tmp_path: Path) -> None:
    assert storage_of(locate(tmp_path), locate(tmp_path), "1") == (None, str(tmp_path))


def test_what_ray_train_does_survives_a_store_that_fails_for_a_moment(flaky_s3: s3.FlakyServer, s3_folder: str) -> None:
    files, path = storage_of(locate(s3_folder), locate(s3_folder), request(s3_folder).claim())
    assert files is not None
    files = cloudpickle.loads(cloudpickle.dumps(files))
    files.create_dir(path)
    flaky_s3.failures += ["503", "drop"]
    with files.open_output_stream(f"{path}/a/note.json") as file:
        file.write(b"{}")
    flaky_s3.failures += ["slow down"]
    assert files.open_input_stream(f"{path}/a/note.json").read() == b"{}"
    flaky_s3.failures += ["503"]
    assert files.get_file_info(f"{path}/a").type == FileType.Directory
    flaky_s3.failures += ["503"]
    assert [info.path for info in files.get_file_info(FileSelector(f"{path}/a", recursive=True)) if info.is_file] == [f"{path}/a/note.json"]
    flaky_s3.failures += ["503"]
    files.delete_dir(f"{path}/a")
    assert files.get_file_info(f"{path}/a/note.json").type == FileType.NotFound


def test_the_newest_process_has_the_run_and_the_one_before_writes_nothing_more(s3_folder: str) -> None:
    folder = locate(s3_folder)
    first = request(s3_folder).claim()
    assert problem_with(folder, first) is None
    learner = Learner(build_model(CONFIG.arch, weights="none", input_size_px=32), CONFIG)
    writer = LoneCheckpointWriter(folder, first, CONFIG, "resident", 0)
    writer.save(learner, Progress())
    writer.wait()
    request(s3_folder).check()
    second = request(s3_folder).claim()
    assert second != first
    assert problem_with(folder, second) is None
    writer.save(learner, Progress())
    with pytest.raises(CheckpointError, match="another process goes on with this run, so this one has stopped"):
        writer.wait()
    assert [saved.number for saved in saved_checkpoints(folder)] == [1]


def test_a_run_that_is_lost_during_an_upload_keeps_what_the_other_process_needs(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, learner = locate(s3_folder), Learner(build_model(CONFIG.arch, weights="none", input_size_px=32), CONFIG)
    first = request(s3_folder).claim()
    writer = LoneCheckpointWriter(folder, first, CONFIG, "resident", 0)
    writer.save(learner, Progress())
    writer.wait()
    files, path = storage_of(folder, folder, first)
    assert files is not None
    put = Location.write_bytes

    def taken_over(self: Location, data: bytes, *, create_only: bool = False) -> None:
        put(self, data, create_only=create_only)
        if self.name == "state.pt":
            request(s3_folder).claim()

    monkeypatch.setattr(Location, "write_bytes", taken_over)
    writer.save(learner, Progress())
    with pytest.raises(CheckpointError, match="another process goes on with this run"):
        writer.wait()
    # Neither `tidy` nor what Ray Train does of its own accord has touched the one that the other process goes on from.
    (kept,) = saved_checkpoints(folder)
    files.delete_dir(f"{path}/{kept.path.name}")
    with files.open_output_stream(f"{path}/checkpoint_manager_snapshot.json") as file:
        file.write(b"another")
    assert saved_checkpoints(folder) == [kept]
    assert (folder / "checkpoint_manager_snapshot.json").read_bytes() != b"another"


def test_outputs_of_frozen_stages_are_kept_for_one_data_set(s3_folder: str, tmp_path: Path) -> None:
    first, other = (features_folder(locate(s3_folder), data) for data in "fg")
    assert first != other
    assert features_folder(locate(s3_folder), "f") == first
    assert features_folder(locate(tmp_path), "f") == tmp_path / "features"


def test_another_request_is_refused_in_a_store_as_on_disk(s3_folder: str) -> None:
    request(s3_folder).claim()
    other = RunRequest(locate(s3_folder), "train", CONFIG.model_copy(update={"seed": 7}), "f", None)
    with pytest.raises(UsageError, match="belongs to another run \\(seed was 42, now 7\\)"):
        other.check()
    with pytest.raises(UsageError, match="name a folder in the bucket"):
        request(s3_folder.rpartition("/")[0]).check()
    (locate(s3_folder) / "else" / "thing.txt").write_bytes(b"x")
    with pytest.raises(UsageError, match="exists and is not a train run"):
        request(f"{s3_folder}/else").check()


def test_a_sweep_s_journal_in_a_store_holds_every_event_and_is_left_alone_by_who_lost_it(s3_folder: str) -> None:
    folder: Location = locate(s3_folder)
    journal = Journal(folder)
    journal.begin({"learning_rate": 1e-3}, kind="search", origin="grid", seed=1)
    journal.epoch(0, {"epoch": 0, "val_loss": 0.5})
    again = Journal(folder)
    assert again.events == [("begin", 0), ("epoch", 0)]
    again.end(0, "finished")
    journal.problem = lambda: "another process has it"
    with pytest.raises(UsageError, match="another process has it"):
        journal.end(0, "failed")
    assert Journal(folder).trials[0].status == "finished"


def test_a_line_torn_on_disk_is_ended_when_the_sweep_goes_on_in_a_store(s3_folder: str, tmp_path: Path) -> None:
    journal = Journal(locate(tmp_path))
    journal.begin({"learning_rate": 1e-3}, kind="search", origin="grid", seed=1)
    (locate(s3_folder) / "trials.jsonl").write_bytes((tmp_path / "trials.jsonl").read_bytes() + b'{"event": "epo')
    moved = Journal(locate(s3_folder))
    moved.epoch(0, {"epoch": 0, "val_loss": 0.5})
    assert Journal(locate(s3_folder)).events == [("begin", 0), ("epoch", 0)]
