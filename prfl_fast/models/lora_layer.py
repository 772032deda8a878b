"""Low-rank change of one layer, as files of adapters hold it."""

from typing import NamedTuple

import torch


class LoraLayer(NamedTuple):
    """Low-rank change of one layer: ``weight + alpha / rank * up @ down``."""

    down: torch.Tensor  # [rank, in], of a convolution [rank, in, ...]
    up: torch.Tensor  # [out, rank], of a convolution [out, rank, 1, ...]
    alpha: float
    magnitude: torch.Tensor | None = None  # of DoRA: norms of the rows of the changed weight
    bias: torch.Tensor | None = None  # of peft's ``lora_bias``: [out], scaled like the product

    def delta(self) -> torch.Tensor:
        """Return the change of the weight before DoRA, float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        product *= self.alpha / len(self.down)
        return product.view(len(self.up), *self.down.shape[1:])

    def merge(self, part: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the layer's ``"weight"`` or ``"bias"`` with the adapter, in its dtype.

        Sums are float32 (float64 for float64) and rounded once, nearest even.
        """
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        if part == "bias":
            if self.bias is None:
                return tensor
            changed = tensor.to(wide) + self.bias.to(wide) * (self.alpha / len(self.down))
        else:
            changed = tensor.to(wide) + self.delta()
            if self.magnitude is not None:
                rows = changed.flatten(1)
                rows *= self.magnitude.to(wide).view(-1, 1) / rows.norm(dim=1, keepdim=True)
        return changed.to(tensor.dtype)
