"""Order the batches of a dataset: shuffled, resumable, each batch within one bucket."""

import random
from collections.abc import Sequence

import torch

from prfl_fast.utils.checks import torch_seed


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """Return a permutation of ``range(length)`` that depends on the arguments only."""
    # Seeds below 2^44 and epochs below 1,000,003 map to different generator seeds.
    generator = torch.Generator().manual_seed(torch_seed(int(seed) * 1_000_003 + int(epoch)))
    return torch.randperm(length, generator=generator, device="cpu").tolist()


class BatchOrder:
    """Choose the samples of batch n, which depend on n, the seed and the buckets only.

    Each bucket has an endless sequence of shuffled batches, and an epoch has all complete batches
    of every bucket, in a shuffled order. The incomplete last batch of a bucket is dropped, and its
    samples come in other epochs, as each epoch shuffles anew.

    Args:
        buckets: indices of the samples of each bucket.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], batch_size: int, seed: int) -> None:
        self.buckets, self.batch_size, self.seed = buckets, batch_size, seed
        self.counts = [len(indices) // batch_size for indices in buckets]
        # The order of one epoch is cached, of the buckets and of the samples of each.
        self._epoch, self._places = -1, [(0, 0)]
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def place(self, n: int) -> tuple[int, int]:
        """Return the bucket of batch n, and the number of earlier batches of that bucket."""
        epoch, position = divmod(n, sum(self.counts))
        if epoch != self._epoch:
            bucket_of = [b for b, count in enumerate(self.counts) for _ in range(count)]
            random.Random(f"buckets {self.seed} {epoch}").shuffle(bucket_of)
            seen = [epoch * count for count in self.counts]
            self._epoch, self._places = epoch, []
            for bucket in bucket_of:
                self._places.append((bucket, seen[bucket]))
                seen[bucket] += 1
        return self._places[position]

    def indices(self, bucket: int, number: int) -> list[int]:
        """Return the samples of a batch of a bucket."""
        members = self.buckets[bucket]
        epoch, position = divmod(number, self.counts[bucket])
        cached, order = self._orders.get(bucket, (-1, []))
        if cached != epoch:
            order = epoch_order(len(members), self.seed, epoch)
            self._orders[bucket] = epoch, order
        start = position * self.batch_size
        return [members[i] for i in order[start : start + self.batch_size]]


def consecutive(buckets: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Return the indices of all samples in their own order, in batches within buckets."""
    bucket_of = {i: number for number, indices in enumerate(buckets) for i in indices}
    batches: list[list[int]] = []
    for index in sorted(bucket_of):
        last = batches[-1] if batches else []
        if 0 < len(last) < batch_size and bucket_of[last[0]] == bucket_of[index]:
            last.append(index)
        else:
            batches.append([index])
    return batches
