"""Reading ahead in threads, into a pool of slots of fixed size, for a consumer whose every use is known beforehand."""

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def plan_loads(groups: IntArray, reach: int) -> IntArray:
    """Decide which uses of rows are served by one reading of their row group.

    Parameters
    ----------
    groups : ndarray of int64, shape (k,)
        Row group of each use, in the order of use.
    reach : int
        A reading serves the uses of its group from its first one up to so many places after that.

    Returns
    -------
    ndarray of int64, shape (k,)
        The reading that serves each use; readings are numbered by their first use.
    """
    loads = np.empty(len(groups), np.int64)
    latest: dict[int, tuple[int, int]] = {}
    count = 0
    for position, group in enumerate(groups.tolist()):
        load, start = latest.get(group, (-1, -1))
        if load < 0 or position - start > reach:
            load, count = count, count + 1
            latest[group] = (load, position)
        loads[position] = load
    return loads


class ReadAhead:
    """Threads that read ahead of one consumer, into slots of a pool that the consumer frees.

    Loads are begun in the order of their first use, each when there are slots for all its uses. With as many slots as `plan_loads` reaches uses and
    one batch more, that can always go on: all that is held then lies between the batch being made and the end of the load that waits.

    Parameters
    ----------
    fill : callable
        Called in a thread as fill(uses, slots), both ndarrays of int64, for one load: bring each of these uses into its slot.
    loads : ndarray of int64
        The load of each use, in the order of use, as from `plan_loads`.
    slots, readers : int
        Size of the pool; number of threads.
    """

    def __init__(self, fill: Callable[[IntArray, IntArray], None], loads: IntArray, slots: int, readers: int) -> None:
        self._fill, self._loads = fill, loads
        count = int(loads.max()) + 1 if len(loads) else 0
        self._uses = np.split(np.argsort(loads, kind="stable"), np.cumsum(np.bincount(loads, minlength=count))[:-1]) if count else []
        self._slot_of = np.full(len(loads), -1, np.int64)
        self._done = np.zeros(count, np.bool_)
        # The last freed is used first: its memory is warm.
        self._free = np.arange(slots, dtype=np.int64)[::-1].copy()
        self._free_count = slots
        self._next = 0
        self._error: tuple[int, BaseException] | None = None
        self._stopped = False
        self._used = 0
        self._turn = threading.Lock()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._read, name=f"sentinode-ingest-{number}", daemon=True) for number in range(min(readers, count))]

    def start(self) -> None:
        """Begin to read."""
        for thread in self._threads:
            thread.start()

    def wait_for(self, first: int, last: int) -> IntArray:
        """Wait until uses `first` to before `last` are there, and return their slots; those of earlier uses are free from then on.

        What `fill` raised for one of them, or for one before, is raised here; RuntimeError after `stop`.
        """
        needed = np.unique(self._loads[first:last])
        with self._changed:
            self._free_before(first)
            self._changed.wait_for(lambda: self._stopped or self._done[needed].all() or (self._error is not None and self._error[0] <= needed[-1]))
            if not self._stopped and self._done[needed].all():
                return self._slot_of[first:last]
            if not self._stopped and self._error is not None:
                raise self._error[1]
        raise RuntimeError("the source was closed, or asked for other batches, while these were still used")

    def _free_before(self, end: int) -> None:
        """Free the slots of all uses before `end`."""
        slots = self._slot_of[self._used : end]
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)
        self._used = end
        # A load waits for many batches; waking its thread for each would only take time.
        if self._next < len(self._uses) and self._free_count >= len(self._uses[self._next]):
            self._changed.notify_all()

    def _read(self) -> None:
        while (load := self._begin()) is not None:
            uses = self._uses[load]
            error: BaseException | None = None
            try:
                self._fill(uses, self._slot_of[uses])
            except BaseException as caught:  # whatever it is, the consumer must hear of it: it would wait for ever
                error = caught
            with self._changed:
                if error is None:
                    self._done[load] = True
                elif self._error is None or load < self._error[0]:
                    self._error = (load, error)
                self._changed.notify_all()

    def _begin(self) -> int | None:
        """Take the next load, with slots for all its uses; None where there is none."""
        with self._turn, self._changed:
            if self._next == len(self._uses):
                return None
            load, uses = self._next, self._uses[self._next]
            self._changed.wait_for(lambda: self._stopped or self._error is not None or self._free_count >= len(uses))
            if self._stopped or self._error is not None:
                return None
            self._next += 1
            self._free_count -= len(uses)
            self._slot_of[uses] = self._free[self._free_count : self._free_count + len(uses)]
            return load

    def stop(self) -> None:
        """End the threads; a load that is being read is finished first."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:  # else it was never started
                thread.join()
