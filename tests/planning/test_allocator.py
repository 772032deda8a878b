"""The model of the caching allocator against traces with answers computed by hand."""

import pytest

from prfl_fast.planning.allocator import (
    CachingAllocator,
    FullError,
    fits,
    least_limit,
    requests_of,
)

KB, MB = 1 << 10, 1 << 20


def played(*steps, limit=float("inf"), expandable=False):
    """Return the allocator after steps ``"a=size"``, ``"a"`` to free, ``"a=size@stream"``."""
    allocator = CachingAllocator(limit, expandable=expandable)
    for step in steps:
        name, _, rest = step.partition("=")
        if not rest:
            allocator.free(name)
            continue
        size, _, stream = rest.partition("@")
        allocator.allocate(name, int(size), int(stream or 0))
    return allocator


def mb(text):
    """Write MiB as bytes: ``a=3M`` and ``a=1.5M``."""
    name, _, rest = text.partition("=")
    size, at, stream = rest.partition("@")
    if size.endswith("M"):
        size = str(int(float(size[:-1]) * MB))
    return f"{name}={size}{at}{stream}" if rest else name


@pytest.mark.parametrize(
    "steps, reserved, allocated",
    [
        ("a=1", 2 * MB, 512),  # rounded up to 512 bytes, in a buffer of 2 MiB
        ("a=513", 2 * MB, 1024),
        ("a=1M b=1M", 2 * MB, 2 * MB),  # two of 1 MiB fill a small buffer
        ("a=1M b=1M c=1", 4 * MB, 2 * MB + 512),
        ("a=1048577", 20 * MB, MB + 512),  # more than 1 MiB: split from 20 MiB
        ("a=9M b=9M", 20 * MB, 18 * MB),
        ("a=9M b=9M c=2M", 20 * MB, 20 * MB),
        ("a=10M", 10 * MB, 10 * MB),  # from 10 MiB on, a segment of its own
        ("a=11.1M", 12 * MB, 12 * MB),  # rounded up to 2 MiB; a rest below 1 MiB is not split off
        ("a=30M a b=12M", 30 * MB, 12 * MB),  # reused and split
        ("a=30M a b=12M c=18M", 30 * MB, 30 * MB),
        (
            "a=30M a b=12M c=19M",
            50 * MB,
            32 * MB,
        ),  # 18 MiB are left; of 20 MiB no 1 MiB is split off
        ("a=30M b=20M a b c=15M", 50 * MB, 15 * MB),
        ("a=30M a b=10M c=10M d=10M b c e=20M", 30 * MB, 30 * MB),  # neighbors merge
        ("a=30M a b=10M c=10M d=10M b d e=20M", 50 * MB, 30 * MB),  # these are not neighbors
        ("a=30M@1 a b=30M@2", 60 * MB, 30 * MB),  # streams do not share blocks
        ("a=30M@1 a b=30M@1", 30 * MB, 30 * MB),
    ],
)
def test_segments(steps, reserved, allocated):
    found = played(*map(mb, steps.split()))
    assert (found.reserved, found.allocated) == (reserved, allocated)


def test_best_fit_takes_the_smallest_block():
    found = played(*map(mb, "a=40M b=20M a b c=19.5M d=40M".split()))
    assert found.reserved == 60 * MB  # c is in the block of 20 MiB, so that d finds 40 MiB


def test_free_segments_are_released_before_a_request_fails():
    found = played(*map(mb, "a=30M b=40M a c=50M".split()), limit=100 * MB)
    assert (found.reserved, found.peak_reserved) == (90 * MB, 90 * MB)
    with pytest.raises(FullError):  # 20 of the 30 MiB are free, but split
        played(*map(mb, "a=30M a d=10M b=40M c=50M".split()), limit=100 * MB)


@pytest.mark.parametrize(
    "steps, reserved",
    [
        ("a=1", 2 * MB),
        ("a=1M b=1M c=1", 4 * MB),
        ("a=3M", 20 * MB),  # pages of 20 MiB
        ("a=30M", 40 * MB),
        ("a=30M b=10M", 40 * MB),  # the rest of the second page
        ("a=30M b=11M", 60 * MB),
        ("a=30M a b=38M", 40 * MB),  # grows in place: a segment of 30 MiB would stay
        ("a=30M b=30M a c=35M", 100 * MB),  # 30 MiB between two used blocks are too few
    ],
)
def test_expandable_segments(steps, reserved):
    assert played(*map(mb, steps.split()), expandable=True).reserved == reserved


def test_a_full_device_unmaps_pages_inside_of_free_blocks():
    steps = [*map(mb, "a=50M b=50M a c=70M".split())]
    # b lies at 50 to 100 MiB. Pages of a at 0 to 40 MiB are unmapped; 10 MiB before b stay.
    found = played(*steps, limit=140 * MB, expandable=True)
    assert (found.reserved, found.allocated) == (140 * MB, 120 * MB)
    with pytest.raises(FullError):
        played(*steps, limit=130 * MB, expandable=True)


def test_the_least_device_of_a_trace():
    # Growing tensors leave segments behind that are too small for the next one.
    names = ["a", "b", "c", "d"]
    requests = []
    for index, name in enumerate(names):
        requests += [(True, name, (100 + 20 * index) * MB), (True, "x" + name, 2 * MB)]
        requests += [(False, name, 0)]
    live = 160 * MB + 8 * MB
    sizes = {
        expandable: least_limit(requests, live, expandable=expandable, within=MB)
        for expandable in (False, True)
    }
    for expandable, size in sizes.items():
        assert fits(requests, size, expandable=expandable)
        assert not fits(requests, size - MB, expandable=expandable)
    # 160 MiB and the segment of 20 MiB with the four tensors of 2 MiB.
    assert 180 * MB <= sizes[False] <= 181 * MB


def test_requests_of_two_steps():
    step = [
        ("allocate", "x", 5, "workspace"),
        ("allocate", "buffer", 7, "host"),
        ("scratch", None, 9, "workspace"),
        ("move", "x", 5, "checkpoints"),
        ("free", "buffer", 7, "host"),
    ]
    start = [("allocate", "weight", 3, "weights"), ("allocate", "state", 4, "optimizer")]
    one = [(True, "x", 5), (True, "scratch", 9), (False, "scratch", 0), (False, "x", 0)]
    # The first update allocates the states; x, which nothing frees, ends with its step.
    expected = [(True, "weight", 3), *one, (True, "state", 4), *one]
    assert requests_of([("", start), ("forward", step)]) == expected
