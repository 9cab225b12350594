"""Running the blocks of one stage as Ray Data tasks: quietly, with progress, and with errors that keep their type."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sentinode.allocator import keep_freed_memory
from sentinode.errors import SentinodeError, one_line, root_of

_pinned_to: ContextVar[str | None] = ContextVar("node", default=None)


@contextmanager
def on_this_node() -> Iterator[None]:
    """Tasks of `run_tasks` run on the machine of this process: their files lie where no other sees them."""
    token = _pinned_to.set(ray.get_runtime_context().get_node_id())
    try:
        yield
    finally:
        _pinned_to.reset(token)


def works_elsewhere() -> bool:
    """Tell whether tasks may run on another machine than this process."""
    here = ray.get_runtime_context().get_node_id()
    return _pinned_to.get() is None and any(node["Alive"] and node["Resources"].get("CPU") and node["NodeID"] != here for node in ray.nodes())


class Progress(Protocol):
    """Told how far a stage is."""

    def __call__(self, stage: str, done: int, total: int, unit: str = "patches") -> None:
        """`done` of `total` units; a stage begins with what an earlier run has done."""


_ADVICE = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f, or the file system's own)",
}
_RESULT_SCHEMA = pa.schema([("number", pa.int64()), ("result", pa.string()), ("error", pa.string())])


def run_tasks(
    stage: str,
    function: Callable[..., Any],
    work: Sequence[dict[str, Any]],
    progress: Progress,
    *,
    where: Path,
    workers: int | None = None,
    weights: Sequence[int] | None = None,
    unit: str = "patches",
    done: int = 0,
) -> list[Any]:
    """Run `function(**item)` for every item on the cluster; Ray repeats what a lost worker or node took with it.

    Parameters
    ----------
    stage : str
        Name for progress and errors.
    function : callable
        A module-level function; its arguments and result must be JSON values, and repeating it must do no harm.
    work : sequence of dict
        Keyword arguments of each call.
    progress : Progress
    where : Path
        Folder that the calls write to, for errors that do not name it.
    workers : int, optional
        Calls that run at a time, one CPU each; default as many as the cluster has CPUs.
    weights : sequence of int, optional
        Units that each call does, for progress; default 1.
    unit : str
        What is counted.
    done : int
        Units that an earlier run has done.

    Returns
    -------
    list
        The results, in the order of `work`.

    Raises
    ------
    SentinodeError
        A call failed; the cause is kept.
    """
    if not work:
        return []
    items = [{"number": number, "arguments": json.dumps(item)} for number, item in enumerate(work)]
    results: list[Any] = [None] * len(work)
    units = [1] * len(work) if weights is None else list(weights)
    total, came_back = done + sum(units), 0
    progress(stage, done, total, unit)
    with _quiet_context():
        # Not from_arrow, which would first wait for a task of its own.
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _call,
            batch_size=None,
            batch_format="pyarrow",
            # No more than there is work for: Ray would warn of it at the terminal.
            compute=ray.data.TaskPoolStrategy(size=min(workers or len(items), len(items))),
            num_cpus=1,
            fn_kwargs={"function": function, "where": str(where)},
            **_placement(),
        )
        try:
            for row in dataset.iter_rows():
                if row["error"] is not None:
                    raise SentinodeError(f"{stage} failed: {row['error']}")
                results[row["number"]] = json.loads(row["result"])
                came_back += 1
                done += units[row["number"]]
                progress(stage, done, total, unit)
        except RayError as error:
            root = root_of(error)
            raise SentinodeError(f"{stage} failed: {type(root).__name__}: {one_line(root)}") from error
    if came_back != len(work):
        raise SentinodeError(f"{stage} failed: {came_back} of {len(work)} results came back")
    return results


def _placement() -> dict[str, Any]:
    node = _pinned_to.get()
    return {} if node is None else {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _call(batch: pa.Table, function: Callable[..., Any], where: str) -> pa.Table:
    """Run the calls of one batch. Failures that have a clear line of their own travel as data: raised, Ray would bury them in a traceback."""
    keep_freed_memory()  # the next block needs as much again
    rows = []
    for number, item in zip(batch["number"].to_pylist(), batch["arguments"].to_pylist(), strict=True):
        result, failure = None, None
        try:
            result = json.dumps(function(**json.loads(item)))
        except SentinodeError as error:
            failure = str(error)
        except OSError as error:
            failure = what_failed(error, where)
        rows.append({"number": number, "result": result, "error": failure})
    return pa.Table.from_pylist(rows, schema=_RESULT_SCHEMA)


def what_failed(error: OSError, where: str | os.PathLike[str]) -> str:
    """Return an error of the operating system as the end of one line, with what to do where the disk of `where` takes no more."""
    advice = _ADVICE.get(error.errno or 0)
    if advice is None:
        return f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    # What was opened already is written to without its name, and pyarrow has words of its own.
    return f"{os.strerror(error.errno or 0)} ({error.filename or where}); {advice} and run the same command again, it continues"


@contextmanager
def _quiet_context() -> Iterator[None]:
    """Set what our data sets need, and put it back: the context belongs to the whole process."""
    context = ray.data.DataContext.get_current()
    # With the original exception: Ray would otherwise bury a mistake of ours in a traceback.
    wanted = {"enable_progress_bars": False, "print_on_execution_start": False, "raise_original_map_exception": True}
    before = {name: getattr(context, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
