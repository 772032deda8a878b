"""Printed numbers, and sizes of memory."""

import pytest

from prfl_fast.utils.units import plural, short_number, size_of


def test_nouns_follow_their_number():
    assert [plural(n, "video") for n in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]
    assert [plural(n, "micro-batch") for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.000312, "0.00031"), (3.12e-7, "3.1e-07"), (0.456, "0.46")]
)
def test_small_numbers_are_not_zero(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    "value, expected",
    [
        ("24GiB", 24 << 30),
        ("1.5 gib", 3 << 29),
        ("80GB", 80 * 10**9),
        (123, 123),
        ("9437184", 9 << 20),
    ],
)
def test_sizes(value, expected):
    assert size_of(value, "budget") == expected


@pytest.mark.parametrize("value", ["24 G", "much", 0, -1, True, "GiB", "0GiB", "7"])
def test_bad_sizes(value):
    with pytest.raises(ValueError, match="budget is .*expected (bytes or )?a size"):
        size_of(value, "budget")
