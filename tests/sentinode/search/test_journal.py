"""The journal of a sweep is all that is known of it: what was written is read, whatever a kill left at its end."""

import json
from pathlib import Path
from typing import Any

import pytest

from sentinode.errors import ManifestError, StorageError
from sentinode.locations import locate
from sentinode.search.journal import JOURNAL_FILE, Journal, TrialRecord, rank


def record(epoch: int, auc: float | None, loss: float = 0.5) -> dict[str, Any]:
    return {"epoch": epoch, "val_roc_auc": auc, "val_loss": loss, "rows": 100, "seconds": 2.0, "val_seconds": 0.5}


def begin(journal: Journal, **point: Any) -> TrialRecord:
    return journal.begin(point, kind="search", origin="random", seed=42)


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    journal = Journal(locate(tmp_path))
    first, second = begin(journal, learning_rate=1e-3), begin(journal, learning_rate=1e-4)
    journal.start(first.number, 1.5, 3.6)
    journal.epoch(first.number, record(0, 0.7))
    journal.epoch(second.number, record(0, 0.8))
    journal.epoch(first.number, record(1, 0.9))
    journal.end(first.number, "finished")
    journal.end(second.number, "failed", "a loss is not finite")
    again = Journal(locate(tmp_path))
    assert again.trials == journal.trials
    assert [trial.name for trial in again.trials] == ["00000", "00001"]
    assert (again.trials[0].value("val_roc_auc"), again.trials[0].image_steps, again.trials[0].train_seconds) == (0.9, 200, 5.0)
    assert (again.trials[0].images_per_s, again.trials[0].cost("gflops"), again.trials[0].cost("train_seconds")) == (50.0, 3.6, 5.0)
    assert (again.trials[1].status, again.trials[1].error) == ("failed", "a loss is not finite")


def test_an_epoch_is_known_by_its_fold_and_number(tmp_path: Path) -> None:
    journal = Journal(locate(tmp_path))
    begin(journal)
    journal.epoch(0, record(0, 0.7), fold=1, fold_over=True)
    again = Journal(locate(tmp_path))
    assert (again.knows(0, 0, 1), again.knows(0, 0, None), again.knows(0, 1, 1)) == (True, False, False)
    assert (again.trials[0].epochs[0]["fold_over"], again.trials[0].epochs[0]["last"]) == (True, False)


def test_what_happened_keeps_its_order_though_clocks_do_not(tmp_path: Path) -> None:
    journal = Journal(locate(tmp_path))
    begin(journal)
    journal.epoch(0, record(0, 0.7))
    begin(journal)
    journal.end(0, "finished")
    lines = [json.loads(line) for line in (tmp_path / JOURNAL_FILE).read_text().splitlines()]
    (tmp_path / JOURNAL_FILE).write_text("".join(json.dumps(line | {"at": 100 - number}) + "\n" for number, line in enumerate(lines)))
    assert Journal(locate(tmp_path)).events == journal.events == [("begin", 0), ("epoch", 0), ("begin", 1), ("end", 0)]


def test_a_line_that_was_torn_at_any_byte_is_passed_over_and_the_sweep_goes_on(tmp_path: Path) -> None:
    journal = Journal(locate(tmp_path))
    begin(journal, learning_rate=1e-3)
    journal.epoch(0, record(0, 0.7))
    whole = (tmp_path / JOURNAL_FILE).read_bytes()
    last = whole[: whole.rindex(b"\n", 0, -1) + 1]
    for cut in range(len(last), len(whole)):
        (tmp_path / JOURNAL_FILE).write_bytes(whole[:cut])
        torn = Journal(locate(tmp_path))
        # All but the end of the line is there: nothing is missing.
        assert len(torn.trials[0].epochs) == (1 if cut == len(whole) - 1 else 0)
        if not torn.knows(0, 0, None):
            torn.epoch(0, record(0, 0.7))
        torn.epoch(0, record(1, 0.8))
        assert [one["epoch"] for one in Journal(locate(tmp_path)).trials[0].epochs] == [0, 1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"event": "begin", "tr\n', "line 2: not an event of a sweep"),
        (b"[1, 2]\n", "line 2: not an event of a sweep"),
        (b'{"event": "epoch", "trial": 7, "fold": null, "record": {}, "at": 1}\n', "trial 7 never began"),
        (
            b'{"event": "begin", "trial": 3, "kind": "search", "repeats": null, "seed": 1, "origin": "x", "point": {}, "at": 1}\n',
            "trial 3 begins after 1",
        ),
    ],
)
def test_damage_in_the_middle_is_one_line(tmp_path: Path, line: bytes, message: str) -> None:
    begin(Journal(locate(tmp_path)))
    path = tmp_path / JOURNAL_FILE
    path.write_bytes(path.read_bytes() + line + path.read_bytes().replace(b'"trial": 0', b'"trial": 1'))
    with pytest.raises(ManifestError, match=message):
        Journal(locate(tmp_path))


def test_a_full_disk_is_one_line_and_what_was_torn_by_it_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(locate(tmp_path))
    begin(journal)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left on device"):
            journal.epoch(0, record(0, 0.7))
    assert journal.trials[0].epochs == []


def test_with_folds_the_mean_of_each_folds_best_ranks_and_more_folds_rank_first() -> None:
    trials = [TrialRecord(number, "search", None, 42, "random", {}, 0.0) for number in range(4)]
    trials[0].epochs = [record(0, 0.6) | {"fold": 0}, record(1, 0.8) | {"fold": 0}, record(0, 0.6) | {"fold": 1}]
    trials[1].epochs = [record(0, 0.99) | {"fold": 0}]
    trials[3].epochs = [record(0, 0.9) | {"fold": 0}, record(0, 0.9) | {"fold": 1}]
    assert trials[0].value("val_roc_auc") == pytest.approx(0.7)
    assert [trial.number for trial in rank(trials, "val_roc_auc")] == [3, 0, 1, 2]


def test_the_first_of_equal_epochs_is_the_best_and_epochs_without_a_figure_are_none() -> None:
    trial = TrialRecord(0, "search", None, 42, "random", {}, 0.0)
    trial.epochs = [record(epoch, auc) | {"fold": None} for epoch, auc in enumerate([None, 0.7, 0.7, 0.6])]
    best = trial.best("val_roc_auc")
    assert best is not None
    assert best["epoch"] == 1
    assert rank([trial], "val_loss")[0].value("val_loss") == 0.5
