"""Suite plan: the table of a plan, and the command on a model's folder."""

import json

import pytest

pytest.importorskip("diffusers")

from plans import SIZE, SMALL  # noqa: E402
from suites import plan  # noqa: E402


@pytest.mark.slow
def test_the_table_has_the_plan_of_the_command(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **SMALL})
    )
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZE.items()]
    seconds, found = plan.planned(str(tmp_path), "rtx4090", *options)
    assert seconds > 1 and found["feasible"] and found["reward_memory"]["weight_dtype"] == "bf16"
    result = plan.result({"small": [3.0, 1.0, 2.5]}, {"small": found})
    label, *cells = result.tables[0].rows[0]
    assert cells[:4] == ["2.50 s", "3.00 s", "bf16 none", "bf16 full"]
    used = (found["peak"] + found["reserve"]) / (1 << 30)
    assert cells[4] == f"{used:.1f} of 23.5 GiB" and result.problems == []
    (record,) = result.cases
    assert record["seconds"] == [3.0, 1.0, 2.5] and record["peak"] == found["peak"]


@pytest.mark.slow
def test_an_error_of_the_command_ends_the_suite():
    with pytest.raises(RuntimeError, match="--frames is 2"):
        plan.planned("wan2.1-t2v-1.3b", "rtx4090", "--frames", "2")


def test_a_plan_that_does_not_fit_is_a_problem():
    policy = {"weight_dtype": "nf4", "activation_checkpointing": "full"}
    sizes = {"peak": 3 << 30, "reserve": 1 << 30, "budget": 2 << 30, "host": 0}
    found = {"memory": policy, "reward_memory": policy, "feasible": False, **sizes}
    assert plan.result({"a": [1.0]}, {"a": found}).problems == ["a: nothing fits"]
