import errno
import os
from pathlib import Path

import pytest

from ray_jobs.run_folder import RunRequest, problem_with
from sentinode.config import SweepConfig, TrainConfig
from sentinode.errors import StorageError, UsageError
from sentinode.locations import Location, locate
from sentinode.storage import temporary_name


def _request(folder: Path, *, fingerprint: str = "a", folds: int | None = None, verb: str = "train", **settings: object) -> RunRequest:
    return RunRequest(locate(folder), verb, TrainConfig(**settings), fingerprint, folds)


def test_a_free_folder_is_claimed_and_found_again(tmp_path: Path) -> None:
    request = _request(tmp_path / "run")
    request.check()
    assert not (tmp_path / "run").exists()
    request.claim()
    request.check()


@pytest.mark.parametrize(
    "settings",
    [{"max_failures": 9}, {"trackers": ["mlflow"], "mlflow_uri": "http://server", "mlflow_experiment": "other"}, {"checkpoint_interval_s": None}],
)
def test_what_does_not_change_the_result_may_change(tmp_path: Path, settings: dict[str, object]) -> None:
    _request(tmp_path / "run").claim()
    _request(tmp_path / "run", **settings).check()  # type: ignore[arg-type]


def _sweep(folder: Path, **base: object) -> RunRequest:
    return RunRequest(locate(folder), "tune", SweepConfig(space={"learning_rate": {"loguniform": [1e-4, 1e-2]}}, base=base), "a", None)


def test_what_does_not_change_a_sweep_s_result_may_change_in_its_base_too(tmp_path: Path) -> None:
    _sweep(tmp_path / "sweep", epochs=3).claim()
    _sweep(tmp_path / "sweep", epochs=3, max_failures=9).check()
    with pytest.raises(UsageError, match=r"base\.epochs was 3, now 4"):
        _sweep(tmp_path / "sweep", epochs=4).check()


def test_a_folder_has_one_id_for_as_long_as_it_is_there(tmp_path: Path) -> None:
    run_id = _request(tmp_path / "run").claim()
    assert _request(tmp_path / "run", max_failures=9).claim() == run_id
    other = _request(tmp_path / "other").claim()
    assert problem_with(locate(tmp_path / "run"), run_id) is None
    assert "is not the same folder on every node" in str(problem_with(locate(tmp_path / "other"), run_id))
    assert "is not the same folder on every node" in str(problem_with(locate(tmp_path / "none"), other))


def test_a_claim_that_was_killed_can_be_repeated(tmp_path: Path) -> None:
    temporary_name(tmp_path / "request.json").write_text("{")
    _request(tmp_path).check()
    (tmp_path / ".thesis.tex.swp").write_text("precious")
    with pytest.raises(UsageError, match="is not a train run"):
        _request(tmp_path).check()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"epochs": 3}, "epochs was 15, now 3"),
        ({"ingest": "stream"}, "ingest was 'auto', now 'stream'"),
        ({"stream_window_rows": 8}, "stream_window_rows was 16384, now 8"),
        ({"fingerprint": "b"}, "data_fingerprint a"),
        ({"folds": 3}, "data_folds None"),
        ({"verb": "tune"}, "verb train"),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path: Path, other: dict[str, object], named: str) -> None:
    _request(tmp_path / "run").claim()
    with pytest.raises(UsageError, match=named):
        _request(tmp_path / "run", **other).check()  # type: ignore[arg-type]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="is not a train run"):
        _request(tmp_path).check()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a train run"):
        _request(tmp_path / "file").check()


def test_a_damaged_request_is_refused(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        _request(tmp_path).check()


def test_a_full_disk_is_not_taken_for_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Location, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Location, "write_bytes", full)
    with pytest.raises(StorageError, match=r"run: cannot be written \(No space left on device\); make room there and repeat"):
        _request(tmp_path / "run").claim()
