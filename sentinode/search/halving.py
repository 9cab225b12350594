"""Successive halving (Jamieson and Talwalkar 2016, algorithm 1): all trials are trained to a rung, the best of them to the next one, and so on.

Trials wait at a rung until all have come to it, so that none is trained on only because it was early, as with ASHA, which never waits. The price is
that processors idle while the last ones come.
"""

from collections.abc import Collection


class Halving:
    """Who goes on from which rung.

    Parameters
    ----------
    first : int
        Units (epochs, or folds) of the first rung; each further rung has `factor` times as many.
    factor : int
        Of the n trials that come to a rung, max(1, n // factor) go on.
    units : int
        Of a whole trial.
    higher_is_better : bool
    """

    def __init__(self, first: int, factor: int, units: int, *, higher_is_better: bool) -> None:
        self._rungs: list[int] = []
        while first < units:
            self._rungs.append(first)
            first *= factor
        self._factor, self._sign = factor, 1 if higher_is_better else -1
        self._reached: list[dict[int, float]] = [{} for _ in self._rungs]
        self._beyond: list[set[int]] = [set() for _ in self._rungs]
        # Trial -> index of the rung it waits at.
        self._waiting: dict[int, int] = {}

    @property
    def waiting(self) -> Collection[int]:
        """Trials that wait at a rung."""
        return self._waiting.keys()

    def take(self, number: int, units_done: int, value: float | None) -> bool:
        """Take in that a trial has done so many units, `value` being what it would be ranked by; return whether it is to wait now."""
        # What goes on has been let go on, also where that was in an earlier life of the sweep.
        self.let_go_on(number)
        if units_done not in self._rungs:
            return False
        rung = self._rungs.index(units_done)
        # Without a figure it is the last of all.
        self._reached[rung][number] = float("-inf") if value is None else self._sign * value
        self._waiting[number] = rung
        return True

    def let_go_on(self, number: int) -> None:
        """Let a trial that waits go on."""
        rung = self._waiting.pop(number, None)
        if rung is not None:
            self._beyond[rung].add(number)

    def give_up(self, number: int) -> None:
        """A trial that waits has ended."""
        self._waiting.pop(number, None)

    def next(self, on_the_way: Collection[int]) -> tuple[int | None, list[int]]:
        """Return the trial that may go on next, if any, and those that never will.

        Parameters
        ----------
        on_the_way : collection of int
            Trials that are being trained, or are to be begun or continued, wherever they are.
        """
        given_up: list[int] = []
        for rung, reached in enumerate(self._reached):
            entitled = self._beyond[rung - 1] if rung else None
            if any(number not in reached and (entitled is None or number in entitled) for number in on_the_way):
                break
            ranked = sorted(reached, key=lambda number: (-reached[number], number))
            chosen = ranked[: max(1, len(ranked) // self._factor)]
            given_up += [number for number in ranked[len(chosen) :] if self._waiting.get(number) == rung]
            for number in chosen:
                if self._waiting.get(number) == rung:
                    return number, given_up
        return None, given_up
