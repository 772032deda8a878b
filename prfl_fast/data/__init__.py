"""Datasets of latents, conditions and labels."""

from prfl_fast.data.dataset import Batch, Batches, PairBatch, epoch_order
from prfl_fast.data.manifest import LatentDataset, Pair, Sample, write_dataset

__all__ = [
    "Batch",
    "Batches",
    "LatentDataset",
    "Pair",
    "PairBatch",
    "Sample",
    "epoch_order",
    "write_dataset",
]
