"""Reports of a plan: the table, the figure and the trainer's YAML."""

import dataclasses
import io
import itertools

import pytest
from plans import small_workload

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning import planner
from prfl_fast.planning import search as plan_search
from prfl_fast.planning.report import apply_to_yaml, frontier, table, timeline_figure
from prfl_fast.planning.search import Candidate
from prfl_fast.utils.units import GIB


def test_table_says_what_there_is_to_know(real):
    text = table(real)
    assert max(map(len, text.splitlines())) <= 100
    for name, value in real.categories.items():
        if value:
            assert f"  {name:<12}{value / GIB:>8.2f} GiB" in text
    for phase in real.seconds:
        assert f"\n  {phase} " in text
    assert text.count("chosen") == 1 and "19 forwards expected" in text
    for candidate in frontier(real.candidates):
        assert candidate.reason in text
    assert "fp8 with adamw, nf4 with adamw" in text


def test_the_table_names_the_steps_and_the_rewards(real):
    changes = {"guidance": "separate", "reward_blocks": (2, (1, 2))}
    work = dataclasses.replace(real.workload, gradient_plan=GradientPlan.draft(3), **changes)
    text = table(dataclasses.replace(real, workload=work))
    assert max(map(len, text.splitlines())) <= 100
    for words in ("gradient through 3 steps", "guidance separate", "3 reward models of 2, 1 and"):
        assert words in " ".join(text.split())


def test_frontier():
    def candidate(seconds, peak, reason=""):
        return Candidate(MemoryConfig(), MemoryConfig(), peak, 0, seconds, reason)

    a, b, c, d = (candidate(*v) for v in ((1, 9), (2, 9), (3, 5, "chosen"), (4, 7)))
    assert frontier([a, b, c, d]) == [a, c]


def test_timeline_figure(real):
    pytest.importorskip("matplotlib")
    figure = timeline_figure(real)
    (axes,) = figure.axes
    image = io.BytesIO()
    figure.savefig(image, format="png")
    assert image.getvalue()[:4] == b"\x89PNG"
    shown = [name for name, value in real.categories.items() if value]
    assert {t.get_text() for t in axes.get_legend().get_texts()} >= set(shown)
    names = {t.get_text().split("\n")[0] for t in axes.texts}
    assert names >= {"rollout", "forward", "reward", "backward", "optimizer"}
    top = max(path.vertices[:, 1].max() for c in axes.collections for path in c.get_paths())
    assert top == pytest.approx(real.peak / GIB)
    assert any(line.get_ydata()[0] == pytest.approx(real.budget / GIB) for line in axes.lines)
    # Names of neighboring phases do not run into each other.
    figure.draw_without_rendering()
    labels = [t for t in axes.texts if "\n" in t.get_text() or t.get_text() == "optimizer"]
    boxes = sorted((t.get_window_extent() for t in labels), key=lambda box: box.x0)
    assert all(a.x1 <= b.x0 + 1 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("text", ["", "model: a\ndata: b\nout: c\nrun: {steps: 1}\nreward: d"])
def test_apply_to_a_new_or_short_file(real, tmp_path, text):
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "train.yaml"
    if text:
        path.write_text(text)
    apply_to_yaml(real, path)
    found = yaml.safe_load(path.read_text())
    new = tmp_path / "new.yaml"
    apply_to_yaml(real, new)
    keys = yaml.safe_load(new.read_text())
    assert keys.keys() == {"memory", "reward_memory", "hardware", "lora", "prfl", "run"}
    assert keys["memory"] == dataclasses.asdict(real.memory)
    assert keys["reward_memory"].items() <= dataclasses.asdict(real.reward_memory).items()
    # What the run is, the file says if it can.
    assert found == {**keys, **(yaml.safe_load(text) or {})}


def test_apply_refuses(real, calls, tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="train.yaml is 'list', expected keys"):
        apply_to_yaml(real, path)
    path.write_text("a: [\n")
    with pytest.raises(ValueError, match="not YAML"):
        apply_to_yaml(real, path)
    nothing = planner.plan_memory(small_workload(), budget=plan_search.CONTEXT + 1)
    with pytest.raises(ValueError, match="no plan fits"):
        apply_to_yaml(nothing, tmp_path / "new.yaml")
    assert not (tmp_path / "new.yaml").exists()
