"""Progress lines and the closing table of prepare."""

import pytest

from ray_jobs.prepare_progress import TABLE_WIDTH, ProgressLines, duration, summary_table
from sentinode.manifests import SplitCounts
from tests.factories import dataset_manifest


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(capsys: pytest.CaptureFixture[str], calls: list[tuple[float, str, int, int]]) -> list[str]:
    """Make calls (seconds since the one before, stage, done, total) and return what was printed."""
    clock = Clock()
    progress = ProgressLines(clock)
    for seconds, stage, done, total in calls:
        clock.now += seconds
        progress(stage, done, total)
    return capsys.readouterr().out.splitlines()


def test_a_stage_shows_its_start_its_pace_and_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, [(0, "decode", 0, 220_025), (6, "decode", 61_440, 220_025), (12, "decode", 220_025, 220_025)]) == [
        "decode: 0 of 220,025 patches",
        "decode: 61,440 of 220,025 patches, 10,240/s, 15 s left",
        "decode: 220,025 of 220,025 patches, 12,224/s, took 18 s",
    ]


def test_lines_come_no_faster_than_every_five_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    calls = [(1.0, "decode", 10 * number, 1000) for number in range(21)]
    assert [line.partition(" of")[0] for line in lines_of(capsys, calls)] == ["decode: 0", "decode: 50", "decode: 100", "decode: 150", "decode: 200"]


def test_a_resumed_stage_counts_only_what_was_done_now(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, [(0, "decode", 900, 1200), (10, "decode", 1000, 1200), (20, "decode", 1200, 1200)]) == [
        "decode: 900 of 1,200 patches done before",
        "decode: 1,000 of 1,200 patches, 10/s, 20 s left",
        "decode: 1,200 of 1,200 patches, 10/s, took 30 s",
    ]


def test_a_stage_that_was_done_before_says_so_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, [(0, "write", 40, 40), (9, "write", 40, 40)]) == ["write: 40 of 40 patches done before"]


def test_the_end_of_a_stage_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(lines_of(capsys, [(0, "write", 0, 40), (1, "write", 40, 40), (9, "write", 40, 40)])) == 2


def test_a_stage_without_a_known_total_shows_its_count_and_pace(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, [(0, "overlap", 0, 0), (10, "overlap", 50, 0)]) == ["overlap: started", "overlap: 50 patches, 5/s"]


def test_a_stage_that_stands_still_gives_neither_pace_nor_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines_of(capsys, [(0, "decode", 7, 100), (8, "decode", 7, 100)])[1] == "decode: 7 of 100 patches"


def test_a_stage_that_starts_over_is_timed_anew(capsys: pytest.CaptureFixture[str]) -> None:
    printed = lines_of(capsys, [(0, "decode", 50, 100), (60, "decode", 0, 100), (5, "decode", 50, 100)])
    assert printed[1:] == ["decode: 0 of 100 patches", "decode: 50 of 100 patches, 10/s, 5.0 s left"]


def test_stages_side_by_side_keep_their_own_time(capsys: pytest.CaptureFixture[str]) -> None:
    printed = lines_of(capsys, [(0, "decode", 0, 100), (10, "write", 0, 100), (5, "write", 50, 100), (0, "decode", 30, 100)])
    assert printed[2:] == ["write: 50 of 100 patches, 10/s, 5.0 s left", "decode: 30 of 100 patches, 2/s, 35 s left"]


def test_the_unit_is_the_callers(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressLines(Clock())("write", 0, 54, "shards")
    assert capsys.readouterr().out == "write: 0 of 54 shards\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (9.96, "10 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (3599.6, "1 h 00 min"), (7620, "2 h 07 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def kaggle(**changes: object) -> str:
    counts = {
        "train": SplitCounts(rows=154_017, normal=91_635, metastatic=62_382, groups=120_001),
        "val": SplitCounts(rows=33_004, normal=19_636, metastatic=13_368, groups=25_000),
    }
    return summary_table(dataset_manifest(**({"counts": counts, "rejected": {"blank": 2, "wrong_size": 11}} | changes)))


def test_the_table_lines_up_with_a_total() -> None:
    assert kaggle().splitlines()[:6] == [
        "split  patches   groups   normal  metastatic  prevalence",
        "--------------------------------------------------------",
        "train  154,017  120,001   91,635      62,382      40.5 %",
        "val     33,004   25,000   19,636      13,368      40.5 %",
        "--------------------------------------------------------",
        "total  187,021        0  111,271      75,750      40.5 %",
    ]


def test_the_table_names_refusals_overlaps_leak_level_and_notes() -> None:
    split = dataset_manifest().split.model_copy(
        update={"groups": 5, "multi_patch_groups": 2, "largest_group_rows": 51, "overlap_pairs": 1343, "notes": ["fold 0 is empty"]}
    )
    text = kaggle(split=split)
    for part in (
        "refused:    13 (11 wrong_size, 2 blank)",
        "overlap:    1,343 pairs of patches share pixels",
        "groups:     5, 2 of several patches, the largest of 51",
        "leak level: pixels. No two patches",
        "note:       fold 0 is empty",
    ):
        assert part in text


def test_overlaps_that_were_not_searched_for_are_not_called_none() -> None:
    for pairs, text in ((None, "not searched for"), (0, "0 pairs of patches share pixels"), (1, "1 pair of patches shares pixels")):
        split = dataset_manifest().split.model_copy(update={"overlap_pairs": pairs})
        assert f"overlap:    {text}\n" in kaggle(split=split)


def test_a_set_without_labels_has_no_columns_of_classes() -> None:
    text = kaggle(counts={"all": SplitCounts(rows=57_458, normal=0, metastatic=0, unlabelled=57_458, groups=57_458)}, leak_level="unsplit")
    assert text.splitlines()[0].split() == ["split", "patches", "groups", "unlabelled"]
    assert "prevalence" not in text


def test_a_set_labelled_in_part_shows_both() -> None:
    counts = {"a": SplitCounts(rows=3, normal=1, metastatic=2, groups=3), "b": SplitCounts(rows=4, normal=0, metastatic=0, unlabelled=4, groups=4)}
    lines = kaggle(counts=counts).splitlines()
    assert lines[2].split() == ["a", "3", "3", "1", "2", "0", "66.7", "%"]
    assert lines[3].split() == ["b", "4", "4", "0", "0", "4", "-"]


def test_the_table_is_ascii_and_at_most_a_hundred_wide_whatever_it_is_told() -> None:
    counts = {"s" * 400: SplitCounts(rows=10**9, normal=10**9 // 2, metastatic=10**9 // 2, unlabelled=10**9, groups=10**9)}
    split = dataset_manifest().split.model_copy(update={"notes": ["é" * 500, "split val holds little " * 20]})
    text = kaggle(counts=counts, split=split, rejected={f"reason_{number}": 10**6 for number in range(30)}, leak_level="none")
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= TABLE_WIDTH
