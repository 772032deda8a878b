"""``prfl-fast compare`` on a tiny random pipeline, and its page."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from commands import one_line
from tiny_pipeline import make_pipeline

from prfl_fast.cli import compare as comparing
from prfl_fast.cli import main as cli
from prfl_fast.cli import page
from prfl_fast.models.loading import load_transformer
from prfl_fast.models.lora_files import write_lora
from prfl_fast.models.lora_layer import LoraLayer
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.sampling.compare import win_rate
from prfl_fast.sampling.generate import noise_of
from prfl_fast.utils.io import load_tensors

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


@pytest.fixture(scope="module")
def comparison(root, tmp_path_factory):
    """Compare the base with itself and an adapter by two rewards; return a function and folder."""
    out = tmp_path_factory.mktemp("compared") / "out"
    words = [f"same={root / 'model'}", root / "lora.safetensors", "--reward", root / "reward"]
    words += ["--reward", f"again={root / 'reward'}", "--timesteps", "200,800", "--samples", 2]

    def run():
        assert compare(root, out, *words) == 0

    run()
    return run, out


@pytest.mark.slow
def test_generators_start_from_the_same_noise(comparison):
    _, out = comparison
    for video in json.loads((out / "base" / "samples.json").read_text())["videos"]:
        name = video["file"].replace(".mp4", ".safetensors")
        base, same, lora = (
            load_tensors(out / arm / "latents" / name)["latents"]
            for arm in ("base", "same", "lora")
        )
        assert torch.equal(base, same) and not torch.allclose(base, lora, atol=1e-2)
        drift = out / "base" / "drift" / name
        if drift.exists():
            noise = noise_of(video["seed"], base.shape)
            assert torch.equal(load_tensors(drift)["x0"][0], noise)
    records = [(out / arm / "samples.json").read_text() for arm in ("same", "lora")]
    seeds = [[v["seed"] for v in json.loads(text)["videos"]] for text in records]
    assert seeds == [[0, 1, 2, 3]] * 2


@pytest.mark.slow
def test_a_comparison_of_the_same_weights_shows_no_difference(comparison, capsys):
    run, out = comparison
    found, page = (
        json.loads((out / "comparison.json").read_text()),
        (out / "index.html").read_text(),
    )
    assert list(found["arms"]) == ["base", "same", "lora"]
    scores = found["scores"]["reward"]
    assert scores["same"] == scores["base"] != scores["lora"]
    assert found["scores"]["again"] == scores
    ties = next(w for w in found["wins"] if w["arm"] == "same")
    assert (ties["ties"], ties["rate"]) == (4, 0.5) and ties["low"] < 0.5 < ties["high"]
    means = {arm: [sum(video) / 2 for video in videos] for arm, videos in scores.items()}
    lora = next(w for w in found["wins"] if (w["arm"], w["against"]) == ("lora", "base"))
    expected = win_rate(means["lora"], means["base"])
    assert all(lora[name] == value for name, value in expected._asdict().items())
    assert set(found["drift"]["same"].values()) == {0.0}
    assert min(found["drift"]["lora"].values()) > 0
    assert page.count("<video") == 12 and page.count("<svg") == 3
    assert "A &lt;b&gt;disc&lt;/b&gt;." in page and "<b>disc" not in page
    again = {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    run()
    text = capsys.readouterr().out
    assert "cost: 4 videos of 6 forwards of the generator, for each of 3 generators" in text
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")} == again
    assert (out / "index.html").read_text() == page
    assert cli.main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "videos of lora: 4 (4 sampled, 4 decoded)" in shown
    tables = [line for line in text.splitlines() if line.startswith(" ") and "lora" in line]
    assert len(tables) == 5 and set(tables) <= set(shown.splitlines())
    (out / "comparison.json").rename(out / "moved.json")
    assert cli.main(["inspect", str(out)]) == 0
    assert "no figures yet" in capsys.readouterr().out
    (out / "moved.json").rename(out / "comparison.json")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_a_browser_and_requests_nothing(comparison, width):
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    _, out = comparison
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        requests, problems = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto((out / "index.html").as_uri())
        page.wait_for_function(
            "[...document.images].every(i => i.complete) && "
            "[...document.querySelectorAll('video')].every(v => v.readyState > 0 || v.error)"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
        tops = page.evaluate(
            "[...document.querySelectorAll('figure')].map(f => f.getBoundingClientRect().top)"
        )
        browser.close()
    outside = [url for url in requests if not url.startswith("data:")]
    assert outside == [(out / "index.html").as_uri()] and problems == []
    # Three videos side by side, or two on a telephone.
    assert len(tops) == 12 and len(set(tops[:3])) == (1 if width == 1280 else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base=MODEL"], "name of a generator is 'base', expected another one"),
        (["MODEL", "MODEL"], "Write NAME="),
        (["nowhere"], "weights is 'nowhere', expected a file or folder that exists"),
        (["MODEL", "--reward", "MODEL"], "model"),
        (["MODEL", "--timesteps", "1,1001"], "expected whole numbers in 0 … 1000"),
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


@pytest.mark.slow
def test_the_commands_of_the_guide_run(root, tmp_path, monkeypatch):
    """Run the lines of docs/sampling.md on the tiny pipeline, at its size."""
    page = (Path(__file__).parents[2] / "docs" / "sampling.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("A disc.\nA ring.\n")
    (tmp_path / "Wan2.1-T2V-14B").symlink_to(root / "model")
    (tmp_path / "runs" / "reward").mkdir(parents=True)
    (tmp_path / "runs" / "reward" / "reward").symlink_to(root / "reward")
    for name in ("prfl", "sft"):
        (tmp_path / "runs" / name).mkdir()
        file = tmp_path / "runs" / name / "pytorch_lora_weights.safetensors"
        file.symlink_to(root / "lora.safetensors")
    lines = [line for body in re.findall(r"^```bash\n(.*?)^```$", page, re.S | re.M)
             for line in body.splitlines()]  # fmt: skip
    assert len(lines) == 3
    for line in lines:
        name, *words = shlex.split(line)
        assert name == "prfl-fast" and cli.main([*words, *SMALL]) == 0, line
    assert (tmp_path / "comparison" / "index.html").is_file()
    assert (tmp_path / "best" / "sheet.png").is_file()


@pytest.mark.slow
def test_names_are_no_formulas_and_all_are_in_the_legend():
    lines = {name: ([0, 1], [0.0, 1.0], None) for name in ("_new", "$\\oops$", "a$b$")}
    first = page._chart("reward $\\oops$", "step", lines, list(lines))
    names = re.findall(r"<!--(.*?)-->", first)
    assert [name.strip() for name in names[-3:]] == list(lines)


@pytest.mark.slow
def test_files_of_the_comparison_name_no_generator(root, tmp_path, capsys):
    assert compare(root, tmp_path / "out", f"index.html={root / 'model'}") == 2
    assert "name of a generator is 'index.html'" in one_line(capsys, "compare")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_scores_that_are_not_numbers_are_refused(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparing, "rewards_by_timestep", lambda *_: [float("nan")])
    words = [f"new={root / 'model'}", "--reward", root / "reward"]
    assert compare(root, tmp_path / "out", *words) == 2
    assert "is [nan], expected finite numbers" in capsys.readouterr().err
