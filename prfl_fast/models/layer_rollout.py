"""Rollouts of models whose blocks keep their forwards: only linear layers are replaced."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.models.inference import (
    BlockPrecision,
    RolloutModel,
    RolloutOptions,
    replaced_forwards,
)
from prfl_fast.models.inference_linear import add_note, as_matrix


class LayerRollout(RolloutModel):
    """Compute velocities of one rollout, see :class:`RolloutModel`.

    With ``merge_lora`` or FP8, the linear layers of a block are replaced while the block runs.
    Attention stays exact and blocks are not compiled; ``notes`` reports both.
    """

    def __init__(
        self,
        call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        like: torch.Tensor,
        blocks: Sequence[nn.Module],
        timesteps: Sequence[torch.Tensor],
        options: RolloutOptions,
    ) -> None:
        unused: Any = None
        super().__init__(
            call,
            like,
            blocks=blocks,
            parts=unused,
            keys=(),
            cached=lambda step: [],
            modulation=unused,
            timesteps=timesteps,
            options=options,
        )
        self._forwards = [block.forward for block in blocks]
        self._merge = options.merge_lora
        if self.step_cache is not None:
            self.step_cache = None  # these blocks return other things than one residual stream
            add_note(self.notes, "residuals of blocks are not reused: only those of Wan are")
        if options.compile:
            add_note(self.notes, "blocks are not compiled: only those of Wan are")

    def _run(self, index: int, precision: BlockPrecision, *args: Any, **kwargs: Any) -> Any:
        block, (fp8, eight_bits, density) = self._blocks[index], precision
        if eight_bits:
            add_note(self.notes, "attention stays exact: only Wan's blocks have 8-bit attention")
        if density < 1:
            add_note(self.notes, "attention is not sparse: only that of Wan's blocks can be")
        replaced = []
        if fp8 or self._merge:
            dtype = self._autocast or next(iter((*args, *kwargs.values()))).dtype
            inside: set[nn.Module] = set()  # the base layer and the matrices of an adapted layer
            for module in block.modules():
                matrix = as_matrix(module)
                if module in inside or isinstance(matrix, str) or not (fp8 or matrix.adapters):
                    continue
                inside.update(module.modules())
                made = self._layers(module, dtype, fp8)
                if made is not module:
                    replaced.append((module, made))
        with replaced_forwards(replaced):
            return self._forwards[index](*args, **kwargs)
