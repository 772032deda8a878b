"""Progress elsewhere than on a terminal."""

import pytest

from prfl_fast.utils import progress


@pytest.mark.parametrize(
    ("total", "options", "left"),
    [
        (None, {}, " files done"),
        (10, {}, " of 10 files done, {} left"),
        (10, {"at_most": True}, " of at most 10 files done, at most {} left"),
    ],
)
def test_counts_are_told_every_30_seconds_with_the_time_left(
    monkeypatch, capsys, total, options, left
):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "on_terminal", lambda: False)
    with progress.count_progress("check", "files", total, **options) as show:
        for _ in range(5):  # 20 seconds each
            show("")
            now[0] += 20
    # Before the third file two have taken 40 seconds, eight are left; then 80 seconds and six.
    expected = [f"check: 2{left.format('0:02:40')}", f"check: 4{left.format('0:02:00')}"]
    assert capsys.readouterr().err.splitlines() == expected
