"""Datasets of several sizes: buckets, the order of their batches, and drawn losers."""

from collections import Counter

import pytest
import torch
from runs import samples

from prfl_fast.data import Batches, DrawnPairs, LatentDataset, Pair, write_dataset
from prfl_fast.data.order import BatchOrder, consecutive, epoch_order

BIG, SMALL, SHORT = (3, 4, 6), (2, 4, 4), (1, 4, 4)


def mixed(folder, *counts, seed=0):
    """Write samples of the three sizes, in turn, with texts of different lengths."""
    groups = [
        samples(count, seed + i, size=size, rows=i + 1)
        for i, (size, count) in enumerate(zip((BIG, SMALL, SHORT), counts, strict=False))
    ]
    longest = max(map(len, groups))
    return write_dataset(folder, [g[i] for i in range(longest) for g in groups if i < len(g)])


def read(batches, count):
    """Return latents and texts of the first batches."""
    found = [batches[n] for n in range(count)]
    return [(b.latents, b.conditions["encoder_hidden_states"]) for b in found]


def test_buckets_have_one_size_each_and_the_largest_comes_first(tmp_path):
    dataset = mixed(tmp_path, 3, 2, 2)
    assert [b.shapes["latents"] for b in dataset.buckets] == [(16, *s) for s in (BIG, SMALL, SHORT)]
    assert [b.indices for b in dataset.buckets] == [[0, 3, 6], [1, 4], [2, 5]]
    assert {b.shapes["encoder_hidden_states"] for b in dataset.buckets} == {(3, 20)}
    assert dataset.shapes == dataset.buckets[0].shapes
    assert [len(dataset[i].conditions["encoder_hidden_states"]) for i in range(3)] == [1, 2, 3]


def test_an_epoch_has_every_complete_batch_of_every_bucket(tmp_path):
    dataset = mixed(tmp_path, 7, 4, 1)
    batches = Batches(dataset, 2, seed=5)
    assert batches.dropped() == (
        "each epoch leaves out 2 of 12 samples, incomplete batches; "
        "1 of them always, as their buckets have fewer than 2"
    )
    orders, seen = set(), Counter()
    for epoch in range(6):
        found = read(batches, 5 * epoch + 5)[-5:]
        sizes = tuple(tuple(latents.shape[2:]) for latents, _ in found)
        assert Counter(sizes) == {BIG: 3, SMALL: 2}
        orders.add(sizes)
        of_epoch = [latent.sum().item() for latents, _ in found for latent in latents]
        assert len(set(of_epoch)) == 10 and all(text.shape[1:] == (3, 20) for _, text in found)
        seen.update(of_epoch)
    assert len(orders) > 1 and len(seen) == 11  # the sample that is left out changes
    for n in (13, 2, 29):  # in any order, from a new object
        assert torch.equal(Batches(dataset, 2, seed=5)[n].latents, batches[n].latents)
    assert Batches(mixed(tmp_path / "whole", 4, 2), 2).dropped() == ""


def test_one_bucket_has_the_order_of_an_epoch():
    order = BatchOrder([range(7)], 2, 3)
    for n in range(9):
        epoch, position = divmod(n, 3)
        expected = epoch_order(7, 3, epoch)[2 * position : 2 * position + 2]
        assert order.indices(*order.place(n)) == expected


def test_losers_come_from_the_bucket_of_the_winners(tmp_path):
    win, lose = mixed(tmp_path / "win", 4, 4), mixed(tmp_path / "lose", 3, 6, 2, seed=9)
    pairs = DrawnPairs(Batches(win, 2, 1), Batches(lose, 2, 2))
    losers = {BIG: Counter(), SMALL: Counter()}
    for n in range(12):
        pair = pairs[n]
        size = tuple(pair.win.latents.shape[2:])
        assert pair.lose.latents.shape == pair.win.latents.shape
        losers[size].update(latent.sum().item() for latent in pair.lose.latents)
    assert losers[SMALL].most_common()[0][1] == losers[SMALL].most_common()[-1][1] == 2
    assert len(losers[BIG]) == 3 and losers[BIG].total() == 12
    few = mixed(tmp_path / "few", 1, 4)
    with pytest.raises(ValueError, match=r"losers with latents \[16, 3, 4, 6\] is 1, expected at"):
        DrawnPairs(Batches(win, 2), Batches(few, 2))
    with pytest.raises(ValueError, match="shapes of the losers' dataset"):
        DrawnPairs(Batches(win, 2), Batches(write_dataset(tmp_path / "one", samples(2)), 2))


def test_pairs_have_one_size_each(tmp_path):
    small, big = samples(3), samples(3, size=BIG)
    pairs = [Pair(small[0], small[1]), Pair(big[0], big[1]), Pair(big[1], big[2])]
    dataset = write_dataset(tmp_path / "pairs", pairs)
    assert [b.indices for b in dataset.buckets] == [[1, 2], [0]]
    batch = Batches(dataset, 2)[0]
    assert batch.win.latents.shape == batch.lose.latents.shape == (2, 16, *BIG)
    message = r"lose: latents is \[16, 3, 4, 6\], expected \[16, 2, 4, 4\], those of win"
    with pytest.raises(ValueError, match=f"manifest.jsonl:1: {message}"):
        write_dataset(tmp_path / "unlike", [Pair(small[0], big[0])])


def test_consecutive_batches_keep_the_order_of_the_samples():
    assert consecutive([range(5)], 2) == [[0, 1], [2, 3], [4]]
    assert consecutive([[0, 1, 2, 6], [3, 4, 5]], 2) == [[0, 1], [2], [3, 4], [5], [6]]


def test_a_batch_larger_than_every_bucket_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at most 3, the samples of a size"):
        Batches(mixed(tmp_path, 3, 3), 4)
    assert len(LatentDataset(tmp_path).buckets) == 2
