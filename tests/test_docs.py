"""README and docs: every snippet and command runs, and generated parts agree with their source."""

import re
import runpy
import shlex
import shutil
import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import readme_figure
import results_tables
import tested_versions
import torch
from official_wan import tiny_official
from torch.distributed.run import get_args_parser
from wan import tiny_wan

pytest.importorskip("pydantic")

import prfl_fast
from prfl_fast import sampling
from prfl_fast.training import add_lora

pytest.importorskip("diffusers")
yaml = pytest.importorskip("yaml")

from prfl_fast.cli.config import TrainFile
from prfl_fast.cli.main import _parser, main
from prfl_fast.cli.yaml_config import parse_config
from prfl_fast.planning import search as plan_search
from prfl_fast.planning.presets import MODELS

ROOT = Path(__file__).resolve().parents[1]
GUIDES = (
    *("quickstart", "data", "sampling", "methods", "rollouts", "memory", "models"),
    *("families", "trainers", "multi-gpu", "kernels", "configuration"),
)
PYTHON = ("methods", "rollouts", "memory", "models", "families", "kernels")  # run in the same names
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in GUIDES)]


@pytest.fixture(autouse=True, scope="module")
def short_searches():
    """Let the planner look at one policy of eight blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_search, "MODES", (("full", None),))
        for config in MODELS.values():
            patch.setitem(config, "num_layers", 8)
        yield


def blocks(page, *languages):
    """Return the fenced blocks of a page as (language, text), in order."""
    text = (ROOT / page).read_text()
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M)
    return [(language, body) for language, body in found if language in languages]


def commands(body):
    """Return the command lines of a block without comments, as lists of words."""
    lines = [shlex.split(line, comments=True) for line in body.splitlines()]
    groups = (groupby(words, lambda word: word == "&&") for words in lines)
    return [list(command) for group in groups for is_and, command in group if not is_and]


def names():
    """Return what the Python snippets take as given: tiny models and tensors."""
    torch.manual_seed(0)
    small = {"layers": 1, "heads": 1, "head_dim": 32}  # widths that 8-bit operations take
    transformer = tiny_wan(**small)
    rewards = (
        prfl_fast.LatentRewardModel.from_backbone(tiny_wan(**small), 1, num_heads=2).freeze()
        for _ in range(4)
    )
    found = dict(zip(("reward", "motion", "first", "second"), rewards, strict=True))
    text = torch.randn(1, 3, 20)
    return found | {
        "prfl_fast": prfl_fast,
        "transformer": transformer,
        "transformer_2": tiny_wan(**small, seed=1),
        "noise": torch.randn(1, 16, 2, 4, 4),
        "latents": torch.randn(1, 16, 2, 4, 4),
        "conditions": {"encoder_hidden_states": text},
        "text": text,
        "negative": torch.zeros(1, 3, 20),
        "timestep": torch.tensor([500.0]),
        "scale": 0.5,
        "optimizer": torch.optim.SGD(transformer.parameters(), lr=1e-3),
    }


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{name}.md" for name in PYTHON)])
def test_python_snippets_run(page, monkeypatch):
    snippets = blocks(page, "python")
    assert snippets
    given = names()
    # README builds its reward from the first 8 blocks of a real model.
    real = prfl_fast.LatentRewardModel.from_backbone
    monkeypatch.setattr(
        prfl_fast.LatentRewardModel,
        "from_backbone",
        lambda model, num_blocks: real(model, 1, num_heads=2),
    )
    if page in ("docs/methods.md", "docs/rollouts.md"):
        add_lora(given["transformer"], 2)
    for _, body in snippets:
        exec(compile(body, page, "exec"), given)
    if "out" in given:
        assert given["out"].finite


def test_the_lines_for_trainers_patch_each_model():
    """Run each section's lines in the names of its script, on a stand-in of its model."""
    models = {name: tiny_official(name) for name in ("hyprfl", "videox", "diffsynth", "musubi")}
    pipe = SimpleNamespace(dit=models["diffsynth"])
    hyprfl = {"transformer": models["hyprfl"], "lrm_transformer": tiny_official("hyprfl")}
    scripts = {
        "diffusers": {},
        "HY-Video-PRFL": hyprfl,
        "VideoX-Fun": {"transformer3d": models["videox"]},
        "DiffSynth-Studio": {"self": SimpleNamespace(pipe=pipe)},
        "musubi-tuner": {},
    }
    for section in (ROOT / "docs" / "trainers.md").read_text().split("\n## ")[1:]:
        own = next((own for name, own in scripts.items() if section.startswith(name)), {})
        given = names() | own
        for body in re.findall(r"^```python\n(.*?)^```$", section, re.S | re.M):
            exec(compile(body, "docs/trainers.md", "exec"), given)
        if "on_transformer_loaded" in given:
            given["on_transformer_loaded"](None, None, None, models["musubi"])
        if "out" in given:
            assert given["out"].finite and prfl_fast.is_patched(given["transformer"])
    assert all(map(prfl_fast.is_patched, (*models.values(), hyprfl["lrm_transformer"])))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Run every block of the quickstart in a new folder and return the folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for language, body in blocks("docs/quickstart.md", "yaml", "bash"):
            if language == "yaml":
                name = re.match(r"# (\S+\.yaml)\n", body)[1]
                Path(name).write_text(body)
            else:
                for words in commands(body):
                    run(words, patch)
    return folder


def run(words, patch):
    """Run a command of the command line, or a script of the repository, in this process."""
    if words[0] == "prfl-fast":
        assert main(words[1:]) == 0, words
    else:
        assert words[0] == "python"
        with patch.context() as own:
            own.setattr(sys, "argv", words[1:])
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")


def test_the_quickstart_leads_from_clips_to_a_compared_video(quickstart):
    runs = quickstart / "runs"
    assert (runs / "reward" / "reward").is_dir()
    lines = (runs / "scores.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["id", "disc", "square", "ring"]
    assert list((runs / "prfl").rglob("*lora*.safetensors"))
    assert list((runs / "samples").glob("*.mp4"))
    assert (runs / "comparison" / "index.html").is_file()


def test_the_quickstart_has_eight_commands():
    text = (ROOT / "docs" / "quickstart.md").read_text().partition("## More commands")[0]
    bodies = re.findall(r"^```bash\n(.*?)^```$", text, re.S | re.M)
    assert sum(len(commands(body)) for body in bodies) == 8


@pytest.mark.parametrize("page", ["README.md", "docs/memory.md"])
def test_commands_of_the_command_line_run(page, quickstart, tmp_path, monkeypatch):
    """Run the ``prfl-fast`` lines of a page on the quickstart's files and configurations."""
    folder = shutil.copytree(quickstart, tmp_path / "page")
    shutil.rmtree(folder / "runs" / "prfl")  # a planned run in bf16 cannot resume one in fp32
    (folder / "Wan2.1-T2V-14B").symlink_to("world/pipeline")
    shutil.copytree(folder / "world" / "clips", folder, dirs_exist_ok=True)
    (folder / "prompts.txt").write_text("A disc glides.\n")
    path = folder / "train.yaml"
    path.write_text(re.sub(r"^eval: .*\n", "", path.read_text(), flags=re.M))  # it ran already
    monkeypatch.chdir(folder)
    for _, body in blocks(page, "bash"):
        for words in commands(body):
            if words[0] != "prfl-fast":
                continue
            if words[1] == "init":  # the quickstart's file of that name is filled in already
                words = [*words[:-1], f"new-{words[-1]}"]
            if words[1] in ("encode", "compare"):  # small videos
                words += ["--size", "32x48", "--frames", "9"]
            if words[1] == "compare":
                words += ["--num-inference-steps", "2"]
            assert main(words[1:]) == 0, words


def test_plans_of_several_gpus_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").touch()
    planned = [
        words
        for _, body in blocks("docs/multi-gpu.md", "bash")
        for words in commands(body)
        if words[0] == "prfl-fast"
    ]
    assert planned and all(_parser("plan").parse_args(words[1:]).gpus == 8 for words in planned)


def test_other_commands_exist():
    """Check make targets, scripts and markers that pages name, without running them."""
    makefile = (ROOT / "Makefile").read_text()
    targets = makefile.partition(".PHONY: ")[2].partition("\n")[0].split()
    seen = set()
    for page in PAGES:
        for _, body in blocks(page, "bash"):
            for words in commands(body):
                name = words[0].removeprefix(".venv/bin/")
                seen.add(name)
                if name == "make":
                    assert words[1] in targets, words
                elif name == "pytest" and words[1] == "-m":
                    assert f'"{words[2]}:' in (ROOT / "pyproject.toml").read_text(), words
                elif name == "torchrun":  # tests/cli/test_ranks.py runs these commands
                    given = get_args_parser().parse_args(words[1:])
                    assert given.module and given.training_script == "prfl_fast.cli", words
                    inner = given.training_script_args
                    assert _parser(inner[0]).parse_args(inner), words
                elif name in ("pytest", "bash", "python"):
                    assert (ROOT / words[1]).exists(), words
                else:
                    assert name in ("prfl-fast", "pip", "git", "cd"), words
    assert {"make", "pip", "prfl-fast", "pytest", "bash"} <= seen


@pytest.mark.parametrize("page", ["docs/memory.md", "docs/models.md", "docs/multi-gpu.md"])
def test_yaml_snippets_are_valid_keys(page):
    """Read a page's YAML as part of a training configuration."""
    for _, body in blocks(page, "yaml"):
        whole = {"model": "m", "data": "d", "reward": "r", "out": "o", "run": {"steps": 1}}
        parse_config(TrainFile, whole | yaml.safe_load(body))


def test_the_table_of_methods_lists_every_constructor():
    text = (ROOT / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| `(\w+)\(", text, re.M)
    made = [
        name
        for name, value in vars(prfl_fast.GradientPlan).items()
        if isinstance(value, classmethod) and not name.startswith("_")
    ]
    assert sorted(rows) == sorted(made)
    functions = re.findall(r"^\| `(\w+)` \|", text.partition("## Sampling")[2], re.M)
    assert sorted(functions) == sorted(sampling.__all__)


def test_pages_are_short():
    lengths = {page: len((ROOT / page).read_text().splitlines()) for page in PAGES}
    assert lengths.pop("README.md") <= 250
    assert lengths.pop("docs/configuration.md") <= 280  # generated
    assert max(lengths.values()) <= 200, lengths


def anchors(path):
    """Return the names under which GitHub links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page in [*PAGES, "bench/RESULTS.md", "CHANGELOG.md"]:
        path = ROOT / page
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([\w-]*)\)", path.read_text()):
            if not target.startswith("http"):
                linked = path.parent / target if target else path
                assert linked.exists(), f"{page}: {target}"
                assert not anchor or anchor in anchors(linked), f"{page}: {target}#{anchor}"


def test_generated_parts_agree_with_the_records(capsys):
    assert results_tables.main(["--check"]) == 0, capsys.readouterr().err
    assert readme_figure.main(["--check"]) == 0, capsys.readouterr().out
    assert tested_versions.table() in tested_versions.PAGE.read_text()
