"""What prepare tells the person at the terminal: lines while it works, a table when it is done."""

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ray_jobs.verb import say
from sentinode.manifests import LEAK_MEANING, DatasetManifest

SECONDS_BETWEEN_LINES = 5.0
TABLE_WIDTH = 100


@dataclass
class _Stage:
    """Where a stage began, when it last spoke, and whether its summary was given."""

    done_before: int
    started: float
    last_line: float
    finished: bool = False


class ProgressLines:
    """Shows the first and the last call of each stage, and one about every five seconds in between.

    The first call of a stage says how much an interrupted run had done already: rates and remaining times count only what was done since.

    Parameters
    ----------
    clock : callable
        Seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stages: dict[str, _Stage] = {}

    def __call__(self, stage: str, done: int, total: int, unit: str = "patches") -> None:
        """Take note of a stage's progress.

        Parameters
        ----------
        stage : str
            Its name, the same in each call.
        done, total : int
            Of `unit`; a `total` of 0 is not known.
        unit : str
            What is counted, in the plural.
        """
        now = self._clock()
        known = self._stages.get(stage)
        if known is None or done < known.done_before:
            known = self._stages[stage] = _Stage(done, now, now)
            known.finished = 0 < total <= done
            say(f"{stage}: {_first_line(done, total, unit)}")
        elif 0 < total <= done:
            if not known.finished:
                known.finished = True
                say(f"{stage}: {done:,} of {total:,} {unit}{_speed(known, done, now)}, took {duration(now - known.started)}")
        elif now - known.last_line >= SECONDS_BETWEEN_LINES:
            known.last_line = now
            of = f" of {total:,}" if total else ""
            say(f"{stage}: {done:,}{of} {unit}{_speed(known, done, now)}{_left(known, done, total, now)}")


def _first_line(done: int, total: int, unit: str) -> str:
    if total <= 0:
        return "started"
    return f"{done:,} of {total:,} {unit}" + (" done before" if done else "")


def _speed(stage: _Stage, done: int, now: float) -> str:
    fresh, seconds = done - stage.done_before, now - stage.started
    if fresh <= 0 or seconds <= 0:
        return ""
    rate = fresh / seconds
    return f", {rate:,.0f}/s" if rate >= 10 else f", {rate:.2g}/s"


def _left(stage: _Stage, done: int, total: int, now: float) -> str:
    fresh = done - stage.done_before
    return f", {duration((now - stage.started) / fresh * (total - done))} left" if fresh > 0 and total else ""


def duration(seconds: float) -> str:
    """Return a length of time as people say it: 0.4 s, 18 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def summary_table(manifest: DatasetManifest) -> str:
    """Return what a prepared data set holds as text: ASCII, lines of at most TABLE_WIDTH characters, no newline at the end."""
    counts = manifest.counts
    labelled = any(one.normal or one.metastatic for one in counts.values())
    unlabelled = any(one.unlabelled for one in counts.values())
    head = ["split", "patches", "groups"]
    head += ["normal", "metastatic"] if labelled else []
    head += ["unlabelled"] if unlabelled else []
    head += ["prevalence"] if labelled else []

    def line(name: str, rows: int, groups: int, normal: int, metastatic: int, without: int) -> list[str]:
        cells = [name, f"{rows:,}", f"{groups:,}"]
        cells += [f"{normal:,}", f"{metastatic:,}"] if labelled else []
        cells += [f"{without:,}"] if unlabelled else []
        share = f"{100 * metastatic / (normal + metastatic):.1f} %" if normal + metastatic else "-"
        return cells + ([share] if labelled else [])

    table = [line(name, one.rows, one.groups, one.normal, one.metastatic, one.unlabelled) for name, one in counts.items()]
    sums = {field: sum(getattr(one, field) for one in counts.values()) for field in ("rows", "normal", "metastatic", "unlabelled")}
    table.append(line("total", sums["rows"], manifest.split.groups, sums["normal"], sums["metastatic"], sums["unlabelled"]))
    lines = [*_aligned(head, table), "", *_facts(manifest)]
    return "\n".join(lines).encode("ascii", "replace").decode()


def _aligned(head: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    """Set cells in columns, names to the left and figures to the right, with rules below the head and above the last line."""
    rows = [[_fitting(row[0]), *row[1:]] for row in (head, *table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    rule = "-" * len(text[0])
    return [text[0], rule, *text[1:-1], rule, text[-1]]


def _fitting(name: str) -> str:
    """Keep the name of a split from pushing the figures off the line."""
    return name if len(name) <= 16 else name[:13] + "..."


def _facts(manifest: DatasetManifest) -> list[str]:
    split = manifest.split
    refused = sum(manifest.rejected.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.rejected.items(), key=lambda item: (-item[1], item[0])))
    pairs = "1 pair of patches shares pixels" if split.overlap_pairs == 1 else f"{split.overlap_pairs or 0:,} pairs of patches share pixels"
    facts = [
        ("refused", f"{refused:,} ({reasons})" if refused else "0"),
        ("overlap", "not searched for" if split.overlap_pairs is None else pairs),
        ("groups", f"{split.groups:,}, {split.multi_patch_groups:,} of several patches, the largest of {split.largest_group_rows:,}"),
        ("leak level", f"{manifest.leak_level}. {LEAK_MEANING[manifest.leak_level]}"),
        *(("note", note) for note in split.notes),
    ]
    return [line for name, text in facts for line in textwrap.wrap(text, TABLE_WIDTH, initial_indent=f"{name + ':':<12}", subsequent_indent=" " * 12)]
