"""The table of conditions, against the model adapters, and batches of conditions."""

import pytest
import tiny_families
import torch

from prfl_fast.models.conditions import MASKS, RANKS, stack_conditions, trim_texts
from prfl_fast.models.registry import find_adapter


@pytest.mark.parametrize("case", tiny_families.CASES)
def test_ranks_are_those_of_the_adapters(case):
    model = tiny_families.tiny(case)
    expected = find_adapter(model).expected_conditions(model)
    assert {name: len(shape) for name, (_, shape) in expected.items()} == {
        name: RANKS[name] for name in expected
    }


def test_texts_are_padded_together_with_their_masks():
    samples = [
        {"encoder_hidden_states": torch.ones(n, 4), MASKS["encoder_hidden_states"]: torch.ones(n)}
        for n in (2, 3)
    ]
    for rows, wanted in ((None, 3), ({"encoder_hidden_states": 5}, 5)):
        found = stack_conditions(samples, rows)
        text = found["encoder_hidden_states"]
        assert text.shape == (2, wanted, 4)
        assert text.sum() == 20 and found["encoder_attention_mask"].sum() == 5
    scalars = stack_conditions([{"guidance": torch.tensor(1)}, {"guidance": torch.tensor(2)}])
    assert torch.equal(scalars["guidance"], torch.tensor([1.0, 2.0]))


def test_masked_tokens_at_the_end_are_left_out():
    mask = torch.tensor([1, 0, 1, 0, 0])
    given = {"encoder_hidden_states": torch.randn(5, 4), "encoder_attention_mask": mask}
    found = trim_texts({**given, "image_embeds": torch.zeros(7, 2)})
    assert torch.equal(found["encoder_hidden_states"], given["encoder_hidden_states"][:3])
    assert found["encoder_attention_mask"].tolist() == [1, 0, 1]
    assert found["image_embeds"].shape == (1, 2)
    assert (
        len(trim_texts({**given, "encoder_attention_mask": 0 * mask})["encoder_hidden_states"]) == 1
    )
