"""Form batches of a latent dataset in a deterministic, resumable order."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch

from prfl_fast.data.manifest import SHORT, Pair, Sample
from prfl_fast.data.order import BatchOrder
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.conditions import TEXT, TEXTS, stack_conditions
from prfl_fast.utils.checks import check, check_count, check_seed, is_number


class Batch(NamedTuple):
    """Hold stacked samples in float32: ``latents [B, C, F, H, W]``, conditions, B label records."""

    latents: torch.Tensor
    conditions: dict[str, torch.Tensor]
    labels: list[Mapping[str, Any]]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on ``device``."""
        # Copies from pinned memory do not wait. Copies to the host must, so that they are complete.
        there: Any = {"device": device, "non_blocking": torch.device(device).type == "cuda"}
        conditions = {name: tensor.to(**there) for name, tensor in self.conditions.items()}
        return Batch(self.latents.to(**there), conditions, self.labels)


class PairBatch(NamedTuple):
    """Hold stacked preference pairs."""

    win: Batch
    lose: Batch

    def to(self, device: torch.device | str) -> "PairBatch":
        """Return the batch on ``device``."""
        return PairBatch(self.win.to(device), self.lose.to(device))


def collate(
    samples: Sequence[Sample | Pair], rows: Mapping[str, int] | None = None
) -> Batch | PairBatch:
    """Stack samples into a :class:`Batch`, pairs into a :class:`PairBatch`.

    Texts get rows of zeros up to the longest text of the batch, or up to the number in ``rows``, as
    models pad them.
    """
    if isinstance(samples[0], Pair):
        pairs = cast(Sequence[Pair], samples)
        sides = ([p.win for p in pairs], [p.lose for p in pairs])
        return PairBatch(*(_stack(side, rows) for side in sides))
    return _stack(cast(Sequence[Sample], samples), rows)


def _stack(samples: Sequence[Sample], rows: Mapping[str, int] | None) -> Batch:
    latents = torch.stack([s.latents.float() for s in samples])
    conditions = stack_conditions([s.conditions for s in samples], rows)
    return Batch(latents, conditions, [s.labels for s in samples])


class Batches:
    """Index the endless, shuffled batches of a dataset: ``batches[n]`` depends on n and the seed.

    There is no position to save: a resumed run reads the next n. A batch has samples of one bucket,
    so its latents have one shape; :class:`prfl_fast.data.order.BatchOrder` has the order. An epoch
    visits every bucket in proportion to its size, and drops the incomplete last batch of each.

    Args:
        dataset: a :class:`LatentDataset`, or any object with ``len()`` and ``[i]`` that returns a
            :class:`Sample` or :class:`Pair`, all of one size.
        batch_size: samples, or pairs, of a batch.
        seed: seed of the order and of the draws of texts.
        text_drop: probability that the conditions of the empty prompt, ``dataset.empty_prompt()``,
            replace a sample's (HY-Video-PRFL: 0.1).
        short_captions: probability of a sample's short caption, if it is not dropped
            (HY-Video-PRFL: 0.3).

    Raises:
        ValueError: if ``batch_size`` is not positive or larger than every bucket, a probability is
            not in [0, 1], or the dataset lacks the texts that a probability asks for.
    """

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
        buckets = getattr(dataset, "buckets", None)
        indices = [range(len(dataset))] if buckets is None else [b.indices for b in buckets]
        most, whole = max(map(len, indices)), getattr(dataset, "folder", "the dataset")
        part = "a size in " if len(indices) > 1 else ""
        expected = f"at most {most}, the samples of {part}{whole}"
        check(batch_size <= most, "batch_size", batch_size, expected)
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.order = BatchOrder(indices, batch_size, seed)
        for name, value in (("text_drop", text_drop), ("short_captions", short_captions)):
            check(is_number(value) and 0 <= value <= 1, name, value, "a number in [0, 1]")
        self.text_drop, self.short_captions = text_drop, short_captions
        ok, expected = not text_drop or hasattr(dataset, "empty_prompt"), "0 for a dataset without"
        check(ok, "text_drop", text_drop, f"{expected} empty_prompt()")
        ok = not short_captions or getattr(dataset, "short", True)
        check(ok, "short_captions", short_captions, f"0 for {whole}, which has no {SHORT}")
        self._empty = dataset.empty_prompt() if text_drop else {}
        # Every batch has the rows of the dataset's longest text, as a negative prompt that is
        # guided in the same call must have the rows of the batch.
        shapes = {} if buckets is None else dataset.shapes
        self._rows = {name: shapes[name][0] for name in TEXTS & shapes.keys()}

    def dropped(self) -> str:
        """Return a sentence on the samples that incomplete batches leave out; empty for none."""
        left = sum(len(b) % self.batch_size for b in self.order.buckets)
        never = sum(len(b) for b in self.order.buckets if len(b) < self.batch_size)
        text = f"each epoch leaves out {left} of {len(self.dataset)} samples, incomplete batches"
        if never:
            text += f"; {never} of them always, as their buckets have fewer than {self.batch_size}"
        return text if left else ""

    def __getitem__(self, n: int) -> Batch | PairBatch:
        return self.read(*self.order.place(n), n)

    def read(self, bucket: int, number: int, n: int) -> Batch | PairBatch:
        """Return a batch of one bucket, with the draws of texts of batch n."""
        items = [self.dataset[i] for i in self.order.indices(bucket, number)]
        if self.text_drop or self.short_captions:
            # Draws depend on n and the seed only, as the order does.
            draw = random.Random(f"texts {self.seed} {n}").random
            items = [self._with_text(item, draw(), draw()) for item in items]
        return collate(items, self._rows)

    def _with_text(self, item: Sample | Pair, drop: float, short: float) -> Sample | Pair:
        """Replace the text of a sample, or of both videos of a pair, as the draws say."""
        if isinstance(item, Pair):
            return Pair(*(cast(Sample, self._with_text(s, drop, short)) for s in item))
        chosen: Conditions = {}
        if drop < self.text_drop:
            chosen = self._empty
        elif short < self.short_captions and item.short is not None:
            chosen = {TEXT: item.short}
        return item._replace(conditions={**item.conditions, **chosen})


class DrawnPairs:
    """Pair batches of videos with losers drawn from a second list, for Bradley-Terry training.

    ``pairs[n]`` is a :class:`PairBatch` of batch n of the winners and the next batch of losers of
    the same bucket. Both :class:`Batches` have the same batch size. Raise ``ValueError`` if shapes
    of the datasets differ in more than the length of texts, or a bucket has too few losers.
    """

    def __init__(self, win: Batches, lose: Batches) -> None:
        theirs = [_fixed(bucket.shapes) for bucket in lose.dataset.buckets]
        self._bucket_of_losers: dict[int, int] = {}
        for number, bucket in enumerate(win.dataset.buckets):
            ours = _fixed(bucket.shapes)
            if not win.order.counts[number]:
                continue
            check(ours in theirs, "shapes of the losers' dataset", theirs, f"{ours}, the winners'")
            match = self._bucket_of_losers[number] = theirs.index(ours)
            found = len(lose.dataset.buckets[match].indices)
            name = f"number of losers with latents {list(ours['latents'])}"
            check(lose.order.counts[match] > 0, name, found, f"at least {lose.batch_size}, a batch")
        self.win, self.lose = win, lose

    def __getitem__(self, n: int) -> PairBatch:
        bucket, number = self.win.order.place(n)
        losers = self.lose.read(self._bucket_of_losers[bucket], number, n)
        return PairBatch(cast(Batch, self.win[n]), cast(Batch, losers))


class Winners:
    """Index the winners of pair batches: ``winners[n]`` is a :class:`Batch`."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __getitem__(self, n: int) -> Batch:
        return cast(PairBatch, self.pairs[n]).win


def _fixed(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return shapes without the number of text rows."""
    return {name: shape[1:] if name in TEXTS else shape for name, shape in shapes.items()}
