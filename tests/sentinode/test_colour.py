"""The range of colours that patches are expected to have."""

import numpy as np

from sentinode.colour import channel_sums, colour_range, outside_colours


def test_the_range_holds_what_it_was_learned_from_and_little_more() -> None:
    generator = np.random.default_rng(0)
    tints = generator.uniform((120, 60, 100), (220, 180, 200), (2000, 3))
    patches = np.broadcast_to(tints[:, None, None], (2000, 4, 4, 3)).astype(np.uint8)
    sums, _ = channel_sums(patches)
    low, high = colour_range(sums, 16)
    assert not outside_colours(sums, 16, low, high).any()
    # A tenth of each channel's width.
    assert all(abs(one - expected / 255) < 0.01 for one, expected in zip((*low, *high), (110, 48, 90, 230, 192, 210), strict=True))


def test_one_channel_is_enough_to_lie_outside_and_without_a_range_nothing_does() -> None:
    patches = np.array([(150, 100, 150), (150, 100, 250), (150, 10, 150)], np.uint8)[:, None, None]
    sums, _ = channel_sums(patches)
    low, high = (0.4, 0.2, 0.4), (0.9, 0.8, 0.9)
    assert outside_colours(sums, 1, low, high).tolist() == [False, True, True]
    assert outside_colours(sums, 1, None, None).tolist() == [False, False, False]


def test_a_range_ends_where_colours_do() -> None:
    sums, _ = channel_sums(np.array([0, 255], np.uint8)[:, None, None, None].repeat(3, axis=3))
    assert colour_range(sums, 1) == ((0, 0, 0), (1, 1, 1))
