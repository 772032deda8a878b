"""Count a dataset's samples, sizes and labels, and measure its latents."""

from collections import Counter
from typing import Any, NamedTuple

from prfl_fast.data.manifest import Bucket, LatentDataset, Pair
from prfl_fast.data.values import ChannelStatistics
from prfl_fast.utils.progress import count_progress

SAMPLES_READ = 256  # enough to tell normalized latents from others


class DatasetReport(NamedTuple):
    """Describe a dataset.

    Attributes:
        samples: number of videos, or of pairs.
        labels: for each label, the number of samples by value; None counts those without it.
        channels: statistics of the latents that were read; of prompts alone there are none.
        read: number of samples that were read, spread evenly over the dataset.
        digest: SHA-256 digest of the manifest.
    """

    samples: int
    pairs: bool
    buckets: list[Bucket]
    labels: dict[str, Counter[Any]]
    channels: ChannelStatistics
    read: int
    digest: str


def describe_dataset(dataset: LatentDataset, most: int = SAMPLES_READ) -> DatasetReport:
    """Describe a dataset; at most ``most`` samples are read, with a progress bar.

    Raise ``ValueError`` if a sample is damaged or has non-finite values.
    """
    total = len(dataset)
    read = sorted({i * total // min(most, total) for i in range(min(most, total))})
    channels = ChannelStatistics()
    with count_progress("inspect", "samples", len(read)) as show:
        for index in read:
            show("")
            item = dataset[index]
            if dataset.prompts_only:
                continue
            for sample in (item.win, item.lose) if isinstance(item, Pair) else (item,):
                channels.add(sample.latents)
    records = [record for _, record in dataset.labels()]
    names = sorted({name for record in records for name in record})
    labels = {name: Counter(record.get(name) for record in records) for name in names}
    return DatasetReport(
        total, dataset.pairs, dataset.buckets, labels, channels, len(read), dataset.digest()
    )
