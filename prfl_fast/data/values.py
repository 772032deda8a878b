"""Read every sample of a dataset and check its values."""

import math

import torch

from prfl_fast.data.manifest import LatentDataset, Pair
from prfl_fast.utils.progress import count_progress

# Standard deviation of a normalized latent's channel over a dataset: near 1. Those of Wan's VAE
# before (z - mean) / std are 1.1 to 3.3, with a geometric mean of 2.0.
_CHANNEL, _ALL = (0.25, 4.0), (0.6, 1.6)


def check_values(dataset: LatentDataset) -> None:
    """Read all samples of a dataset and check their values; show the progress.

    Raises:
        ValueError: if a sample has NaN, infinite or too large values, or the latents of the whole
            dataset are scaled unlike normalized latents.
    """
    problems: list[str] = []
    spread = ChannelStatistics()
    with count_progress("check", "samples", len(dataset)) as show:
        for index, name in enumerate(dataset.ids()):
            show(name)
            try:
                item = dataset[index]
                if dataset.prompts_only:
                    continue
                for sample in (item.win, item.lose) if isinstance(item, Pair) else (item,):
                    spread.add(sample.latents)
            except (ValueError, OSError) as error:
                problems.append(str(error))
    if problems:
        more = f" ({len(problems) - 1} more items are bad)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}")
    if not dataset.prompts_only and (problem := spread.problem()):
        raise ValueError(f"{dataset.folder}: {problem}")


class ChannelStatistics:
    """Accumulate mean and standard deviation of each channel over samples, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.squares = torch.zeros((), device="cpu")

    def add(self, latents: torch.Tensor) -> None:
        """Add the latents ``[C, F, H, W]`` of one sample."""
        values = latents.double().flatten(1)
        self.count += values.shape[1]
        self.sum = self.sum + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    @property
    def means(self) -> list[float]:
        """Return the mean of each channel."""
        return (self.sum / self.count).tolist()

    @property
    def stds(self) -> list[float]:
        """Return the standard deviation of each channel."""
        variance = self.squares / self.count - (self.sum / self.count).square()
        return variance.clamp_min(0).sqrt().tolist()

    def problem(self) -> str:
        """Return a sentence if the channels are scaled unlike normalized latents, else ``""``."""
        stds, (low, high) = self.stds, _CHANNEL
        bad = [f"{i}: {std:.3g}" for i, std in enumerate(stds) if not low <= std <= high]
        geometric = math.exp(sum(math.log(max(std, 1e-12)) for std in stds) / len(stds))
        if bad:
            listed = ", ".join(bad[:4])
            found = f"channels with a standard deviation outside {low:g} to {high:g} ({listed})"
        elif not _ALL[0] <= geometric <= _ALL[1]:
            found = f"channels with standard deviations of {min(stds):.3g} to {max(stds):.3g}"
        else:
            return ""
        return (
            f"latents have {found}, expected about 1, as normalized latents have. Most likely "
            "(z - mean) / std with the VAE's latents_mean and latents_std was left out"
        )
