"""``prfl-fast compare`` on a tiny random pipeline, and its page."""

import json
import re

import pytest
import torch
from commands import one_line
from tiny_pipeline import make_pipeline

from prfl_fast.cli import main as cli
from prfl_fast.models.loading import load_transformer
from prfl_fast.models.lora_files import LoraLayer, write_lora
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.sampling.compare import win_rate

pytest.importorskip("pydantic")
pytest.importorskip("matplotlib")
SMALL = ["--size", "32x48", "--frames", "5", "--num-inference-steps", "3", "--device", "cpu"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write a pipeline, a reward model and an adapter; read only."""
    root = tmp_path_factory.mktemp("comparison")
    make_pipeline("t2v").save_pretrained(root / "model")
    transformer = load_transformer(root / "model")
    LatentRewardModel.from_backbone(transformer, num_blocks=1, num_heads=2).save(root / "reward")
    layer = LoraLayer(torch.randn(2, 48), torch.randn(48, 2), 2.0)
    write_lora({"blocks.0.attn1.to_q": layer}, root / "lora.safetensors", "kohya")
    return root


def compare(root, out, *words):
    model, prompts = str(root / "model"), ["--prompt", "A <b>disc</b>.", "--prompt", "A ring."]
    fixed = ["--out", str(out), "--model", model, *prompts, *SMALL]
    return cli.main(["compare", *map(str, words), *fixed])


@pytest.mark.slow
def test_a_comparison_of_the_same_weights_shows_no_difference(root, tmp_path, capsys):
    out = tmp_path / "out"
    words = [f"same={root / 'model'}", root / "lora.safetensors", "--reward", root / "reward"]
    assert compare(root, out, *words, "--timesteps", "200,800", "--samples", 2) == 0
    text = capsys.readouterr().out
    assert "cost: 4 videos of 6 forwards of the generator and of each of 2 others" in text
    found = json.loads((out / "comparison.json").read_text())
    assert list(found["arms"]) == ["base", "same", "lora"]
    scores = found["scores"]["reward"]
    assert scores["same"] == scores["base"] != scores["lora"]
    ties = next(w for w in found["wins"] if w["arm"] == "same")
    assert (ties["ties"], ties["rate"]) == (4, 0.5) and ties["low"] < 0.5 < ties["high"]
    means = {arm: [sum(video) / 2 for video in videos] for arm, videos in scores.items()}
    lora = next(w for w in found["wins"] if (w["arm"], w["against"]) == ("lora", "base"))
    expected = win_rate(means["lora"], means["base"])
    assert all(lora[name] == value for name, value in expected._asdict().items())
    assert set(found["drift"]["same"].values()) == {0.0}
    assert min(found["drift"]["lora"].values()) > 0
    page = (out / "index.html").read_text()
    assert page.count("<video") == 12 and page.count("<svg") == 2
    assert "A &lt;b&gt;disc&lt;/b&gt;." in page and "<b>disc" not in page
    # Everything that a browser would fetch is inside the page.
    fetched = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert fetched and all(link.startswith(("data:", "#")) for link in fetched)
    again = {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    assert compare(root, out, *words, "--timesteps", "200,800", "--samples", 2) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")} == again
    assert (out / "index.html").read_text() == page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base=MODEL"], "name of a generator is 'base', expected another one"),
        (["MODEL", "MODEL"], "Write NAME="),
        (["nowhere"], "weights is 'nowhere', expected a file or folder that exists"),
        (["MODEL", "--reward", "MODEL"], "model"),
        (["MODEL", "--timesteps", "1,x"], "expected whole numbers in 0 … 1000"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(root, tmp_path, capsys, words, message):
    words = [word.replace("MODEL", str(root / "model")) for word in words]
    out = tmp_path / "out"
    if "--timesteps" in words:
        with pytest.raises(SystemExit, match="2"):
            compare(root, out, *words)
        assert message in capsys.readouterr().err
    else:
        assert compare(root, out, *words) == 2
        assert message in one_line(capsys, "compare")
    assert not out.exists()
