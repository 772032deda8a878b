"""Datasets of latents, conditions and labels."""

from prfl_fast.data.dataset import Batch, Batches, DrawnPairs, PairBatch
from prfl_fast.data.loader import LoadedBatches
from prfl_fast.data.manifest import LatentDataset, Pair, Sample, write_dataset
from prfl_fast.data.order import epoch_order

__all__ = [
    "Batch",
    "Batches",
    "DrawnPairs",
    "LatentDataset",
    "LoadedBatches",
    "Pair",
    "PairBatch",
    "Sample",
    "epoch_order",
    "write_dataset",
]
