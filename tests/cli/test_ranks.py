"""Training commands on two ranks: logs are those of one process; bad layouts are refused early."""

import json
import os
import socket
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch
from commands import call
from processes import forked
from ranks import run_ranks
from runs import config, log, make_world, write_config

from prfl_fast import LatentRewardModel
from prfl_fast.cli import main as cli
from prfl_fast.cli import objectives
from prfl_fast.cli import plan as cli_plan
from prfl_fast.cli import ranks as cli_ranks
from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.loading import open_dataset
from prfl_fast.cli.plan import planned
from prfl_fast.cli.ranks import Job, join
from prfl_fast.cli.workload import fields_of_options, layout_of
from prfl_fast.cli.yaml_config import load_config
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.parallel import make_mesh
from prfl_fast.parallel.ranks import Ranks
from prfl_fast.planning import planner
from prfl_fast.planning import search as plan_search
from prfl_fast.training.checkpoint import rank_seed
from prfl_fast.training.objectives import RewardFeedback
from prfl_fast.utils.folder_lock import LOCK

pytest.importorskip("diffusers")
pytest.importorskip("peft")

LORA = {"lora": {"lora_rank": 2}, "run.ema_decay": ...}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), heads=2)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def on_two_ranks(monkeypatch, *arguments):
    """Call the command line in two forked processes, as torchrun would; return the exit codes."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)

    def rank_1():
        os.environ.update(RANK="1", LOCAL_RANK="1")
        return cli.main([*map(str, arguments)])

    def rank_0():
        os.environ.update(RANK="0", LOCAL_RANK="0")
        other = os.fork()
        if other == 0:
            os._exit(forked(rank_1))
        code = cli.main([*map(str, arguments)])
        return code or os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])

    return forked(rank_0)


def assert_same_log(ours, theirs, rel=2e-4):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            assert a[name] == pytest.approx(value, rel=rel, abs=1e-7), (name, a["step"])


@pytest.mark.parametrize(
    ("changes", "parallel"),
    [
        pytest.param({}, {"shard": 1, "sequence": 2}, marks=pytest.mark.slow),
        (LORA, {"shard": 2, "sequence": 2, "keep_gathered": True}),
    ],
)
def test_two_ranks_log_what_one_process_logs(
    world, tmp_path, monkeypatch, capfd, changes, parallel
):
    changes = {**changes, "run.steps": 2}

    def on_points_of_ranks(step, batches, device, points):
        points = torch.Generator().manual_seed(rank_seed(0, 2))  # as several ranks draw them
        return RewardFeedback(step, batches, device, points)

    with monkeypatch.context() as patch:
        patch.setattr(objectives, "RewardFeedback", on_points_of_ranks)
        assert call("train", world, tmp_path / "one", changes) == 0
    changes = {**changes, "parallel": parallel}
    path = write_config(tmp_path / "train.yaml", config("train", world, tmp_path / "two", changes))
    assert on_two_ranks(monkeypatch, "train", path) == 0
    assert "on meta" not in capfd.readouterr().err  # blocks are compiled once they have weights
    assert_same_log(log(tmp_path / "two"), log(tmp_path / "one"))


def loaded(root, tmp_path, changes, kind=TrainFile, command="train"):
    path = tmp_path / f"{command}-{os.getpid()}.yaml"  # ranks write theirs
    return load_config(kind, write_config(path, config(command, root, tmp_path / "out", changes)))


AUTO = {"memory": "auto", "hardware.precision": "bf16", "lora": {"lora_rank": 2}}


@pytest.fixture
def plans(monkeypatch):
    """Plan in this process, of one policy; return the options of the plans."""
    monkeypatch.setattr(plan_search, "MODES", plan_search.MODES[:1])
    calls, own = [], planner.plan_memory

    def plan_memory(work, **options):
        calls.append((work, options))
        return own(work, **options)

    monkeypatch.setattr(planner, "plan_memory", plan_memory)
    monkeypatch.setattr(cli_plan, "_plan_elsewhere", cli_plan._plan)
    return calls


def of_four(monkeypatch, given):
    """Return the configuration of rank 0 of 4 on a machine of 2."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(cli_plan, "_host_room", lambda: 48 << 30)
    ranks = MagicMock(size=4, gather=lambda value: [value, (None, 40 << 30)])
    ranks.on_main = lambda function, *arguments: function(*arguments)
    return planned(given, ranks, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "command", "changes", "layout"),
    [
        (TrainFile, "train", AUTO, (1, 1)),
        (TrainRewardFile, "train-reward", AUTO | {"parallel": {"shard": 4}}, (4, 1)),
    ],
)
def test_memory_auto_plans_policies_and_layout(
    world, tmp_path, monkeypatch, plans, capsys, kind, command, changes, layout
):
    config = of_four(monkeypatch, loaded(world, tmp_path, changes, kind, command))
    [(work, options)] = plans
    assert (work.ranks, work.gpus_per_machine, work.frames, work.lora_rank) == (4, 2, 5, 2)
    assert options["budget"] == 20 << 30  # half of the host memory of the smaller machine
    assert config.memory.weight_dtype == "bf16"
    assert (config.parallel.shard, config.parallel.sequence) == layout
    assert isinstance(config.parallel.keep_gathered, bool)
    said = capsys.readouterr().err
    assert f"prfl-fast {command}: memory: auto chose memory: {{weight_dtype: bf16" in said
    assert f"parallel: {{shard: {layout[0]}, sequence: {layout[1]}, keep_gathered: " in said


def test_a_resumed_run_plans_with_its_weights_and_optimizer(world, tmp_path, monkeypatch, plans):
    given = loaded(world, tmp_path, AUTO | {"parallel": {"shard": 1, "sequence": 1}})
    for dtype, optimizer in (("nf4", "adamw"), ("fp32", "adamw")):
        policy = {"memory": {"weight_dtype": dtype, "optimizer": optimizer}}
        policy["reward_memory"] = {"weight_dtype": dtype, "activation_checkpointing": "full"}
        began = loaded(world, tmp_path, AUTO | policy)
        monkeypatch.setattr(cli_plan, "_stored", lambda kind, config, began=began: began)
        config = of_four(monkeypatch, given)
        assert config.memory.weight_dtype == dtype
    [(_, options)] = plans  # float32 weights are kept, as no plan has them
    assert (options["weight_dtype"], options["optimizer"]) == ("nf4", "adamw")
    assert config.reward_memory.activation_checkpointing == "full"
    assert config.parallel == given.parallel
    began = loaded(world, tmp_path, AUTO | policy | {"parallel": {"shard": 2, "sequence": 2}})
    monkeypatch.setattr(cli_plan, "_stored", lambda kind, config: began)
    config = of_four(monkeypatch, loaded(world, tmp_path, AUTO))
    assert (config.parallel.shard, config.parallel.sequence) == (2, 2)


@pytest.mark.parametrize(
    ("rollout", "sequence"),
    [({}, "auto"), ({"teacache": 0.1}, 1), ({"sparse_attention": 0.5}, 1), ({"drift": 0.02}, 1)],
)
def test_no_ranks_share_a_video_whose_rollout_needs_all_tokens(world, tmp_path, rollout, sequence):
    config = loaded(world, tmp_path, {"rollout": rollout})
    assert layout_of(config).sequence == sequence
    content = {"parallel": {"sequence": 2}, "rollout": rollout}
    assert layout_of(loaded(world, tmp_path, content)).sequence == 2
    file = next(tmp_path.glob("train-*.yaml"))
    with pytest.raises(ValueError, match="--sequence is 4, but .* has parallel.sequence: 2"):
        fields_of_options({"gpus": 8, "sequence": 4}, file)


def test_one_gpu_plans_anew_what_was_planned_for_several(world, tmp_path, monkeypatch, plans):
    def resumed(kind, command, changes):
        policy = {"memory": {"weight_dtype": "nf4", "offload": "cpu"}, "parallel": {"shard": 1}}
        began = loaded(world, tmp_path, AUTO | policy | changes, kind, command)
        monkeypatch.setattr(cli_plan, "_stored", lambda kind, config: began)
        given = loaded(world, tmp_path, AUTO, kind, command)
        data, choose = open_dataset(given, "data"), cli_plan.choose_reward_memory
        if kind is TrainFile:
            choose = cli_plan.choose_memory
        policy = choose(given, data, torch.device("cpu"))
        return policy[0] if kind is TrainFile else policy

    assert resumed(TrainFile, "train", {}).offload == "cpu" and not plans
    for changes in ({"parallel": {"shard": 8}}, {"parallel": {"shard": 1, "sequence": 2}}):
        assert resumed(TrainFile, "train", changes) == MemoryConfig("nf4")
    bf16 = {"parallel": {"shard": 2}, "memory": {"weight_dtype": "bf16", "offload": "cpu"}}
    assert resumed(TrainRewardFile, "train-reward", bf16) == MemoryConfig("bf16")
    assert [options["weight_dtype"] for _, options in plans] == ["nf4", "nf4", "bf16"]


def test_a_plan_whose_process_ends_is_one_line(monkeypatch):
    monkeypatch.setattr(cli_plan, "_plan", os._exit)
    with pytest.raises(ValueError, match="memory is auto, but the process that plans has ended"):
        cli_plan._plan_elsewhere(9)


@pytest.mark.slow
def test_two_ranks_run_the_plan_of_memory_auto(world, tmp_path, monkeypatch, capfd):
    changes = {**AUTO, "run.steps": 1, "run.ema_decay": ...}
    path = write_config(tmp_path / "train.yaml", config("train", world, tmp_path / "out", changes))
    assert on_two_ranks(monkeypatch, "train", path) == 0
    written = capfd.readouterr().err
    assert written.count("memory: auto chose") == 1 and "shard: 1, sequence: 1" in written
    changes = {**changes, "run.steps": 2, "run.resume": "auto"}
    write_config(path, config("train", world, tmp_path / "out", changes))
    assert on_two_ranks(monkeypatch, "train", path) == 0
    assert [record["step"] for record in log(tmp_path / "out")] == [1, 2]


def test_layouts_are_refused_before_models_are_read(world, tmp_path, monkeypatch):
    one = make_world(tmp_path / "one")

    def check(root, changes, policy=None):
        given = loaded(root, tmp_path, changes)
        job = Job(Ranks(make_mesh(given.parallel.build())), torch.device("cpu"), given)
        try:
            job.check_sequence([str(root / "model")])
            job.check_policy("memory", policy or MemoryConfig())
        except ValueError as error:
            return str(error)
        return None

    def other_settings():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # the group exists already
        own = {"parallel": {"shard": 1}} if os.environ["RANK"] == "1" else {}
        given = loaded(world, tmp_path, own)
        with pytest.raises(ValueError) as raised, join(given, check_only=True):
            pass
        return str(raised.value)

    def refuse(text):
        raise ValueError(text)

    def before_the_plan(changes):
        given = loaded(world, tmp_path, AUTO | changes)
        with pytest.raises(ValueError) as raised, join(given, check_only=False):
            pass
        return str(raised.value)

    def errors():
        differ = other_settings()
        sizes = before_the_plan({"parallel": {"sequence": 3}})
        locked = tmp_path / "out" / LOCK
        monkeypatch.setattr(cli_ranks, "planned", lambda *_: refuse(f"locked: {locked.is_file()}"))
        held = before_the_plan({})  # rank 1 may look after rank 0 has ended
        assert held == "locked: True" or os.environ["RANK"] == "1"
        shares = {"parallel": {"shard": 1, "sequence": 2}}
        streams = MemoryConfig(stream_weights=1)
        return [
            check(world, shares, streams),
            check(one, shares),
            check(world, {**shares, "hardware.patch": False}),
            check(world, {}, streams),
            sizes,
            differ,
        ]

    (fits, heads, unpatched, streamed, sizes, differ), (*_, also) = run_ranks(2, errors)
    assert differ == also
    assert sizes == "parallel.sequence is 3, expected a divisor of 2, the number of ranks"
    assert differ.startswith("settings of rank 1 differ from those of rank 0 in parallel, ")
    assert fits is None
    assert heads.startswith("parallel.sequence is 2, but ") and "1 heads" in heads
    assert unpatched.startswith("hardware.patch is False, expected true with parallel.sequence: 2")
    assert streamed.startswith("memory.stream_weights is 1, expected null, or parallel.shard: 1")


@pytest.mark.slow
def test_torchrun_trains_sharded_adapters(world, tmp_path):
    changes = {**LORA, "run.steps": 2, "parallel": {"shard": 2}}
    path = write_config(tmp_path / "train.yaml", config("train", world, tmp_path / "out", changes))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*run, "-m", "prfl_fast.cli", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("each rank reads its parts of the generator") == 1
    assert done.stdout.count("adapter, for load_lora_weights") == 1
    assert [record["step"] for record in log(tmp_path / "out")] == [1, 2]


def test_a_bad_option_is_reported_by_one_rank(monkeypatch, capsys):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    for rank in ("0", "1"):
        for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", "run.yaml", "--nope"])
    error = "prfl-fast: error: unrecognized arguments: --nope. See prfl-fast --help\n"
    assert capsys.readouterr().err == error


def test_doctor_reports_all_ranks_once(monkeypatch, capfd):
    assert on_two_ranks(monkeypatch, "doctor", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert len(found["ranks"]["ranks"]) == 2 and found["ranks"]["wrong_results"] == []


@pytest.mark.cases(1)
@pytest.mark.parametrize("changes", [{}, {"lora": {"lora_rank": 2}}])
def test_a_sharded_reward_model_is_saved_whole(world, tmp_path, monkeypatch, changes):
    changes = {**changes, "run.steps": 1, "parallel": {"shard": 2}}
    given = config("train-reward", world, tmp_path / "out", changes)
    path = write_config(tmp_path / "reward.yaml", given)
    assert on_two_ranks(monkeypatch, "train-reward", path) == 0
    assert LatentRewardModel.load(tmp_path / "out" / "reward").num_blocks > 0
