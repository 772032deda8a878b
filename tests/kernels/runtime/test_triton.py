"""The number of multiprocessors that launches use."""

from types import SimpleNamespace

import pytest
import torch
from dtypes import BF16

from prfl_fast.kernels.attn import norm_rope
from prfl_fast.kernels.common import fp8
from prfl_fast.kernels.flow import loss
from prfl_fast.kernels.linear import gelu
from prfl_fast.kernels.norm import modulate_triton, residual, residual_modulate_triton, rms
from prfl_fast.kernels.runtime import cuda_launch
from prfl_fast.kernels.runtime import triton as module

TOKENS = 32760
NORM = (TOKENS, 1, 5120, 2)  # tokens, rows of modulation, D, bytes of an element
# Programs of launches that fill a board exactly once, or in whole waves.
WAVES = {
    "norm_modulate": lambda c: modulate_triton.backward_launch(*NORM, c, True).programs,
    "residual_norm_modulate": lambda c: (
        residual_modulate_triton.backward_launch(*NORM, c, True).programs
    ),
    "gated_residual": lambda c: residual.backward_launch(TOKENS, 1, 1536, c, True).programs,
    "qk_norm_rope": lambda c: norm_rope.backward_launch(TOKENS, 1536, 128, BF16, c).programs,
    "rows to fp8": lambda c: fp8.row_launch(TOKENS, 5120, c).programs,
    "few tokens": lambda c: norm_rope.forward_launch(8000, 1536, 128, BF16, c).programs,
}  # fmt: skip
BOARDS = {"H20": (9, 0, 78), "H100 PCIe": (9, 0, 114), "H200": (9, 0, 132), "4090": (8, 9, 128)}


@pytest.fixture
def board(monkeypatch):
    """Return a function that gives the capability of a GPU with some multiprocessors."""

    def of(major, minor, count, chosen=None):
        module._board.cache_clear()
        properties = SimpleNamespace(multi_processor_count=count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        if chosen is not None:
            monkeypatch.setenv("PRFL_FAST_MULTIPROCESSORS", chosen)
        return module.capability(torch.device("cuda", 0))

    yield of
    module._board.cache_clear()


@pytest.mark.parametrize("which", WAVES)
@pytest.mark.parametrize("name", BOARDS)
def test_launches_fill_the_board_in_whole_waves(board, name, which):
    capability = board(*BOARDS[name])
    assert capability == BOARDS[name]
    assert WAVES[which](capability) % capability[2] == 0


@pytest.mark.parametrize("name", BOARDS)
def test_sums_of_other_operations_fit_one_wave(board, name):
    capability = board(*BOARDS[name])
    assert rms.backward_launch(12 * TOKENS, 128, capability).programs <= 8 * capability[2]
    assert loss.sum_launch(10**7, capability).programs <= 12 * capability[2]
    chunks = gelu.backward_launch(TOKENS, 13824, capability).chunks
    assert 5 * capability[2] < chunks * -(-13824 // 512) <= 6 * capability[2]
    pool = cuda_launch.pool_launch(1, TOKENS, 8, 1536, BF16, capability)
    assert pool is None or pool.splits == 2 * capability[2]


@pytest.mark.parametrize("which", WAVES)
def test_one_number_gives_one_launch_on_every_board(board, which):
    numbers = {WAVES[which](board(9, 0, count, "114")) for count in (78, 114, 132)}
    assert numbers == {WAVES[which]((9, 0, 114))}


def test_a_bare_capability_stands_for_a_common_board():
    assert [module.multiprocessors((major, 0)) for major in (8, 9, 10, 12)] == [108, 132, 148, 170]
    assert module.capability(torch.device("cpu")) == (8, 0)


@pytest.mark.parametrize("chosen", ["", "0", "-3", "many"])
def test_other_numbers_are_refused(board, chosen):
    with pytest.raises(ValueError, match="PRFL_FAST_MULTIPROCESSORS is .*, expected a positive"):
        board(9, 0, 132, chosen)
