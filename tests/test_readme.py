"""The README: its tables are those of the records, its examples run."""

import re
import sys
from pathlib import Path

import pytest
import torch
from wan import tiny_wan

import prfl_fast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import readme_tables  # noqa: E402


def test_tables_are_what_the_records_say(capsys):
    assert readme_tables.main(["--check"]) == 0, capsys.readouterr().err


def section(title):
    text = (ROOT / "README.md").read_text()
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("title", ["Gradient plans", "Rollouts"])
def test_examples_run(title):
    small = {"layers": 1, "heads": 1, "head_dim": 32}  # widths that 8-bit operations take
    transformer = prfl_fast.patch(tiny_wan(**small))
    prfl_fast.trainer.add_lora(transformer, 2)
    torch.manual_seed(0)
    reward, motion, first, second = (
        prfl_fast.LatentRewardModel.from_backbone(tiny_wan(**small), 1, num_heads=2).freeze()
        for _ in range(4)
    )
    names = {"reward": reward, "motion": motion, "first": first, "second": second}
    names |= {"prfl_fast": prfl_fast, "transformer": transformer}
    names |= {"noise": torch.randn(1, 16, 2, 4, 4), "plan": prfl_fast.GradientPlan.prfl(points=2)}
    names |= {"conditions": {"encoder_hidden_states": torch.randn(1, 3, 20)}}
    names |= {"negative": torch.zeros(1, 3, 20)}
    blocks = re.findall(r"```python\n(.*?)```", section(title), re.S)
    assert blocks
    for block in blocks:
        exec(block, names)
        out = names["step"](names["noise"], names["conditions"])
        assert out.finite and (out.drift is not None) == (title == "Rollouts")
    if title == "Gradient plans":
        assert set(names["out"].by_reward) == {"motion", "text"}


def test_the_table_of_plans_lists_every_constructor():
    rows = re.findall(r"^\| `(\w+)\(", section("Gradient plans"), re.M)
    made = [
        name
        for name, value in vars(prfl_fast.GradientPlan).items()
        if isinstance(value, classmethod) and not name.startswith("_")
    ]
    assert sorted(rows) == sorted(made)
    functions = re.findall(r"^\| `(\w+)` \|", section("Gradient plans"), re.M)
    public = [n for n in prfl_fast.sampling.__all__ if n[0].islower()]
    assert sorted(functions) == sorted(public)
