"""The command line: memory policies of runs, ``memory: auto`` and full devices."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from commands import call, negative_file, one_line, reference_layout, refused, train
from offload_models import assert_same
from runs import make_world, write_config

pytest.importorskip("pydantic")

from prfl_fast.cli import plan as cli_plan
from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.yaml_config import load_config
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.memory import policy as memory
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning import planner
from prfl_fast.planning.presets import model_config
from prfl_fast.planning.search import Candidate
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.utils.io import load_tensors

BF16 = {"hardware.precision": "bf16"}
QLORA = {**BF16, "lora.lora_rank": 2}
KEPT = {"activation_checkpointing": "attention", "offload": "cpu"}
KEPT_CHUNKED = {**KEPT, "feed_forward_chunk": 3}
MEMORY = {**KEPT_CHUNKED, "weight_dtype": "nf4", "optimizer": "adamw8bit", "gradient_dtype": "fp32"}
REWARD_MEMORY = {**KEPT_CHUNKED, "weight_dtype": "fp8", "activation_checkpointing": "full"}


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "changes",
    [
        {**QLORA, "memory.activation_checkpointing": "full", "hardware.patch": False},
        {**QLORA, "memory": MEMORY, "reward_memory": REWARD_MEMORY},
        {**BF16, "memory": {"weight_dtype": "bf16", "optimizer": "adamw-sr"}},
        {**BF16, "memory": {"weight_dtype": "bf16", "gradient_dtype": "fp32"}},
        {**BF16, "reward_memory": {"weight_dtype": "nf4"}},
    ],
)
def test_train_under_a_memory_policy(root, tmp_path, changes):
    records = train(root, tmp_path / "out", {"run.steps": 2, **changes})
    saved = tmp_path / "out/step-00000002/model"
    name = "pytorch_lora_weights" if "lora.lora_rank" in changes else "diffusion_pytorch_model"
    tensors = load_tensors(saved / f"{name}.safetensors")
    narrow = changes.get("memory", {}).get("weight_dtype", "fp32") != "fp32"
    dtypes = {tensor.dtype for tensor in tensors.values()}
    assert torch.bfloat16 in dtypes if narrow else dtypes == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(record["sft/grad_norm"] > 0 for record in records)


@pytest.mark.cases(1)
@pytest.mark.parametrize("lora", [True, False])
def test_a_run_with_fp8_linears_resumes_and_keeps_them(tmp_path, capsys, lora):
    root = make_world(tmp_path / "world", heads=2)  # 48 columns: FP8 takes multiples of 16
    fp8 = {**BF16, "hardware.fp8_linears": True, "run.save_every": 1}
    fp8 |= {"lora.lora_rank": 2} if lora else {"memory": {"weight_dtype": "bf16"}}
    whole = train(root, tmp_path / "whole", {**fp8, "run.steps": 2})
    train(root, tmp_path / "parts", {**fp8, "run.steps": 1})
    off = {**fp8, "hardware.fp8_linears": False, "run.steps": 2}
    error = refused(capsys, "train", root, tmp_path / "parts", off)
    assert "made with hardware.fp8_linears = true, this run has null" in error
    train(root, tmp_path / "parts", {**fp8, "run.steps": 2})
    exact = train(root, tmp_path / "exact", off)
    name = "pytorch_lora_weights" if lora else "diffusion_pytorch_model"
    path = f"step-00000002/model/{name}.safetensors"
    states = [load_tensors(tmp_path / run / path) for run in ("whole", "parts", "exact")]
    assert_same(states[0], states[1])
    assert states[0].keys() == states[2].keys()
    assert all(a["sft/grad_norm"] != b["sft/grad_norm"] for a, b in zip(whole, exact, strict=True))


def test_the_weights_that_train_start_as_the_file_has_them(root, tmp_path, monkeypatch):
    """bf16 is read from float32 and rounded once; what diffusers keeps in float32 is not."""
    cast = Mock(wraps=memory.cast_weights)
    monkeypatch.setattr(memory, "cast_weights", cast)
    monkeypatch.setattr("prfl_fast.training.trainer.Trainer.run", Mock(side_effect=OSError))
    file = load_tensors(root / "model/diffusion_pytorch_model.safetensors")
    changes = {**BF16, "memory": {"weight_dtype": "bf16"}}
    assert call("train", root, tmp_path / "out", changes) == 2
    (model,) = [made.args[0] for made in cast.call_args_list if made.args[1] == "bf16"]
    state = model.state_dict()
    assert state.keys() == file.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, file[name].to(tensor.dtype))
        kept = any(part in name for part in ("time_embedder", "scale_shift_table", "norm2"))
        assert (tensor.dtype == torch.float32) == kept, name


def test_a_reward_in_the_reference_layout_keeps_its_float32(root, tmp_path, monkeypatch):
    """Its structure comes from the generator, which is read in bfloat16; its weights must not."""
    apply = Mock(wraps=memory.apply_memory)
    monkeypatch.setattr("prfl_fast.cli.train.apply_memory", apply)
    changes = {**BF16, "reward": reference_layout(root, tmp_path / "theirs"), "run.steps": 1}
    changes["memory"] = {"weight_dtype": "bf16"}
    train(root, tmp_path / "a", changes)
    train(root, tmp_path / "b", {**changes, "reward_memory": changes["memory"]})
    file = load_tensors(root / "reward/model.safetensors")
    seen = [made.args[0] for made in apply.call_args_list]
    runs = zip(seen[::2], seen[1::2], (torch.float32, torch.bfloat16), strict=True)
    for transformer, reward, dtype in runs:
        assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        weight = reward.backbone.blocks[0].attn1.to_q.weight
        assert weight.dtype == dtype
        assert torch.equal(weight, file["backbone.blocks.0.attn1.to_q.weight"].to(dtype))


@pytest.mark.slow
def test_a_run_may_go_on_under_another_policy_but_not_with_other_weights(root, tmp_path, capsys):
    base = {**QLORA, "memory.weight_dtype": "nf4"}
    policies = {"memory": {**KEPT, "weight_dtype": "nf4"}}
    policies["reward_memory"] = {**KEPT, "activation_checkpointing": "full"}
    for policy in policies.values():
        policy["stream_weights"] = 1
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    records = train(root, whole, {**base, "run.steps": 4})
    train(root, halves, {**base, "run.steps": 2})
    assert train(root, halves, {**QLORA, **policies, "run.steps": 4}) == records
    name = "step-00000004/model/pytorch_lora_weights.safetensors"
    assert_same(load_tensors(halves / name), load_tensors(whole / name))
    for key, value, message in (
        ("memory.weight_dtype", "fp8", "memory.weight_dtype = 'nf4', this run has 'fp8'"),
        ("reward_memory.weight_dtype", "bf16", "reward_memory.weight_dtype = 'fp32', this run"),
        ("memory.optimizer", "adamw-sr", "optimizer = 'adamw', this run has"),
        ("memory.gradient_dtype", "fp32", "gradient_dtype = 'parameter', this run has 'fp32'"),
    ):
        changes = {**base, key: value, "run.steps": 6}
        assert f"made with {message}" in refused(capsys, "train", root, halves, changes)


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_weights_in_host_memory_change_no_number(root, tmp_path, kind):
    found = []
    for streams in ({}, {"stream_weights": 1}):
        memory = {"weight_dtype": "bf16", "activation_checkpointing": "full", **streams}
        reward_memory = {"weight_dtype": "bf16", **streams}
        changes = {**BF16, "run.steps": 2, "memory": memory, "reward_memory": reward_memory}
        if kind == "full":
            memory["optimizer"] = "adamw-cpu"
        else:
            changes["lora.lora_rank"] = 2
        out = tmp_path / f"{len(streams)}"
        records = train(root, out, changes)
        (file,) = (out / "final").glob("*.safetensors")
        found.append((records, load_tensors(file)))
    assert found[0][0] == found[1][0]
    assert_same(found[1][1], found[0][1])


@pytest.mark.cases(1)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-sr"])
def test_train_reward_under_a_memory_policy(root, tmp_path, optimizer):
    policy = {**KEPT, "weight_dtype": "bf16", "optimizer": optimizer}
    out = tmp_path / "out"
    changes = {**BF16, "run.steps": 2, "memory": policy}
    changes |= {"eval": {"data": str(root / "data"), "timesteps": [400]}}
    assert call("train-reward", root, out, changes) == 0
    reward = LatentRewardModel.load(out / "reward")
    assert reward.backbone.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert reward.head.fc1.weight.dtype == torch.float32
    assert call("score", root, tmp_path / "one", {"reward": str(out / "reward")}) == 0


@pytest.fixture
def planned(monkeypatch):
    """Replace the planner by one that finds this plan and notes its calls in ``calls``."""
    policies = {"memory": MemoryConfig("bf16", "full"), "reward_memory": MemoryConfig("bf16")}
    found = SimpleNamespace(
        **policies, less=None, feasible=True, expandable_segments=True, calls=[]
    )
    found.peak, found.reserve, found.budget = 3 << 30, 1 << 30, 8 << 30
    found.smaller = lambda *_: found.less

    def plan_memory(workload, **arguments):
        found.calls.append({**vars(workload), **arguments})
        return found

    monkeypatch.setattr(planner, "plan_memory", plan_memory)
    return found


@pytest.fixture
def fill_device(monkeypatch):
    """Return the function that makes a function report a full device."""
    full = Mock(side_effect=torch.OutOfMemoryError(f"{FULL}\nMore."))
    return lambda name: monkeypatch.setattr(name, full)


AUTO = {**BF16, "memory": "auto"}
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB."
SFT_LOSS = "prfl_fast.training.objectives.sft_loss"


def test_memory_auto_is_planned_for_the_run_and_kept_by_its_continuation(
    root, tmp_path, planned, capsys
):
    out = tmp_path / "out"
    changes = {**AUTO, "lora.lora_rank": 3, "prfl.points": 2}
    changes |= {"run.steps": 1, "run.gradient_accumulation_steps": 2}
    assert call("train", root, out, changes) == 0
    (asked,) = planned.calls
    assert asked["model"] == model_config(str(root / "model"))
    assert asked["gradient_plan"].points == 2
    expected = {"train": "lora", "lora_rank": 3, "batch_size": 1, "gradient_accumulation_steps": 2}
    expected |= {"num_inference_steps": 3, "reward_blocks": 1, "sft": True, "host_budget": 1}
    expected |= {"frames": 5, "height": 32, "width": 32}
    expected |= {"ema": True, "patched": True}
    assert {key: asked[key] for key in expected} == expected
    assert asked["budget"] > 1 << 20
    assert capsys.readouterr().err == (
        "prfl-fast train: memory: auto chose memory: {weight_dtype: bf16, "
        "activation_checkpointing: full}, reward_memory: {weight_dtype: bf16}, "
        "predicted to take 4.0 of 8.0 GiB\n"
    )
    stored = load_config(TrainFile, out / "config.yaml")
    assert stored.memory.build() == planned.memory
    assert stored.reward_memory.build() == planned.reward_memory
    planned.memory = planned.reward_memory = MemoryConfig("fp8")
    assert call("train", root, out, {**changes, "run.steps": 2}) == 0
    assert "with which this run began" in capsys.readouterr().err and len(planned.calls) == 1
    again = load_config(TrainFile, out / "config.yaml")
    assert (again.memory, again.reward_memory) == (stored.memory, stored.reward_memory)


@pytest.mark.slow
@pytest.mark.parametrize("dpo", [False, True])
def test_memory_auto_by_a_whole_search(root, tmp_path, capsys, dpo):
    out, changes = tmp_path / "out", {**AUTO, "lora.lora_rank": 2, "run.steps": 1}
    changes |= {"objectives": ["prfl", "dpo"], "data": str(root / "pairs")} if dpo else {}
    assert call("train", root, out, changes) == 0
    stored = load_config(TrainFile, out / "config.yaml")
    assert stored.memory.build() == stored.reward_memory.build() == MemoryConfig("bf16")
    expected = "memory: {weight_dtype: bf16}, reward_memory: {weight_dtype: bf16}"
    assert f"memory: auto chose {expected}" in capsys.readouterr().err


@pytest.mark.cases(1)
@pytest.mark.parametrize("data", ["data", "pairs"])
def test_memory_auto_of_a_reward_model(root, tmp_path, planned, capsys, data):
    out, changes = tmp_path / "out", {**AUTO, "run.steps": 1, "data": str(root / data)}
    changes["loss"] = "bt" if data == "pairs" else "ce"
    assert call("train-reward", root, out, changes) == 0
    (asked,) = planned.calls
    expected = {"train": "full", "batch_size": 2, "reward_loss": changes["loss"], "sft": False}
    assert {key: asked[key] for key in expected} == expected
    assert asked["model"]["num_layers"] == 1
    assert "memory: auto chose memory: {weight_dtype: bf16" in capsys.readouterr().err
    stored = load_config(TrainRewardFile, out / "config.yaml")
    assert stored.memory.build() == planned.memory
    assert call("train-reward", root, out, {**changes, "run.steps": 2}) == 0
    assert "with which this run began" in capsys.readouterr().err and len(planned.calls) == 1


def test_memory_auto_that_fits_nowhere(root, tmp_path, planned, capsys):
    planned.feasible, planned.peak, planned.expandable_segments = False, 9 << 30, False
    error = refused(capsys, "train", root, tmp_path / "out", AUTO)
    assert "Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in error
    assert "memory is auto, but no plan fits 8.0 GiB: the nearest, memory: {weight_dtype" in error
    assert "takes 10.0 GiB" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "device, policy, setting, told",
    [
        ("cuda", MemoryConfig("bf16", "full"), "", True),
        ("cuda", MemoryConfig(), "", False),
        ("cuda", MemoryConfig("bf16", "full"), "expandable_segments:True", False),
        ("cpu", MemoryConfig("bf16", "full"), "", False),
    ],
)
def test_explicit_memory_names_the_allocators_setting(
    monkeypatch, capsys, device, policy, setting, told
):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", setting)
    section = SimpleNamespace(build=lambda: policy)
    config = SimpleNamespace(memory=section, reward_memory=section)
    assert cli_plan.choose_memory(config, Mock(), torch.device(device)) == (policy, policy, None)
    assert cli_plan.choose_reward_memory(config, Mock(), torch.device(device)) == policy
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2 * told
    assert all("set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in line for line in shown)


@pytest.mark.parametrize("objectives", [["prfl", "sft"], ["sft"]])
def test_memory_auto_of_renoised_points_where_they_train(root, tmp_path, planned, objectives):
    changes = {**AUTO, "run.steps": 1, "objectives": objectives, "prfl.method": "draft-lv"}
    assert call("train", root, tmp_path / "out", changes) == 0
    plan = GradientPlan.draft_lv() if "prfl" in objectives else GradientPlan.prfl()
    assert planned.calls[0]["gradient_plan"] == plan


@pytest.mark.parametrize("batched", [True, False])
def test_guided_steps_are_planned_where_they_train(root, tmp_path, planned, batched):
    negative = negative_file(tmp_path / "n.safetensors", 3, 20)
    guidance = {"guidance_scale": 5, "negative": negative, "batched": batched}
    changes = {**AUTO, "run.steps": 1, "prfl.guidance": guidance}
    assert call("train", root, tmp_path / "out", changes) == 0
    assert call("train", root, tmp_path / "sft", {**changes, "objectives": ["sft"]}) == 0
    found = [asked["guidance"] for asked in planned.calls]
    assert found == ["batched" if batched else "separate", None]


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_memory_auto_without_a_reward(root, tmp_path, planned, name):
    data = "pairs" if name == "dpo" else "data"
    changes = {
        **AUTO,
        "run.steps": 1,
        "objectives": [name],
        "reward": ...,
        "data": str(root / data),
    }
    assert call("train", root, tmp_path / "out", changes) == 0
    (asked,) = planned.calls
    assert asked["reward_blocks"] == 1 and asked["train"] == "full"
    assert asked["sft"] == (name == "sft") and asked["dpo"] == (name == "dpo")


def test_check_prints_what_auto_is(root, tmp_path, planned, capsys):
    assert call("train", root, tmp_path / "out", AUTO, "--check") == 0
    printed = capsys.readouterr().out
    content = load_config(TrainFile, write_config(tmp_path / "again.yaml", printed))
    assert content.memory.build() == planned.memory and not (tmp_path / "out").exists()


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "memory", ["auto", {"activation_checkpointing": "full"}, {"weight_dtype": "bf16"}]
)
def test_out_of_memory_says_what_to_try(root, tmp_path, planned, fill_device, capsys, memory):
    fill_device(SFT_LOSS)
    less = MemoryConfig("bf16", "full", "cpu"), MemoryConfig("bf16")
    planned.less = Candidate(*less, 2 << 30, 0, 1.0, "fits")
    changes = {"run.steps": 1, **BF16, "memory": memory}
    assert call("train", root, tmp_path / "out", changes) == 4
    error = capsys.readouterr().err
    assert "out of memory in objective 'sft', forward of micro-batch 1, step 1: CUDA out" in error
    assert "live: weights" in error and "Traceback" not in error
    assert (
        "try memory: {weight_dtype: bf16, activation_checkpointing: full, offload: cpu}, "
        "reward_memory: {weight_dtype: bf16}, predicted to peak at 2.0 GiB" in error
    )
    assert not list((tmp_path / "out").glob("step-*")) and len(planned.calls) == 1
    stored = load_config(TrainFile, tmp_path / "out" / "config.yaml")
    planned.less = None
    planned.memory, planned.reward_memory = stored.memory.build(), stored.reward_memory.build()
    assert call("train", root, tmp_path / "out", changes) == 4
    assert "no policy is known to take less: fewer frames" in capsys.readouterr().err


def test_out_of_memory_before_training_is_one_line(root, tmp_path, fill_device, capsys):
    fill_device("prfl_fast.memory.policy.cast_weights")
    assert call("train", root, tmp_path / "out") == 4
    assert one_line(capsys, "train") == f"prfl-fast train: {FULL}\n"


def test_a_full_gpu_of_several_names_the_command_that_plans_them():
    advice = cli_plan.next_policy(SimpleNamespace(memory=None), None, None, None, "my.yaml", 4)
    assert advice.startswith("prfl-fast plan my.yaml --gpus 4 ")
