"""Sequence parallelism of Wan's blocks: each rank of a group runs a part of a sample's tokens.

The first block keeps this rank's tokens of the whole sequence. Attention exchanges tokens for
heads, so that each rank computes some heads over all tokens (Ulysses, arXiv 2309.14509). Norms,
cross-attention and feed-forward need no other rank's tokens. The head runs on the part too, and its
output is gathered: 64 channels instead of D. Ranks start from equal latents and end with equal
velocities.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from prfl_fast.kernels import attention, qk_norm_rope, rollout_attention
from prfl_fast.kernels.common.rope import by_token
from prfl_fast.models.blocks import BlockParts, Modulation, Rope
from prfl_fast.models.inference_linear import half_of
from prfl_fast.utils.checks import check
from prfl_fast.utils.collectives import (
    begin_to_heads,
    bounds,
    gather_tokens,
    local_tokens,
    replicated,
    split_tokens,
    to_heads,
    to_tokens,
)

SEQUENCE = "sequence_shards"  # attribute of a model and of its modules with other forwards


class SequenceShards:
    """Share the tokens of a model's samples among the ranks of a group.

    Attributes:
        group: process group of the ranks that share a sample.
        ranks: their number.
        tokens: L, tokens of the forward that runs; padding does not count.
    """

    def __init__(self, group: Any, first: Any) -> None:
        self.group, self.ranks, self._first = group, dist.get_world_size(group), first
        self.tokens = 0
        # Of the forward that runs, as all its blocks have the same ones:
        self._rope: Any = (None, None)  # given positions, those of this rank's tokens
        self._rows: Any = (None, None)  # key of the modulation, row of each of this rank's tokens

    def __deepcopy__(self, memo: object) -> None:  # a copy of a model is whole
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    @property
    def own_length(self) -> int:
        """Number of this rank's tokens without padding."""
        start, stop = bounds(self.tokens, self.group)
        return stop - start

    def enter(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's tokens ``[B, l, D]`` of a block's input.

        The first block receives all tokens ``[B, L, D]``, the others this rank's. Raise
        ``ValueError`` if a rank would have no tokens.
        """
        if block is not self._first:
            return x
        if x.shape[1] != self.tokens:
            tokens = x.shape[1]
            full = (self.ranks - 1) * -(-tokens // self.ranks)  # tokens of all ranks but the last
            expected = f"enough to give each of {self.ranks} ranks a part"
            check(full < tokens, "the number of tokens", tokens, expected)
            self.tokens = tokens
        return split_tokens(x, self.group)

    def arguments(
        self, modulation: Modulation, rope: Rope, parts: BlockParts, batch: int, eight_bits: bool
    ) -> tuple[Modulation, Rope, BlockParts]:
        """Return the arguments of ``transformer_block`` for this rank's tokens."""
        # Not self.tokens: blocks are run again after forwards of other sizes.
        tokens = len(rope.cos) if rope.grid is None else math.prod(rope.grid)
        attend = partial(self._exchanged, tokens, _attend_in_8_bits if eight_bits else attention)
        parts = parts._replace(attend=attend, node=None)
        return self._modulation(modulation, batch, tokens), self._own_rope(rope), parts

    def _modulation(self, modulation: Modulation, batch: int, tokens: int) -> Modulation:
        """Return the modulation with a row for each of this rank's tokens, where rows differ."""
        table, time, row_index = modulation
        if row_index is not None:
            return Modulation(table, time, local_tokens(row_index, self.group))
        count = len(time) // batch  # rows of a sample
        if count == 1:
            return modulation
        key = (count, batch, tokens, time.device)
        if self._rows[0] != key:
            row = torch.arange(tokens, device=time.device) // (tokens // count)
            rows = row + count * torch.arange(batch, device=time.device)[:, None]  # [B, L]
            self._rows = key, local_tokens(rows.to(torch.int32), self.group)
        return Modulation(table, time, self._rows[1])

    def _own_rope(self, rope: Rope) -> Rope:
        """Return the positions of this rank's tokens, in a row for each."""
        given, own = self._rope
        if given is not rope:
            cos, sin = rope.cos, rope.sin
            if rope.grid is not None:
                grid, offset = [*rope.grid], [*rope.offset]
                cos, sin = (by_token(table, grid, offset).squeeze(1) for table in (cos, sin))
            cos, sin = (local_tokens(table[None], self.group)[0] for table in (cos, sin))
            own = Rope(cos, sin, None)
            self._rope = (rope, own)
        return own  # type: ignore[no-any-return]

    def _exchanged(
        self,
        tokens: int,
        attend: Callable[..., Any],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *norm_and_rope: Any,
    ) -> torch.Tensor:
        """Compute ``norm_attention`` of this rank's tokens ``[B, l, D]``, with its arguments."""
        q_weight, k_weight, cos, sin, grid, offset, heads, eps = norm_and_rope
        rope = {"cos": cos, "sin": sin, "grid": grid, "offset": offset}
        # The norm is over all heads, so it precedes the exchange of q and k, beside that of v.
        exchanged_v = begin_to_heads(v, tokens, self.group)
        q, k = qk_norm_rope(q, k, q_weight, k_weight, heads=heads, eps=eps, **rope)
        q, k = (to_heads(x, tokens, self.group) for x in (q, k))
        found = attend(q, k, exchanged_v(), heads=heads // self.ranks)
        return to_tokens(found[0] if isinstance(found, tuple) else found, self.group)


def _attend_in_8_bits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int
) -> torch.Tensor:
    half = half_of(q.dtype)
    return rollout_attention(q.to(half), k.to(half), v.to(half), heads=heads).to(q.dtype)


def shards_of(module: Any) -> SequenceShards | None:
    """Return the shards of a model, or of a module that takes part; None if it runs whole."""
    return vars(module).get(SEQUENCE)


def own_tokens(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Return this rank's tokens of ``[B, L, ...]``; all tokens if the model runs whole."""
    shards = shards_of(module)
    return x if shards is None else split_tokens(x, shards.group)


def latents_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Replace the forward of the patch embedding, whose input may need a gradient."""
    shards = shards_of(self)
    x = x if shards is None else replicated(x, shards.group)
    out: torch.Tensor = type(self).forward(self, x)
    return out


def head_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Replace the forward of the last projection: run it on this rank's tokens, gather these."""
    shards = shards_of(self)
    out: torch.Tensor = type(self).forward(self, x)
    return out if shards is None else gather_tokens(out, shards.tokens, shards.group)


def check_heads(heads: int, ranks: int) -> None:
    """Raise ``ValueError`` unless ``ranks`` divide the heads."""
    best = max(n for n in range(1, ranks + 1) if heads % n == 0)
    hint = f"Each rank attends with some heads. The largest number that fits is {best}"
    expected = f"a divisor of the model's {heads} heads"
    check(heads % ranks == 0, "the number of ranks that share a sample", ranks, expected, hint=hint)
