"""Meshes of the ranks of a run."""

import pytest
from ranks import run_ranks

from prfl_fast.parallel import ParallelConfig, make_mesh


def test_sizes_of_four_ranks():
    cases = [
        (ParallelConfig(), (1, 4, 1)),
        (ParallelConfig(sequence=2), (1, 2, 2)),
        (ParallelConfig(shard=4, sequence=4), (1, 1, 4)),
        (ParallelConfig(shard=2), (2, 2, 1)),
        (ParallelConfig(shard=2, sequence=2), (2, 1, 2)),
        (ParallelConfig(shard=1, sequence=2), (2, 1, 2)),
    ]

    def found():
        return [(config, tuple(make_mesh(config).mesh.shape)) for config, _ in cases]

    assert run_ranks(4, found) == [cases] * 4


def test_bad_sizes():
    with pytest.raises(ValueError, match="shard is 6, expected 1, or a multiple of sequence = 4"):
        ParallelConfig(shard=6, sequence=4)
    with pytest.raises(ValueError, match="sequence is 0"):
        ParallelConfig(sequence=0)
    with pytest.raises(ValueError, match="sequence is 3, expected a divisor of 4"):
        ParallelConfig(sequence=3).sizes(4)
    with pytest.raises(RuntimeError, match="Start the program with torchrun"):
        make_mesh()
