"""Values of a whole dataset."""

import pytest
import torch
from runs import samples

from prfl_fast.data.manifest import write_dataset
from prfl_fast.data.values import check_values

# Standard deviations of the channels of Wan 2.1's VAE.
WAN = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
WAN += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


def dataset(folder, change, dtype=torch.float32):
    made = samples(4)
    for i, item in enumerate(made):
        made[i] = item._replace(latents=change(item.latents.to(dtype), i))
    return write_dataset(folder, made)


def at(index, value):
    def change(latents, i):
        if i == index:
            latents[0, 0, 0, 0] = value
        return latents

    return change


def test_normalized_latents_are_right(tmp_path):
    check_values(dataset(tmp_path, lambda latents, i: latents))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(torch.nan, torch.float32), (torch.inf, torch.bfloat16), (1e300, torch.float64)],
)
def test_bad_values_are_named_by_line(tmp_path, value, dtype):
    with pytest.raises(ValueError, match=r"manifest.jsonl:3: latents.* 1 NaN or infinite values"):
        check_values(dataset(tmp_path, at(2, value), dtype))


@pytest.mark.parametrize(
    "factor",
    [torch.tensor(WAN), torch.tensor(10.0), torch.tensor([0.01] + 15 * [1.0])],
    ids=["unnormalized", "scaled", "flat channel"],
)
def test_latents_that_are_not_normalized(tmp_path, factor):
    scaled = dataset(tmp_path, lambda latents, i: latents * factor.view(-1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"expected about 1.*\(z - mean\) / std"):
        check_values(scaled)
