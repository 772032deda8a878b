"""``prfl-fast plan``: options, the trainer's YAML it reads and writes, and what it refuses."""

import contextlib
import dataclasses
import io
import json
import shutil
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from commands import one_line
from runs import config, write_config

pytest.importorskip("pydantic")

from prfl_fast.cli import main as cli
from prfl_fast.cli import plan_options
from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.workload import sizes_of
from prfl_fast.cli.yaml_config import load_config
from prfl_fast.data.manifest import Sample, write_dataset
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.parallel.mesh import ParallelConfig
from prfl_fast.planning import gpu_specs, planner, report
from prfl_fast.planning import search as plan_search
from prfl_fast.planning.presets import MODELS
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.choices import GPUS, PLANNED_MODELS

yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def first(root, tmp_path_factory):
    """Plan for the tiny model with one policy; return the plan, the output and the picture."""
    folder, found = tmp_path_factory.mktemp("first"), []
    options = (
        "--frames 5 --height 32 --width 32 --reward-blocks 1 --weight-dtype bf16 --budget 8GiB"
    )
    with pytest.MonkeyPatch.context() as patch:
        plan = planner.plan_memory
        record = lambda *a, **b: found.append(plan(*a, **b)) or found[0]  # noqa: E731
        patch.setattr(planner, "plan_memory", record)
        patch.setattr(plan_search, "MODES", (("full", None),))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            arguments = ["--model", root / "model", "--plot", folder / "a.png", *options.split()]
            assert run(*arguments) == 0
    return found[0], out.getvalue(), (folder / "a.png").read_bytes()


@pytest.fixture(scope="module")
def searched(first):
    return first[0]


@pytest.fixture
def calls(searched, monkeypatch):
    """Record the planner's calls, which return that plan for the workload of the call."""
    made = []

    def plan(workload, **options):
        made.append(SimpleNamespace(workload=workload, **options))
        asked = dataclasses.replace(workload, model=MODELS["wan2.1-t2v-14b"])  # takes any size
        return dataclasses.replace(searched, workload=asked)

    monkeypatch.setattr(planner, "plan_memory", plan)
    return made


def run(*arguments):
    return cli.main(["plan", *map(str, arguments)])


FILE = """\
# my run
model: {root}/model  # weights
data: {root}/data
reward: {root}/reward
out: runs/a
run: {{steps: 10, gradient_accumulation_steps: 2}}
# the sampler
prfl:
  points: 3   # three
  num_inference_steps: 9
memory:
  offload: cpu
  # an old remark

# on which machine
hardware: {{patch: true}}
lora: {{lora_rank: 4, target_modules: [to_q]}}
optimizer: {{learning_rate: 1.0e-5}}
# the end
"""


@pytest.fixture
def file(root, tmp_path):
    return write_config(tmp_path / "train.yaml", FILE.format(root=root))


def test_a_search_prints_the_ledger_and_draws_the_timeline(first):
    plan, out, picture = first
    assert "PRFL step: 1 block, LoRA rank 16, 5 x 32 x 32, 8 tokens, batch 1" in out
    assert "fits: " in out and "Ledger at the peak" in out and "chosen" in out
    assert picture.startswith(b"\x89PNG")
    assert plan.feasible and plan.peak == sum(plan.categories.values())


def test_without_options_it_plans_the_14b_model_at_720p(calls, capsys):
    assert run() == 0
    (asked,) = calls
    assert asked.workload == Workload("wan2.1-t2v-14b")
    assert asked.weight_dtype == "auto" and asked.budget is None
    if not torch.cuda.is_available():
        assert asked.gpu == "h200" and asked.host_budget == "102GiB"


def test_the_help_lists_the_presets_and_the_defaults_of_a_workload():
    """Help is printed without torch, so it cannot read them."""
    assert tuple(MODELS) == PLANNED_MODELS and tuple(gpu_specs.GPUS) == GPUS
    shown = {name: default for name, (_, default, _) in plan_options.OPTIONS.items()}
    fields = {field.name: field.default for field in dataclasses.fields(Workload)}
    fields |= {"model": plan_options.DEFAULT_MODEL, "points": fields["gradient_plan"].points}
    fields |= {"gpus": fields["ranks"], "shard": None, "sequence": None}
    assert shown == {name: fields[name] for name in shown}


def test_a_model_whose_vae_has_other_numbers(calls, root, tmp_path):
    size = ("--model", "wan2.2-ti2v-5b", "--frames", 121, "--height", 704, "--width", 1280)
    assert run(*size) == run(*size, "--first-frame") == 0
    assert [call.workload.first_frame for call in calls] == [False, True]
    assert all(call.workload.latent_shape == (1, 48, 31, 44, 80) for call in calls)
    assert all(call.workload.tokens == 27280 for call in calls)
    data = [
        Sample(
            torch.zeros(48, 3, 4, 6),
            {"encoder_hidden_states": torch.zeros(2, 20), "first_frame": torch.zeros(48, 1, 4, 6)},
        )
    ]
    sizes = {"frames": 9, "height": 64, "width": 96, "first_frame": True}
    assert sizes_of(write_dataset(tmp_path / "data", data)) == sizes


def test_json_is_all_that_is_printed(calls, searched, capsys):
    assert run("--json", "--points", 4, "--no-sft", "--train", "full", "--host-budget", "64GB") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["memory"] == dataclasses.asdict(searched.memory)
    assert content["reward_memory"] == dataclasses.asdict(searched.reward_memory)
    assert content["feasible"] is True
    assert content["peak"] == sum(content["categories"].values()) == searched.peak
    assert content["step_seconds"] == pytest.approx(sum(content["seconds"].values()))
    assert (content["workload"]["points"], content["workload"]["train"]) == (4, "full")
    assert any(candidate["reason"] == "chosen" for candidate in content["candidates"])
    assert calls[0].workload.sft is False and calls[0].host_budget == 64 * 10**9


def test_apply_plans_for_the_files_run_and_keeps_the_rest(root, file, calls, searched, capsys):
    before = file.read_text()
    assert run("--apply", file, "--budget", "24GiB") == 0
    work = calls[0].workload
    assert (work.frames, work.height, work.width) == (5, 32, 32)
    assert work.config["num_layers"] == 1 and work.reward_blocks == 1
    assert (work.train, work.lora_rank, work.target_modules) == ("lora", 4, ("to_q",))
    assert (work.points, work.num_inference_steps) == (3, 9)
    assert (work.batch_size, work.gradient_accumulation_steps, work.sft) == (1, 2, True)
    assert calls[0].budget == 24 << 30
    after = file.read_text()
    config = load_config(TrainFile, file)
    assert config.memory.build() == searched.memory and config.memory.weight_dtype == "bf16"
    assert config.reward_memory.build() == searched.reward_memory
    assert config.hardware.precision == "bf16" and config.hardware.patch
    assert config.lora.target_modules == ("to_q",) and config.prfl.points == 3
    rewritten = ("memory", "  offload", "  # an old", "hardware")
    kept = [line for line in before.splitlines() if not line.startswith(rewritten)]
    assert [line for line in after.splitlines() if line in kept] == kept
    assert "# on which machine\nhardware:" in after and config.optimizer.learning_rate == 1e-5
    assert capsys.readouterr().err == f"prfl-fast plan: written: {file}\n"
    assert run("--apply", file) == 0 and file.read_text() == after


def test_apply_plans_the_training_of_a_reward_model(root, tmp_path, calls, searched, capsys):
    manifest = (root / "pairs" / "manifest.jsonl").read_text()
    (tmp_path / "pairs").mkdir()
    outside = manifest.replace("samples/", f"{root / 'pairs' / 'samples'}/")
    (tmp_path / "pairs" / "manifest.jsonl").write_text(outside)
    changes = {"loss": "bt", "data": str(tmp_path / "pairs"), "run.batch_size": 3}
    changes["allow_outside"] = True
    content = config("train-reward", root, tmp_path / "out", changes)
    file = write_config(tmp_path / "reward.yaml", content)
    assert run("--apply", file) == 0
    work = calls[0].workload
    assert (work.train, work.batch_size, work.sft, work.reward_loss) == ("full", 3, False, "bt")
    assert work.config["num_layers"] == 1 and (work.frames, work.height) == (5, 32)
    written = load_config(TrainRewardFile, file)
    assert written.memory.build() == searched.memory
    assert written.hardware.precision == "bf16" and written.loss == "bt"
    capsys.readouterr()
    assert run("--apply", file, "--batch-size", 2) == 2
    assert "--batch-size is 2, but" in capsys.readouterr().err
    content["lora"] = {"lora_rank": 4, "target_modules": ["to_q"]}
    before = write_config(file, content).read_bytes()
    assert run(file) == 0 and file.read_bytes() == before
    work = calls[-1].workload
    assert (work.train, work.lora_rank, work.target_modules) == ("lora", 4, ("to_q",))


def test_apply_plans_for_the_files_method(file, calls):
    text = file.read_text()
    file.write_text(text.replace("points: 3   # three", "method: refl"))
    assert run("--apply", file) == 0 and calls[-1].workload.gradient_plan == GradientPlan.refl()
    draft = "method: draft\n  depth: 4\n  divergence: 0.1"
    file.write_text(text.replace("points: 3   # three", draft))
    assert run("--apply", file) == 0
    work = calls[-1].workload
    assert work.gradient_plan == GradientPlan.draft(4) and work.divergence
    file.write_text(text.replace("points: 3 ", "draws: independent\n  points: 3 "))
    assert run("--apply", file) == 0
    assert calls[-1].workload.gradient_plan == GradientPlan.prfl(3, "independent")


def test_apply_plans_supervised_training_beside_unused_guidance(file, calls):
    guided = "prfl:\n  guidance: {guidance_scale: 5, negative: n.safetensors}\n"
    file.write_text(file.read_text().replace("prfl:\n", guided) + "objectives: [sft]\n")
    assert run("--apply", file) == 0 and calls[-1].workload.gradient_plan == GradientPlan.prfl()
    assert calls[-1].workload.guidance is None


def test_a_plan_of_preferences(root, file, calls):
    text = file.read_text().replace(f"{root}/data", f"{root}/pairs")
    file.write_text(text + "objectives: [dpo, sft]\n")
    assert run(file) == 0 and calls[-1].workload.dpo and calls[-1].workload.sft


@pytest.mark.parametrize("batched", [True, False])
def test_apply_plans_guided_steps(file, calls, batched):
    section = f"guidance: {{guidance_scale: 5, negative: n.safetensors, batched: {batched}}}"
    file.write_text(file.read_text().replace("prfl:\n", f"prfl:\n  {section}\n"))
    assert run("--apply", file) == 0
    assert calls[-1].workload.guidance == ("batched" if batched else "separate")


def test_apply_plans_several_rewards(root, file, calls):
    rewards = f"[{{name: a, path: {root}/reward}}, {{name: b, path: [{root}/reward, "
    rewards += f"{root}/reward], ensemble: worst, weight: 0.5}}]"
    file.write_text(file.read_text().replace(f"reward: {root}/reward\n", f"reward: {rewards}\n"))
    assert run("--apply", file) == 0
    assert calls[-1].workload.rewards == ((1,), (1, 1))


@pytest.mark.parametrize("form", ["json", "missing"])
def test_apply_to_other_files(root, tmp_path, calls, form):
    path = tmp_path / "train.yaml"
    if form == "json":
        write_config(path, yaml.safe_load(FILE.format(root=root)))
    options = ("--lora-rank", 32, "--points", 2) if form == "missing" else ()
    assert run("--apply", path, *options) == 0
    content = yaml.safe_load(path.read_text())
    assert content["memory"]["weight_dtype"] == "bf16"
    assert content["hardware"]["precision"] == "bf16"
    if form == "json":
        assert content["prfl"] == {"points": 3, "num_inference_steps": 9}
        assert content["out"] == "runs/a"
    else:
        assert content["lora"]["lora_rank"] == 32
        assert content["prfl"]["points"] == 2 and content["run"]["gradient_accumulation_steps"] == 1
        assert run("--apply", path) == 0  # a part of a file is read back
        assert calls[-1].workload.lora_rank == 32 and calls[-1].workload.gradient_plan.points == 2


def test_train_lora_adds_adapters_to_a_file_without(root, file, calls):
    text = "".join(line for line in file.open() if not line.startswith("lora"))
    file.write_text(text)
    assert run("--apply", file) == 0 and calls[-1].workload.train == "full"
    assert "lora" not in yaml.safe_load(file.read_text())
    assert run("--apply", file, "--train", "lora", "--lora-rank", 8) == 0
    assert load_config(TrainFile, file).lora.lora_rank == 8


def test_plans_of_several_gpus_take_the_files_layout(root, file, tmp_path, calls, searched, capsys):
    text = file.read_text()
    file.write_text(f"{text}parallel: {{shard: 4, sequence: 2, points: shared}}\n")
    assert run(file) == 0 and calls[-1].workload.ranks == 1
    assert run(file, "--gpus", 8) == run(file, "--gpus", 8, "--shard", 4) == 0
    for call in calls[-2:]:
        assert call.workload.parallel == ParallelConfig(shard=4, sequence=2)
    assert run(file, "--gpus", 8, "--shard", 8) == 2
    file.write_text(f"{text}parallel: {{shard: auto, sequence: 2}}\n")
    assert run(file, "--gpus", 8, "--shard", 4) == 0
    assert calls[-1].workload.parallel == ParallelConfig(shard=4, sequence=2)
    file.write_text(f"{text}parallel: {{shard: 4, sequence: 2, points: shared}}\n")
    assert run(file, "--gpus", 6) == 2
    assert f"{file}: parallel.shard is 4, expected a divisor of 6" in capsys.readouterr().err
    kept = ParallelConfig(shard=4, sequence=2, keep_gathered=True)
    work = dataclasses.replace(searched.workload, ranks=8, parallel=kept)
    report.apply_to_yaml(dataclasses.replace(searched, workload=work), file)
    expected = {"shard": 4, "sequence": 2, "keep_gathered": True}
    assert yaml.safe_load(file.read_text())["parallel"] == {**expected, "points": "shared"}
    assert run(file, "--gpus", 8) == 0 and calls[-1].workload.parallel.keep_gathered == "auto"
    reward = write_config(tmp_path / "reward.yaml", config("train-reward", root, tmp_path))
    assert run(reward, "--gpus", 4, "--shard", 2) == 0
    assert calls[-1].workload.parallel == ParallelConfig(shard=2)


def test_nothing_fits_is_exit_code_1_and_leaves_the_file(root, file, searched, monkeypatch, capsys):
    short = dataclasses.replace(searched, feasible=False, budget=1 << 30, peak=3 << 30)
    monkeypatch.setattr(planner, "plan_memory", lambda *_, **__: short)
    before = file.read_text()
    assert run("--apply", file) == 1
    out, error = capsys.readouterr()
    assert "no plan fits: the nearest takes 3.00 GiB" in out
    assert error == f"prfl-fast plan: no plan fits: {file} is not changed\n"
    assert file.read_text() == before
    assert run("--json") == 1
    assert json.loads(capsys.readouterr().out)["feasible"] is False


BAD = {
    "--table --weight-dtype fp8 --json": "--table is given with --weight-dtype and --json, exp",
    "--model nowhere": "model is 'nowhere', expected one of wan2.1-t2v-1.3b",
    "--model FLUX": "FLUX/config.json is not a configuration of a transformer: class of",
    "--model LIST": "LIST/config.json is not a configuration of a transformer: ",
    "--model BRACE": "BRACE/config.json is not a configuration of a transformer: Expecting",
    "--model NOTHING": "NOTHING/config.json is not a configuration of a transformer: it has no",
    "--frames 80": "--frames is 80, expected 4n + 1",
    "--height 100": "--height is 100, expected a multiple of 16",
    "--gpus 8 --shard 3": "--shard is 3, expected a divisor of 8",
    "--gpus 8 --shard 4 --sequence 3": "--shard is 4, expected 1, or a multiple of sequence = 3",
    "--reward-blocks 41": "--reward-blocks is 41, expected at most the model's 40",
    "--train full --weight-dtype nf4": "weight_dtype is 'nf4', expected auto or bf16",
    "FILE --apply FILE": "FILE.yaml is 'FILE', expected none beside --apply FILE",
    "FILE --table": "--table is given with FILE.yaml, expected without",
    "FILE --lora-rank 8": "--lora-rank is 8, but FILE has lora.lora_rank: 4. Leave",
    "--apply FILE --lora-rank 8": "--lora-rank is 8, but FILE has lora.lora_rank: 4. Leave",
    "--apply FILE --points 1": "--points is 1, but FILE has prfl.points: 3",
    "--apply FILE --num-inference-steps 40": "is 40, but FILE has prfl.num_inference_steps: 9",
    "--apply FILE --gradient-accumulation-steps 5": "has run.gradient_accumulation_steps: 2",
    "--apply FILE --batch-size 2": "--batch-size is 2, but FILE has run.batch_size: 1",
    "--apply FILE --first-frame": "--first-frame is true, but the data of FILE has false",
    "--model wan2.2-ti2v-5b": "height is 720, expected a multiple of 32",
    "--frames 1 --first-frame": "frames is 1, expected 4n + 1 above 1",
    "--apply FILE --frames 81": "--frames is 81, but the data of FILE has 5",
    "--apply FILE --train full": "--train is full, but FILE has a lora section",
    "--apply SFT --no-sft": "--no-sft, but SFT has sft among its objectives",
    "--apply FILE --guidance batched": "--guidance is batched, but FILE has no prfl.guidance",
    "--apply EMPTY": "holds empty, expected keys and values",
    "--apply BROKEN": "not YAML",
    "LAYERS": "LAYERS: rollout.sparse_dense_layers is [0, 1], expected numbers below 1, the",
    "LAYERS --model wan2.1-t2v-1.3b --frames 81": "--frames is 81, but the data of LAYERS has 5",
    "EXPERT": "EXPERT: train is 'low', expected no value for a model with one transformer",
    "EXPERT --expert high": "--expert is high, but EXPERT has train: low",
    "--apply WRONG": "unknown key 'lora.lora_rnk': did you mean 'lora_rank'?",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_before_any_work(
    root, file, tmp_path, monkeypatch, capsys, arguments
):
    search = Mock(side_effect=AssertionError("searched"))
    monkeypatch.setattr("prfl_fast.planning.simulation.simulate", search)
    monkeypatch.chdir(tmp_path)
    text = file.read_text()
    shutil.copy(file, "FILE")
    (tmp_path / "SFT").write_text(text + "objectives: [prfl, sft]\n")
    layers = "rollout: {sparse_dense_layers: [0, 1]}"
    (tmp_path / "LAYERS").write_text(f"{text}{layers}\n")
    (tmp_path / "EXPERT").write_text(f"{text}train: low\n")
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "BROKEN").write_text("a: [\n")
    (tmp_path / "WRONG").write_text("lora: {lora_rnk: 2}\n")
    configs = {"FLUX": '{"_class_name": "Flux"}', "LIST": "[1]", "BRACE": "{", "NOTHING": "{}"}
    for name, text in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert run(*arguments.split()) == 2
    assert BAD[arguments] in one_line(capsys, "plan")
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


REFUSED = {
    "--budget 24gigs": "--budget: '24gigs', expected bytes or a size like 24GiB",
    "--budget 0": "--budget: '0', expected bytes",
    "--budget 24": "--budget: '24 bytes', expected a size like 24GiB",
    "--host-budget 64": "--host-budget: '64 bytes', expected a size like 64GiB",
    "--host-budget much": "--host-budget: 'much', expected",
    "--gpu b9000": "--gpu: invalid choice: 'b9000' (choose from",
    "--lora-rank 0": "--lora-rank: '0', expected a positive integer",
    "--batch-size -1": "--batch-size: '-1', expected",
    "--gradient-accumulation-steps 0": "--gradient-accumulation-steps: '0', expected",
    "--gpus 0": "--gpus: '0', expected a positive integer",
    "--gpus 8 --sequence 0": "--sequence: '0', expected",
    "--points 0": "--points: '0', expected",
    "--num-inference-steps 1": "--num-inference-steps: '1', expected an integer of at least 2",
    "--plot plan.txt": "--plot: 'plan.txt', expected a name that ends in .png",
    "--plot nowhere/plan.png": "nowhere is not a folder",
    "--apply nowhere/train.yaml": "nowhere is not a folder",
    "nowhere.yaml": "FILE.yaml: 'nowhere.yaml', expected a YAML file",
    "--apply .": "--apply: '.', expected a file, not a folder",
    "--shift inf": "--shift: 'inf', expected a number",
    "--shift 0": "--shift: '0', expected a positive number",
    "--weight-dtype int4": "--weight-dtype: invalid choice",
    "--train some": "--train: invalid choice",
    "--lora-rank many": "--lora-rank: 'many', expected a positive integer",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_values_that_argparse_refuses(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(*arguments.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("prfl-fast plan: error: argument ")
    assert REFUSED[arguments] in error and error.count("\n") == 1


def test_a_missing_package_is_named(monkeypatch, calls, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--plot", "a.png") == 2
    error = "prfl-fast plan: matplotlib is not installed: pip install 'prfl_fast[video]'\n"
    assert capsys.readouterr().err == error
