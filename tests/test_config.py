"""YAML configurations: defaults, types, ranges, spelling."""

import dataclasses
import re
from pathlib import Path

import pytest

from prfl_fast.config import (
    Memory,
    NamedReward,
    ReferenceReward,
    RewardMemory,
    ScoreConfig,
    TrainConfig,
    TrainRewardConfig,
)
from prfl_fast.config_file import ConfigError, from_mapping, load_config, to_yaml
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.rollout_engine import RolloutPrecision, RolloutSettings

BF16 = "hardware: {precision: bf16}\n"
LORA = "lora: {rank: 4}\n"
BASE = "model: m\ndata: d\nout: o\nreward: r\nrun: {steps: 3}\n"
SCORE = "reward: r\ndata: d\nout: s.csv\n"


def load(tmp_path, text, kind=TrainConfig):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load_config(kind, path)


def test_defaults_are_the_papers(tmp_path):
    config = load(tmp_path, BASE)
    assert (config.prfl.num_steps, config.prfl.shift, config.prfl.target, config.prfl.weight) == (
        40,
        5.0,
        2.0,
        0.1,
    )
    assert (config.prfl.points, config.prfl.solver, config.objectives) == (
        1,
        "unipc",
        ("prfl", "sft"),
    )
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.eps) == (5e-6, (0.9, 0.999), 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, config.run.accumulation) == (0.01, 1.0, 5)
    assert config.lora is None and config.run.ema_decay is None
    reward = load(tmp_path, BASE.replace("reward: r\n", ""), TrainRewardConfig)
    assert (reward.optimizer.learning_rate, reward.optimizer.clip_norm, reward.num_blocks) == (
        1e-6,
        1.0,
        8,
    )
    assert reward.timesteps == (201, 400, 600, 800, 1000)


def test_values_are_read_as_people_write_them(tmp_path):
    text = (
        BASE
        + "optimizer: {learning_rate: 5e-6, weight_decay: 0, betas: [0.9, 0.95], clip_norm: null}\n"
    )
    optimizer = load(tmp_path, text).optimizer
    assert (
        optimizer.learning_rate == 5e-6
        and optimizer.clip_norm is None
        and optimizer.betas == (0.9, 0.95)
    )
    assert optimizer.weight_decay == 0.0 and isinstance(optimizer.weight_decay, float)
    three = load(
        tmp_path, BASE.replace("reward: r", "reward: {transformer: a, mlp: b, pool: c}")
    ).reward
    assert three == ReferenceReward("a", "b", "c")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (TrainConfig, BASE + LORA),
        (TrainConfig, BASE + BF16 + "memory: auto\n"),
        (TrainConfig, BASE + "memory: {policy: attention, offload: cpu}\n"),
        (TrainRewardConfig, BASE.replace("reward: r\n", "memory: {policy: full}\n")),
        (ScoreConfig, SCORE + "timesteps: [5]\n"),
    ],
)
def test_what_is_printed_reads_back(tmp_path, kind, text):
    config = load(tmp_path, text, kind)
    assert load(tmp_path, to_yaml(config), kind) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.out = "x"


METHODS = {
    "prfl": GradientPlan.prfl(),
    "prfl, points: 3, draws: independent": GradientPlan.prfl(3, "independent"),
    "refl": GradientPlan.refl(),
    "refl, window: 0.5": GradientPlan.refl(0.5),
    "draft": GradientPlan.draft(),
    "draft, depth: 3": GradientPlan.draft(3),
    "draft, depth: all": GradientPlan.draft(None),
    "draft-lv, renoised: 4": GradientPlan.draft_lv(4),
    "alignprop": GradientPlan.alignprop(),
    "alignprop, depth: 5": GradientPlan.alignprop(most=5),
    "controlnet++, window: 0.3, num_steps: 1000": GradientPlan.controlnet_plus_plus(0.3),
    "instructvideo": GradientPlan.instruct_video(),
    "instructvideo, strength: 0.5, depth: 2, segments: 3, attenuation: 0.2": (
        GradientPlan.instruct_video(0.5, 2, 3, 0.2)
    ),
    "instructvideo, segments: all": GradientPlan.instruct_video(segments=None),
    "instructvideo, segments: all, depth: 24": GradientPlan.instruct_video(0.6, 24, None),
    "rg-lcd": GradientPlan.rg_lcd(),
}


@pytest.mark.parametrize("text", METHODS)
def test_methods_are_the_constructors_of_the_plan(tmp_path, text):
    config = load(tmp_path, BASE + f"prfl: {{method: {text}}}\n")
    assert config.prfl.plan() == METHODS[text]
    assert load(tmp_path, to_yaml(config)) == config


def test_rollout_settings_are_the_librarys(tmp_path):
    assert load(tmp_path, BASE).rollout == RolloutSettings()
    text = "rollout: {merge_lora: true, compile: on, precision: {linears: [0.3, 1], stride: 2}}\n"
    precision = RolloutPrecision(linears=(0.3, 1.0), stride=2)
    expected = RolloutSettings(merge_lora=True, compile="on", precision=precision)
    config = load(tmp_path, BASE + LORA + text)
    assert config.rollout == expected and load(tmp_path, to_yaml(config)) == config
    assert load(tmp_path, BASE + "rollout: {compile: off}\n").rollout.compile == "off"
    assert load(tmp_path, BASE + "rollout: {compile: 'off'}\n").rollout.compile == "off"


SEVERAL = """\
reward:
  - {name: motion, path: a}
  - {name: text, path: {transformer: b, mlp: c, pool: d}, weight: 0.5}
  - {name: look, path: [e, f], ensemble: uncertainty, coefficient: 0.2}
"""


def test_several_rewards(tmp_path):
    config = load(tmp_path, BASE.replace("reward: r\n", SEVERAL))
    assert config.reward == (
        NamedReward("motion", "a"),
        NamedReward("text", ReferenceReward("b", "c", "d"), 0.5),
        NamedReward("look", ("e", "f"), 1.0, "uncertainty", 0.2),
    )
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: text", "name: motion", "reward[1].name is 'motion', which another reward has"),
        ("name: text", "nam: text", "unknown key 'reward[1].nam': did you mean 'name'?"),
        ("weight: 0.5", "weight: 0", "reward[1].weight is 0, expected a value above 0"),
        ("path: a", "path: 3", "reward[0].path is 3, expected a string or a mapping with keys"),
        ("path: a", "path: [a]", "reward[0].path is a list of one, expected at least two, or a s"),
        ("path: a", "path: [a, b]", "reward[0].ensemble is missing, expected mean, worst or unc"),
        ("path: a", "path: a, ensemble: mean", "reward[0].ensemble is mean, which needs a list"),
        ("ensemble: uncertainty", "ensemble: worst", "reward[2].coefficient is 0.2, which only en"),
        (
            "ensemble: uncertainty",
            "ensemble: all",
            "reward[2].ensemble is 'all', expected one",
        ),
    ],
)
def test_bad_lists_of_rewards(tmp_path, old, new, message):
    text = BASE.replace("reward: r\n", SEVERAL.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


def test_memory_is_auto_or_explicit(tmp_path):
    assert load(tmp_path, BASE).memory == Memory()
    assert load(tmp_path, BASE + BF16 + "memory: auto\n").memory == "auto"
    text = BASE + BF16 + LORA + "memory: {weights: nf4, policy: none, feed_forward_chunk: 512}\n"
    assert load(tmp_path, text).memory == Memory(weights="nf4", feed_forward_chunk=512)
    text = BASE + BF16 + "memory: {weights: bf16, optimizer: adamw-sr, gradients: fp32}\n"
    expected = {"weights": "bf16", "optimizer": "adamw-sr", "gradients": "fp32"}
    assert load(tmp_path, text).memory == Memory(**expected)
    reward = text.replace("reward: r\n", "")
    assert load(tmp_path, reward, TrainRewardConfig).memory == RewardMemory(**expected)


@pytest.mark.parametrize("kind", [Memory, RewardMemory])
def test_what_may_change_between_runs_is_not_arithmetic(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    assert names - set(kind.FREE) - {"reward_weights"} == {"weights", "optimizer", "gradients"}
    assert names <= {field.name for field in dataclasses.fields(Memory)}


BAD = {
    "optimizer: {learning_rte: 1}": "'optimizer.learning_rte': did you mean 'learning_rate'?",
    "objectivs: [sft]": "unknown key 'objectivs': did you mean 'objectives'?",
    "zzz: 1": "unknown key 'zzz': expected one of model, data, out, run",
    "optimizer: {learning_rate: -1}": "optimizer.learning_rate is -1, expected a value above 0",
    "optimizer: {learning_rate: .nan}": "optimizer.learning_rate is nan, expected a finite number",
    "optimizer: {learning_rate: fast}": "optimizer.learning_rate is 'fast', expected a number",
    "optimizer: {learning_rate: true}": "optimizer.learning_rate is True, expected a number",
    "optimizer: {betas: [0.9]}": "optimizer.betas is [0.9], expected a list of 2, each a number",
    "optimizer: {betas: [0.9, 1]}": "betas[1] is 1, expected a value at least 0 and below 1",
    "optimizer: 3": "optimizer is 3, expected a mapping with keys learning_rate",
    "objectives: []": "objectives is [], expected a list of one or more, each one of prfl, sft",
    "objectives: sft": "objectives is 'sft', expected a list",
    "objectives: [sfd]": "objectives[0] is 'sfd', expected one of prfl, sft; did you mean 'sft'?",
    "objectives: [sft, sft]": "objectives is ['sft', 'sft'], expected no repeats",
    "prfl: {num_steps: 4.5}": "prfl.num_steps is 4.5, expected a whole number",
    "prfl: {num_steps: true}": "prfl.num_steps is True, expected a whole number",
    "prfl: {num_steps: 1}": "prfl.num_steps is 1, expected a value at least 2",
    "prfl: {num_steps: 3, points: 3}": "prfl.points is 3, but 3 steps have only 2 in the",
    "prfl: {method: refll}": "prfl.method is 'refll', expected one of prfl, refl, draft, draft-lv",
    "prfl: {method: refl, points: 2}": "prfl.points is 2, but prfl.method is refl, which takes",
    "prfl: {depth: 3}": "prfl.depth is 3, but prfl.method is prfl, which takes points, draws",
    "prfl: {method: rg-lcd, window: 0.5}": "prfl.window is 0.5, but prfl.method is rg-lcd, which",
    "prfl: {method: draft, draws: independent}": "prfl.draws is independent, but prfl.meth",
    "prfl: {method: draft, depth: 41}": "prfl.depth is 41, expected at most 40, the steps",
    "prfl: {method: alignprop, depth: 41}": "prfl.depth is 41, expected at most 40, the steps",
    "prfl: {method: instructvideo, depth: 25}": "prfl.depth is 25, expected at most 24, the steps",
    "prfl: {method: draft, depth: al}": "prfl.depth is 'al', expected a whole number or all or",
    "prfl: {method: draft, depth: 0}": "prfl.depth is 0, expected a value at least 1",
    "prfl: {method: refl, window: 0}": "prfl.window is 0, expected a value above 0 and at most 1",
    "prfl: {method: instructvideo, strength: 2}": "prfl.strength is 2, expected a value above 0 an",
    "prfl: {method: instructvideo, depth: all}": "prfl.depth is all, expected a whole number for i",
    "prfl: {method: instructvideo, segments: 0}": "prfl.segments is 0, expected a value at least 1",
    "prfl: {method: instructvideo, segments: al}": "segments is 'al', expected a whole number or",
    "prfl: {method: instructvideo, segments: all, attenuation: 1}": "prfl.attenuation is 1, but pr",
    "prfl: {method: refl, segments: all}": "prfl.segments is all, but prfl.method is refl, which",
    "prfl: {target: high}": "prfl.target is 'high', expected a number or null",
    "prfl: {divergence: 0.1}": "prfl.divergence is set, but there are no adapters: add lora: {rank",
    f"{LORA}prfl: {{divergence: -1}}": "prfl.divergence is -1, expected a value at least 0",
    "prfl: {guidance: 5}": "prfl.guidance is 5, expected a mapping with keys scale, negat",
    "prfl: {guidance: {scale: 5}}": "prfl.guidance.negative is missing, expected a string",
    "prfl: {guidance: {negative: n}}": "prfl.guidance.scale is missing, expected a number",
    "prfl: {guidance: {scale: -5, negative: n}}": "prfl.guidance.scale is -5, expected a value",
    "prfl: {guidance: {scale: 0, negative: n}}": "prfl.guidance.scale is 0, expected a value",
    "rollout: {merge_lora: true}": "rollout.merge_lora is set, but there are no adapters: add lora",
    "rollout: {cash: true}": "unknown key 'rollout.cash': did you mean 'cache'?",
    "rollout: {compile: maybe}": "rollout.compile is 'maybe', expected one of auto, on, off",
    f"{LORA}rollout: {{merge_lora: true, cache: false}}": "rollout.cache is False, expected True",
    "rollout: {precision: fp8}": "rollout.precision is 'fp8', expected a mapping with keys linears",
    "rollout: {precision: {linears: [0.9, 0.1]}}": "rollout.precision.linears is (0.9, 0.1), expe",
    "rollout: {precision: {linears: [0]}}": "rollout.precision.linears is [0], expected a list of",
    "rollout: {precision: {stride: 0}}": "rollout.precision.stride is 0, expected a positive",
    "rollout: {precision: {drift_limit: -1}}": "rollout.precision.drift_limit is -1.0, expected",
    "prfl: {solver: unipd}": "did you mean 'unipc'?",
    "lora: {}": "lora.rank is missing, expected a whole number",
    "lora: {rank: 2, targets: []}": "lora.targets is [], expected a list of one or more",
    "hardware: {patch: 1}": "hardware.patch is 1, expected true or false",
    "hardware: {device: ''}": "hardware.device is '', expected a string",
    "hardware: {gradient_checkpointing: true}": "unknown key 'hardware.gradient_checkpointing'",
    "memory: atuo": "memory is 'atuo', expected auto or a mapping with keys weights, policy",
    "memory:": "memory is empty, expected auto or a mapping",
    "memory: 24GiB": "memory is '24GiB', expected auto or a mapping",
    "memory: [full]": "memory is ['full'], expected auto or a mapping",
    "memory: auto": "memory is auto, which plans for bfloat16: set hardware.precision: bf16",
    "memory: {polcy: full}": "unknown key 'memory.polcy': did you mean 'policy'?",
    "memory: {policy: ful}": "memory.policy is 'ful', expected one of none, full, attention; did",
    "memory: {policy: null}": "memory.policy is empty, expected one of none, full, attention",
    "memory: {policy: true}": "memory.policy is True, expected one of none, full, attention",
    "memory: {offload: gpu}": "memory.offload is 'gpu', expected cpu or null",
    "memory: {offload: true}": "memory.offload is True, expected cpu or null",
    "memory: {reward_policy: cpu}": "memory.reward_policy is 'cpu', expected one of none, full",
    "memory: {reward_offload: disk}": "memory.reward_offload is 'disk', expected cpu or null",
    "memory: {feed_forward_chunk: 0}": "memory.feed_forward_chunk is 0, expected a value at least",
    "memory: {feed_forward_chunk: 1.5}": "feed_forward_chunk is 1.5, expected a whole number or",
    "memory: {optimizer: adam}": "memory.optimizer is 'adam', expected one of adamw, adamw-sr",
    "memory: {gradients: bf16}": "memory.gradients is 'bf16', expected one of parameter, fp32",
    "memory: {weights: int4}": "memory.weights is 'int4', expected one of fp32, bf16, fp8, nf4",
    "memory: {weights: bf16}": "weights is bf16, which computes in bfloat16: set hardware.prec",
    "memory: {reward_weights: nf4}": "memory.reward_weights is nf4, which computes in bfloat16",
    f"{BF16}memory: {{weights: nf4}}": "memory.weights is nf4, which cannot be trained: add lora",
    f"{BF16}memory: {{weights: bf16, optimizer: paged-adamw8bit}}": "needs memory.weights: fp32",
    "model: twice": "key 'model' appears twice",
    "1: 2": "key 1 is not a string",
    "a: [": "not YAML",
    "? {a: b}\n: c": "not a string",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_values_name_the_key(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, BASE + text + "\n")
    message = str(caught.value)
    assert BAD[text] in message and str(tmp_path / "c.yaml") in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds empty, expected keys and values"),
        ("- 1\n", "holds [1], expected keys and values"),
        ("model: m\n", "data is missing, expected a string"),
        (
            BASE.replace("reward: r\n", ""),
            "reward is missing: the prfl objective needs a reward model",
        ),
        (BASE.replace("reward: r", "reward: 3"), "reward is 3, expected a string or a mapping"),
        (BASE.replace("reward: r", "reward: {transformer: a, mlp: b}"), "reward.pool is missing"),
        (BASE.replace("{steps: 3}", "{}"), "run.steps is missing, expected a whole number"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory: auto\n", "memory is 'auto', expected a mapping with keys weights, policy"),
        ("memory: {reward_policy: full}\n", "unknown key 'memory.reward_policy': did you mean"),
        (BF16 + "memory: {weights: nf4}\n", "memory.weights is 'nf4', expected one of fp32, bf16"),
        ("memory: {weights: bf16}\n", "set hardware.precision: bf16"),
    ],
)
def test_bad_memory_of_a_reward_model(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, BASE.replace("reward: r\n", text), TrainRewardConfig)
    assert message in str(caught.value)


def test_sft_alone_needs_no_reward(tmp_path):
    assert load(tmp_path, BASE.replace("reward: r\n", "objectives: [sft]\n")).reward is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            SCORE.replace("s.csv", "s.txt"),
            "out is 's.txt', expected a name that ends in .jsonl or .csv",
        ),
        (
            SCORE + "timesteps: [1001]\n",
            "timesteps[0] is 1001, expected a value at least 0 and at most 1000",
        ),
        (
            SCORE.replace("reward: r", "reward: {transformer: a, mlp: b, pool: c}"),
            "model is missing",
        ),
    ],
)
def test_bad_score_configurations(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, ScoreConfig)
    assert message in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read: No such file"):
        load_config(TrainConfig, tmp_path / "nowhere.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(TrainConfig, tmp_path / "b.yaml")


def test_the_readmes_files_are_valid(tmp_path):
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", readme, re.S)
    named = {block.partition("\n")[0]: block for block in blocks if block.startswith("#")}
    (memory,) = (block for block in blocks if not block.startswith("#"))
    assert load(tmp_path, BASE + memory).memory.policy == "attention"
    assert load(tmp_path, named["# reward.yaml"], TrainRewardConfig).run.steps == 2000
    train = named["# train.yaml"]
    assert load(tmp_path, train).memory == "auto"
    other = named["# other-methods.yaml, keys of train.yaml"]
    config = load(tmp_path, BASE.replace("reward: r\n", "") + other)
    assert config.prfl.plan() == GradientPlan.alignprop(most=8)
    assert config.reward[1].ensemble == "worst" and config.rollout.precision.check_every == 20


def test_mappings_build_without_a_file():
    assert from_mapping(ScoreConfig, {"reward": "r", "data": "d", "out": "o.csv"}).batch_size == 1
