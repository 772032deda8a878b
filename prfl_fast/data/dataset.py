"""Form batches of a latent dataset in a deterministic, resumable order."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from prfl_fast.data.manifest import Pair, Sample
from prfl_fast.utils.checks import check, check_count


class Batch(NamedTuple):
    """Hold stacked samples in float32: ``latents [B, C, F, H, W]``, conditions, B label records."""

    latents: torch.Tensor
    conditions: dict[str, torch.Tensor]
    labels: list[Mapping[str, Any]]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on ``device``."""
        conditions = {name: tensor.to(device) for name, tensor in self.conditions.items()}
        return Batch(self.latents.to(device), conditions, self.labels)


class PairBatch(NamedTuple):
    """Hold stacked preference pairs."""

    win: Batch
    lose: Batch

    def to(self, device: torch.device | str) -> "PairBatch":
        """Return the batch on ``device``."""
        return PairBatch(self.win.to(device), self.lose.to(device))


def collate(samples: Sequence[Sample | Pair]) -> Batch | PairBatch:
    """Stack samples into a :class:`Batch`, pairs into a :class:`PairBatch`."""
    if isinstance(samples[0], Pair):
        pairs = cast(Sequence[Pair], samples)
        return PairBatch(_stack([p.win for p in pairs]), _stack([p.lose for p in pairs]))
    return _stack(cast(Sequence[Sample], samples))


def _stack(samples: Sequence[Sample]) -> Batch:
    # Files may be bfloat16; losses and noise are float32.
    conditions = {
        name: torch.stack([s.conditions[name].float() for s in samples])
        for name in samples[0].conditions
    }
    return Batch(
        torch.stack([s.latents.float() for s in samples]), conditions, [s.labels for s in samples]
    )


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """Return a permutation of ``range(length)`` that depends on the arguments only."""
    # Seeds and epochs below 1,000,003 map to different generator seeds.
    generator = torch.Generator().manual_seed(int(seed) * 1_000_003 + int(epoch))
    return torch.randperm(length, generator=generator, device="cpu").tolist()


class Batches:
    """Index the endless, shuffled batches of a dataset: ``batches[n]`` depends on n and the seed.

    There is no position to save: a resumed run reads the next n. An epoch drops its incomplete last
    batch.

    Args:
        dataset: a :class:`LatentDataset`, or any object with ``len()`` and ``[i]`` that returns a
            :class:`Sample` or :class:`Pair`.
        batch_size: samples, or pairs, of a batch.
        seed: seed of the order.

    Raises:
        ValueError: if ``batch_size`` is not positive or larger than the dataset.
    """

    # A DataLoader with this order would need a sampler that starts at n, and an iterator state for
    # each objective.

    def __init__(self, dataset: Any, batch_size: int = 1, seed: int = 0) -> None:
        check_count("batch_size", batch_size)
        expected = f"at most {len(dataset)}, the samples of the dataset"
        check(batch_size <= len(dataset), "batch_size", batch_size, expected)
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self._epoch, self._order = -1, [0]  # the permutation of one epoch is cached

    def __getitem__(self, n: int) -> Batch | PairBatch:
        epoch, position = divmod(n, len(self.dataset) // self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.dataset), self.seed, epoch)
        start = position * self.batch_size
        return collate([self.dataset[i] for i in self._order[start : start + self.batch_size]])
