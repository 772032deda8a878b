"""Printed numbers."""

import pytest

from prfl_fast.utils.units import plural, short_number


def test_nouns_follow_their_number():
    assert [plural(n, "video") for n in (0, 1, 2)] == ["0 videos", "1 video", "2 videos"]
    assert [plural(n, "micro-batch") for n in (1, 2)] == ["1 micro-batch", "2 micro-batches"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.000312, "0.00031"), (3.12e-7, "3.1e-07"), (0.456, "0.46")]
)
def test_small_numbers_are_not_zero(value, text):
    assert short_number(value) == text
