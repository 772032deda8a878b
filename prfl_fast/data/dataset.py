"""Form batches of a latent dataset in a deterministic, resumable order."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch.nn.functional import pad

from prfl_fast.data.manifest import SHORT, TEXT, Pair, Sample
from prfl_fast.utils.checks import check, check_count, check_seed, is_number, torch_seed


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
    # Seeds below 2^44 and epochs below 1,000,003 map to different generator seeds.
    generator = torch.Generator().manual_seed(torch_seed(int(seed) * 1_000_003 + int(epoch)))
    return torch.randperm(length, generator=generator, device="cpu").tolist()


class Batches:
    """Index the endless, shuffled batches of a dataset: ``batches[n]`` depends on n and the seed.

    There is no position to save: a resumed run reads the next n. An epoch drops its incomplete last
    batch.

    Args:
        dataset: a :class:`LatentDataset`, or any object with ``len()`` and ``[i]`` that returns a
            :class:`Sample` or :class:`Pair`.
        batch_size: samples, or pairs, of a batch.
        seed: seed of the order and of the draws of texts.
        text_drop: probability that the empty prompt's text, ``dataset.empty_prompt()``, replaces a
            sample's (HY-Video-PRFL: 0.1).
        short_captions: probability of a sample's short caption, if it is not dropped
            (HY-Video-PRFL: 0.3).

    Raises:
        ValueError: if ``batch_size`` is not positive or larger than the dataset, a probability is
            not in [0, 1], or the dataset lacks the texts that a probability asks for.
    """

    # A DataLoader with this order would need a sampler that starts at n, and an iterator state for
    # each objective.

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        seed: int = 0,
        *,
        text_drop: float = 0.0,
        short_captions: float = 0.0,
    ) -> None:
        check_count("batch_size", batch_size)
        check_seed(seed)
        expected = f"at most {len(dataset)}, the samples of the dataset"
        check(batch_size <= len(dataset), "batch_size", batch_size, expected)
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self._epoch, self._order = -1, [0]  # the permutation of one epoch is cached
        for name, value in (("text_drop", text_drop), ("short_captions", short_captions)):
            check(is_number(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")
        self.text_drop, self.short_captions = text_drop, short_captions
        ok, expected = not text_drop or hasattr(dataset, "empty_prompt"), "0 for a dataset without"
        check(ok, "text_drop", text_drop, f"{expected} empty_prompt()")
        ok = not short_captions or getattr(dataset, "short", True)
        check(ok, "short_captions", short_captions, f"{expected} {SHORT}")
        self._empty = dataset.empty_prompt() if text_drop else None

    def __getitem__(self, n: int) -> Batch | PairBatch:
        epoch, position = divmod(n, len(self.dataset) // self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.dataset), self.seed, epoch)
        start = position * self.batch_size
        items = [self.dataset[i] for i in self._order[start : start + self.batch_size]]
        if not (self.text_drop or self.short_captions):
            return collate(items)
        # Draws depend on n and the seed only, as the order does.
        draw = random.Random(f"texts {self.seed} {n}").random
        return collate([self._with_text(item, draw(), draw()) for item in items])

    def _with_text(self, item: Sample | Pair, drop: float, short: float) -> Sample | Pair:
        """Replace the text of a sample, or of both videos of a pair, as the draws say."""
        if isinstance(item, Pair):
            return Pair(*(cast(Sample, self._with_text(s, drop, short)) for s in item))
        text = item.conditions[TEXT]
        if drop < self.text_drop:
            assert self._empty is not None
            chosen = self._empty
        elif short < self.short_captions and item.short is not None:
            chosen = item.short
        else:
            return item
        # The model's adapter pads with zeros too.
        chosen = pad(chosen.to(text), (0, 0, 0, max(len(text) - len(chosen), 0)))
        return item._replace(conditions={**item.conditions, TEXT: chosen})


class DrawnPairs:
    """Pair batches of videos with losers drawn from a second list, for Bradley-Terry training.

    ``pairs[n]`` is a :class:`PairBatch` of batch n of both :class:`Batches`, which have the same
    size. Raise ``ValueError`` if shapes of the datasets differ in more than the length of texts.
    """

    def __init__(self, win: Batches, lose: Batches) -> None:
        ours, theirs = (
            {key: s[1:] if key == TEXT else s for key, s in batches.dataset.shapes.items()}
            for batches in (win, lose)
        )
        check(ours == theirs, "shapes of the losers' dataset", theirs, f"{ours}, the winners'")
        self.win, self.lose = win, lose

    def __getitem__(self, n: int) -> PairBatch:
        return PairBatch(cast(Batch, self.win[n]), cast(Batch, self.lose[n]))
