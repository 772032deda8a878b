"""Suite scale: counts of a rank's part of a step, on a tiny model."""

import pytest
from plans import SMALL

pytest.importorskip("diffusers")

from suites import scale  # noqa: E402

TINY = {**SMALL, "num_attention_heads": 8, "attention_head_dim": 16, "num_layers": 8}


@pytest.mark.slow
def test_tables_and_checks(monkeypatch):
    monkeypatch.setattr(scale, "MODEL", TINY)
    monkeypatch.setattr(scale, "RANKS", (1, 8, 16))
    found = {label: scale.count(case) for label, case in scale.cases().items()}
    result = scale.result(found)
    assert result.problems == []
    theirs, ours, kept, *_ = found.values()
    # float32 gathers and gradients are twice the bytes, of the weights that are bfloat16 in ours;
    # features are far more than merged pools.
    assert 1.2 < theirs["gathered_bytes"] / ours["gathered_bytes"] < 2
    assert 1.2 < theirs["reduced_bytes"] / ours["reduced_bytes"] < 2.1
    assert theirs["pooling_bytes"] > 50 * ours["pooling_bytes"] > 0
    assert theirs["exchanged_bytes"] == ours["exchanged_bytes"]
    assert (
        kept["gathered_bytes"] < ours["gathered_bytes"] and kept["peak_bytes"] >= ours["peak_bytes"]
    )
    layouts, scaling = result.tables
    assert len(layouts.rows) == 5 and len(scaling.rows) == 6
    assert scaling.rows[0][4:7] == ["0 B", "0 B", "0 B"] and scaling.rows[0][-1] == "100%"
    assert scaling.rows[1][-1].endswith("%") and scaling.rows[2][-1] == "–"  # of two machines
    found["full, 8"]["peak_bytes"] = 1 << 40
    assert "more GPUs needs more memory" in scale.result(found).problems[0]
