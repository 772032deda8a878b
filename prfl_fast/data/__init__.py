"""Datasets of latents, conditions and labels."""

from prfl_fast.data.dataset import Batch, Batches, DrawnPairs, PairBatch, epoch_order
from prfl_fast.data.manifest import LatentDataset, Pair, Sample, write_dataset

__all__ = [
    "Batch",
    "Batches",
    "DrawnPairs",
    "LatentDataset",
    "Pair",
    "PairBatch",
    "Sample",
    "epoch_order",
    "write_dataset",
]
