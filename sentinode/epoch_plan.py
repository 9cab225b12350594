"""Which rows each worker trains on at each step of an epoch: every row exactly once, whatever the number of workers and interruptions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# BatchNorm in train mode needs two values per channel, which one row at 32 px does not give in the last stage.
_MIN_ROWS = 2
# A last step of less than this part of a full one joins the step before it: alone, a handful of rows would move the weights (of Adam: as far as a
# full batch does) and the statistics of BatchNorm, just before the epoch is judged.
_MIN_LAST_STEP = 1 / 4


@dataclass(frozen=True)
class Batch:
    """What one worker sees in one forward pass.

    Attributes
    ----------
    rows : ndarray of int64
        Indices of rows. From index `own` on they are borrowed: they fill up a batch that would be too small, and have no part in the loss (but in the
        statistics of BatchNorm).
    own : int
        Rows of this worker, which are trained on.
    """

    rows: IntArray
    own: int


@dataclass(frozen=True)
class Step:
    """One change of the weights, as one worker sees it.

    Attributes
    ----------
    batches : tuple of Batch
        This worker's, of which the gradients are summed.
    all_rows : ndarray of int64
        The rows that all workers train on in this step.
    """

    batches: tuple[Batch, ...]
    all_rows: IntArray


def dealt_in_steps(order: IntArray, world_size: int, batch_size: int) -> IntArray:
    """Arrange an order so that its pieces, trained on side by side, see the rows step by step as they stand in it.

    What the steps of a run consist of then depends on `world_size * batch_size` alone, not on the number of workers.
    """
    rows_a_step = world_size * batch_size
    full = len(order) // rows_a_step * rows_a_step
    steps = order[:full].reshape(-1, world_size, batch_size)
    last = np.array_split(order[full:], world_size)
    return np.concatenate([part for rank in range(world_size) for part in (steps[:, rank].reshape(-1), last[rank])])


class EpochPlan:
    """The steps of one epoch for a group of workers.

    The order of an epoch is cut into one piece per worker (`numpy.array_split`), each piece into batches: at any time every worker has had the same
    number of batches, and at the end the pieces differ by one row at most. The last batch may be smaller than the others, or larger by up to a
    quarter.

    Parameters
    ----------
    order : ndarray of int64, shape (n,)
        Every row once; the same on every worker.
    world_size, batch_size, accumulate_steps : int
        Workers, rows per worker and batch, batches per step.
    done : sequence of (world_size, batches)
        What an interrupted run did of this epoch, oldest first: with how many workers, and how many batches each of them. The rows left are dealt
        anew where the number of workers has changed; else they come as they would have without the interruption.
    """

    def __init__(self, order: IntArray, world_size: int, batch_size: int, accumulate_steps: int = 1, done: Sequence[tuple[int, int]] = ()) -> None:
        self._batch_size, self._accumulate = batch_size, accumulate_steps
        self._rows, skipped = len(order), 0
        for index, (workers, batches) in enumerate(done):
            if index == len(done) - 1 and workers == world_size:
                skipped = batches
            elif batches < _batches_of(len(order), workers, batch_size):
                order = np.concatenate([piece[batches * batch_size :] for piece in np.array_split(order, workers)])
            else:
                order = order[:0]
        self._order = order
        self._pieces = np.array_split(order, world_size)
        self._batches = _batches_of(len(order), world_size, batch_size)
        self.world_size = world_size
        self.first_batch = skipped
        """Batches that each worker has done with this number of workers."""

    @property
    def steps(self) -> int:
        """Steps of the epoch (of what was left of it, where the number of workers has changed), done ones included."""
        return -(-self._batches // self._accumulate)

    @property
    def steps_done(self) -> int:
        """Steps done before."""
        return -(-self.first_batch // self._accumulate)

    def part_done_after(self, step: int) -> float:
        """Return the part of the epoch's rows, above 0 and up to 1, that are done after `step`."""
        started_with = len(self._order)
        is_last = step == self.steps - 1
        trained = started_with if is_last else (step + 1) * self._batch_size * self._accumulate * self.world_size
        return (self._rows - started_with + trained) / self._rows

    def of_rank(self, rank: int) -> list[Step]:
        """Return the steps that are left, as worker `rank` sees them; the same number for every worker."""
        result = []
        for step in range(self.steps_done, self.steps):
            numbers = range(step * self._accumulate, min((step + 1) * self._accumulate, self._batches))
            batches = tuple(self._batch(self._pieces[rank], number) for number in numbers)
            everyone = [piece[self._start(numbers[0]) : self._start(numbers[-1] + 1)] for piece in self._pieces]
            result.append(Step(batches, np.concatenate(everyone)))
        return result

    def _start(self, batch: int) -> int:
        """Return where a batch begins in a piece; of the one after the last: where the longest piece ends."""
        return len(self._pieces[0]) if batch == self._batches else batch * self._batch_size

    def _batch(self, piece: IntArray, number: int) -> Batch:
        start = self._start(number)
        own = piece[start : self._start(number + 1)]
        lacking = _MIN_ROWS - len(own)
        if lacking <= 0:
            return Batch(own, len(own))
        # The rows just before: a source that streams still has them at hand. Not the row itself again: equal rows have no variance.
        before = piece[max(0, start - lacking) : start]
        others = self._order[~np.isin(self._order, own)][:lacking] if len(before) < lacking else before
        if len(others) < lacking:
            others = np.resize(np.append(others, own), lacking)
        return Batch(np.concatenate([own, others]), len(own))


def _batches_of(rows: int, world_size: int, batch_size: int) -> int:
    """Return how many batches each worker has. Of all rows, not of a piece: it must be the same for every worker, and for other numbers of them."""
    full, left = divmod(rows, world_size * batch_size)
    return full + 1 if left > _MIN_LAST_STEP * world_size * batch_size or full == 0 < left else full
