"""Successive halving by hand."""

from sentinode.search.halving import Halving


def halving(first: int = 1, factor: int = 2, units: int = 8) -> Halving:
    return Halving(first, factor, units, higher_is_better=True)


def test_rungs_are_multiples_below_the_whole() -> None:
    rule = halving(first=2, factor=3, units=16)
    assert [units for units in range(1, 17) if rule.take(0, units, 0.5)] == [2, 6]
    # One that is longer than its trials stops none.
    assert not any(halving(first=8).take(0, units, 0.5) for units in range(1, 9))


def test_the_best_go_on_best_first_when_all_have_come() -> None:
    rule = halving()
    for number, value in enumerate((0.6, 0.9, 0.7, 0.8)):
        assert rule.take(number, 1, value)
        assert rule.next([5]) == (None, [])
    assert rule.next([]) == (1, [2, 0])
    for number in (2, 0):
        rule.give_up(number)
    rule.let_go_on(1)
    assert rule.next([1]) == (3, [])
    rule.let_go_on(3)
    assert rule.next([1, 3]) == (None, [])
    assert rule.take(3, 2, 0.85)
    # 1 is on its way to the second rung.
    assert rule.next([1]) == (None, [])
    assert rule.take(1, 2, 0.84)
    assert rule.next([]) == (3, [1])


def test_of_fewer_than_the_factor_the_best_goes_on_and_nobody_takes_the_place_of_one_that_failed() -> None:
    rule = halving(factor=4)
    assert rule.take(0, 1, None)
    assert rule.take(1, 1, 0.5)
    assert rule.next([]) == (1, [0])
    rule.give_up(0)
    rule.let_go_on(1)
    # It fails.
    assert rule.next([]) == (None, [])
    assert list(rule.waiting) == []


def test_ties_go_to_the_earlier_and_lower_losses_are_better() -> None:
    rule = Halving(1, 2, 4, higher_is_better=False)
    for number, value in enumerate((0.5, 0.4, 0.4, 0.9)):
        rule.take(number, 1, value)
    assert rule.next([])[0] == 1


def test_one_that_is_heard_of_again_has_gone_on() -> None:
    rule = halving()
    rule.take(0, 1, 0.9)
    rule.take(1, 1, 0.8)
    # As a journal tells it that was cut off there.
    assert rule.take(0, 2, 0.9)
    assert rule.next([]) == (0, [1])
