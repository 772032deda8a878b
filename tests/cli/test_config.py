"""YAML configurations: defaults, types, ranges, spelling."""

import dataclasses
import re
from pathlib import Path

import pytest
from commands import one_line
from runs import write_config

pytest.importorskip("pydantic")

from prfl_fast.cli import main as cli
from prfl_fast.cli import train
from prfl_fast.cli.config import ScoreFile, TrainFile, TrainRewardFile
from prfl_fast.cli.reference import FILES, reference_page, template
from prfl_fast.cli.reward_sections import NamedReward, ReferenceReward
from prfl_fast.cli.yaml_config import ConfigError, load_config, parse_config, sections_in, to_yaml
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.rollout.config import RolloutConfig

BF16 = "hardware: {precision: bf16}\n"
FP8 = "hardware: {precision: bf16, fp8_linears: true}\n"
LORA = "lora: {lora_rank: 4}\n"
BASE = "model: m\ndata: d\nout: o\nreward: r\nrun: {steps: 3}\n"
REWARD = BASE.replace("reward: r\n", "")
SCORE = "reward: r\ndata: d\nout: s.csv\n"


def load(tmp_path, text, kind=TrainFile):
    return load_config(kind, write_config(tmp_path / "c.yaml", text))


@pytest.fixture
def error_of(tmp_path, monkeypatch, capsys):
    """Return the function from a file to the one line that a command refuses it with."""
    monkeypatch.chdir(tmp_path)

    def error(text, command="train"):
        write_config(tmp_path / "c.yaml", text)
        assert cli.main([command, "c.yaml"]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
        message = one_line(capsys, command)
        assert message.startswith(f"prfl-fast {command}: c.yaml")
        return message

    return error


def test_defaults_are_the_papers(tmp_path):
    config = load(tmp_path, BASE)
    feedback, optimizer, run = config.prfl, config.optimizer, config.run
    assert (feedback.num_inference_steps, feedback.shift, feedback.points) == (40, 5.0, 1)
    assert (feedback.target, feedback.weight, feedback.solver) == (2.0, 0.1, "unipc")
    assert config.objectives == ("prfl", "sft") and config.lora is None
    assert (optimizer.learning_rate, optimizer.betas, optimizer.eps) == (None, (0.9, 0.999), 1e-8)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.01, 1.0)
    assert run.gradient_accumulation_steps == 5 and run.ema_decay is None
    reward = load(tmp_path, REWARD + "eval: {held_out: 0.1}\n", TrainRewardFile)
    optimizer = reward.optimizer
    assert (optimizer.learning_rate, optimizer.max_grad_norm, reward.num_blocks) == (None, 1.0, 8)
    assert reward.eval.timesteps == (201, 400, 600, 800, 1000)


def test_values_are_read_as_people_write_them(tmp_path):
    text = "{learning_rate: 5e-6, weight_decay: 0, betas: [0.9, 0.95], max_grad_norm: null}\n"
    optimizer = load(tmp_path, f"{BASE}optimizer: {text}").optimizer
    assert optimizer.learning_rate == 5e-6 and optimizer.max_grad_norm is None
    assert optimizer.betas == (0.9, 0.95)
    assert optimizer.weight_decay == 0.0 and isinstance(optimizer.weight_decay, float)
    text = BASE.replace("reward: r", "reward: {transformer: a, mlp: b, pool: c}")
    assert load(tmp_path, text).reward == ReferenceReward(transformer="a", mlp="b", pool="c")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (TrainFile, BASE + LORA),
        (TrainFile, BASE + BF16 + "memory: auto\n"),
        (TrainFile, BASE + "memory: {activation_checkpointing: attention, offload: cpu}\n"),
        (TrainRewardFile, REWARD + "memory: {activation_checkpointing: full}\n"),
        (ScoreFile, SCORE + "timesteps: [5]\n"),
    ],
)
def test_what_is_printed_reads_back(tmp_path, kind, text):
    config = load(tmp_path, text, kind)
    assert load(tmp_path, to_yaml(config), kind) == config
    with pytest.raises(ValueError, match="frozen"):
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
    "controlnet++, window: 0.3, num_inference_steps: 1000": GradientPlan.controlnet_plus_plus(0.3),
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


def test_rollout_is_the_librarys(tmp_path):
    assert load(tmp_path, BASE).rollout.build() == RolloutConfig()
    text = "rollout: {merge_lora: true, compile: on, fp8_linears: [0.3, 1], stride: 2}\n"
    expected = RolloutConfig(merge_lora=True, compile="on", fp8_linears=(0.3, 1.0), stride=2)
    config = load(tmp_path, BASE + LORA + text)
    assert config.rollout.build() == expected and load(tmp_path, to_yaml(config)) == config
    config = load(tmp_path, f"{BASE}rollout: {{stride: [[0.8, 1, 4], [0, 0.5, 2]]}}")
    assert config.rollout.build() == RolloutConfig(stride=((0.8, 1.0, 4), (0.0, 0.5, 2)))
    sparse = "sparse_attention: [[0.8, 1, 0.5]], sparse_predictor: tiles, sparse_dense_layers: [0]"
    config = load(tmp_path, f"{BASE}rollout: {{{sparse}}}")
    expected = RolloutConfig(
        sparse_attention=((0.8, 1.0, 0.5),), sparse_predictor="tiles", sparse_dense_layers=(0,)
    )
    assert config.rollout.build() == expected and load(tmp_path, to_yaml(config)) == config
    assert load(tmp_path, to_yaml(config)) == config
    for text, expected in (
        ("adapter: a, stride: 10", RolloutConfig(adapter="a", stride=10)),
        (
            "adapter: [a, null], adapter_scale: [1, 0.5]",
            RolloutConfig(adapter=("a", None), adapter_scale=(1.0, 0.5)),
        ),
        ("solver_order: 3", RolloutConfig(solver_order=3)),
        ("solver_order: [[0.5, 1, 1]]", RolloutConfig(solver_order=((0.5, 1.0, 1),))),
    ):
        config = load(tmp_path, f"{BASE}rollout: {{{text}}}")
        assert config.rollout.build() == expected and load(tmp_path, to_yaml(config)) == config
    for off in ("off", "'off'"):
        assert load(tmp_path, f"{BASE}rollout: {{compile: {off}}}\n").rollout.compile == "off"


SEVERAL = """\
reward:
  - {name: motion, path: a}
  - {name: text, path: {transformer: b, mlp: c, pool: d}, weight: 0.5}
  - {name: look, path: [e, f], ensemble: uncertainty, coefficient: 0.2}
"""


def test_several_rewards(tmp_path):
    config = load(tmp_path, REWARD + SEVERAL)
    assert config.reward == (
        NamedReward(name="motion", path="a"),
        NamedReward(
            name="text", path=ReferenceReward(transformer="b", mlp="c", pool="d"), weight=0.5
        ),
        NamedReward(name="look", path=("e", "f"), ensemble="uncertainty", coefficient=0.2),
    )
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: text", "name: motion", "reward[1].name is 'motion', expected a name of its own"),
        ("name: text", "nam: text", "unknown key 'reward[1].nam': did you mean 'name'?"),
        ("weight: 0.5", "weight: 0", "reward[1].weight is 0, expected a number above 0"),
        ("path: a", "path: 3", "reward[0].path is 3, expected a string, a mapping with keys"),
        ("path: a", "path: [a]", "reward[0].path is ['a'], expected a list of two or more"),
        ("path: a", "path: [a, b]", "reward[0].ensemble is null, expected mean, worst or unc"),
        ("path: a", "path: a, ensemble: mean", "reward[0].ensemble is 'mean', expected no value"),
        ("ensemble: uncertainty", "ensemble: worst", "reward[2].coefficient is 0.2, expected no"),
        ("ensemble: uncertainty", "ensemble: all", "reward[2].ensemble is 'all', expected one"),
    ],
)
def test_bad_lists_of_rewards(error_of, old, new, message):
    assert message in error_of(REWARD + SEVERAL.replace(old, new, 1))


def test_memory_is_auto_or_explicit(tmp_path):
    config = load(tmp_path, BASE)
    assert config.memory.build() == config.reward_memory.build() == MemoryConfig()
    assert load(tmp_path, BASE + BF16 + "memory: auto\n").memory == "auto"
    text = "memory: {weight_dtype: nf4, activation_checkpointing: none, feed_forward_chunk: 512}\n"
    expected = MemoryConfig(weight_dtype="nf4", feed_forward_chunk=512)
    assert load(tmp_path, BASE + BF16 + LORA + text).memory.build() == expected
    text = "{weight_dtype: bf16, offload: cpu}\n"
    config = load(tmp_path, f"{BASE}{BF16}reward_memory: {text}")
    assert config.reward_memory.build() == MemoryConfig(weight_dtype="bf16", offload="cpu")
    assert type(config.reward_memory).of(config.reward_memory.build()) == config.reward_memory
    text = BASE + BF16 + "memory: {weight_dtype: bf16, optimizer: adamw-sr, gradient_dtype: fp32}\n"
    expected = MemoryConfig(weight_dtype="bf16", optimizer="adamw-sr", gradient_dtype="fp32")
    assert load(tmp_path, text).memory.build() == expected
    text = text.replace("reward: r\n", "")
    assert load(tmp_path, text, TrainRewardFile).memory.build() == expected


def test_what_may_change_between_runs_is_not_arithmetic():
    names = {field.name for field in dataclasses.fields(MemoryConfig)}
    assert names - set(MemoryConfig.FREE) == {"weight_dtype", "optimizer", "gradient_dtype"}


CHECKPOINTING = "memory: {activation_checkpointing: "
BAD = {
    "optimizer: {learning_rte: 1}": "'optimizer.learning_rte': did you mean 'learning_rate'?",
    "objectivs: [sft]": "unknown key 'objectivs': did you mean 'objectives'?",
    "zzz: 1": "unknown key 'zzz': expected one of model, data, allow_outside, out, run",
    "optimizer: {learning_rate: -1}": "optimizer.learning_rate is -1, expected a number above 0",
    "optimizer: {learning_rate: .nan}": "optimizer.learning_rate is nan, expected a finite number",
    "optimizer: {learning_rate: 1e999}": "learning_rate is '1e999', expected a finite number",
    "optimizer: {learning_rate: fast}": "optimizer.learning_rate is 'fast', expected a number",
    "optimizer: {learning_rate: true}": "optimizer.learning_rate is true, expected a number",
    "optimizer: {betas: [0.9]}": "optimizer.betas is [0.9], expected a list of 2, each a number",
    "optimizer: {betas: [0.9, 1]}": "betas[1] is 1, expected a number of at least 0 and below 1",
    "optimizer: 3": "optimizer is 3, expected a mapping with keys learning_rate",
    "objectives: []": "objectives is [], expected a list of one or more, each one of prfl, sft",
    "objectives: sft": "objectives is 'sft', expected a list",
    "objectives: [sfd]": "expected one of prfl, sft, dpo, rwr; did you mean 'sft'?",
    "objectives: [sft, sft]": "objectives is ['sft', 'sft'], expected no repeats",
    "prfl: {num_inference_steps: 4.5}": "prfl.num_inference_steps is 4.5, expected a whole number",
    "prfl: {num_inference_steps: true}": "prfl.num_inference_steps is true, expected a whole numbe",
    "prfl: {num_inference_steps: 1}": "is 1, expected a whole number of at least 2",
    "prfl: {num_inference_steps: 3, points: 3}": "prfl.points is 3, ",
    "prfl: {method: refll}": "prfl.method is 'refll', expected one of prfl, refl, draft, draft-lv",
    "prfl: {method: refl, points: 2}": "prfl.points is 2, expected no value with method refl, whic",
    "prfl: {depth: 3}": "prfl.depth is 3, expected no value with method prfl, which takes points, ",
    "prfl: {method: rg-lcd, window: 0.5}": "window is 0.5, expected no value with method rg-lcd",
    "prfl: {method: draft, draws: independent}": "draws is 'independent', expected no value with",
    "prfl: {method: draft, depth: 41}": "prfl.depth is 41, expected at most 40, the steps",
    "prfl: {method: alignprop, depth: 41}": "prfl.depth is 41, expected at most 40, the steps",
    "prfl: {method: instructvideo, depth: 25}": "prfl.depth is 25, expected at most 24, the steps",
    "prfl: {method: draft, depth: al}": "depth is 'al', expected a whole number of at least 1, all",
    "prfl: {method: draft, depth: 0}": "prfl.depth is 0, expected a whole number of at least 1",
    "prfl: {method: refl, window: 0}": "prfl.window is 0, expected a number above 0 and at most 1",
    "prfl: {method: instructvideo, strength: 2}": "strength is 2, expected a number above 0 and at",
    "prfl: {method: instructvideo, depth: all}": "prfl.depth is 'all', expected a whole number wit",
    "prfl: {method: instructvideo, segments: 0}": "prfl.segments is 0, expected a whole number of ",
    "prfl: {method: instructvideo, segments: al}": "segments is 'al', expected a whole number of",
    "prfl: {method: instructvideo, segments: all, attenuation: 1}": "prfl.attenuation is 1.0, exp",
    "prfl: {method: refl, segments: all}": "prfl.segments is 'all', expected no value with method",
    "prfl: {target: high}": "prfl.target is 'high', expected a number or null",
    "prfl: {divergence: 0.1}": "prfl.divergence is 0.1, expected 0.0 without adapters. Add lora: {",
    f"{LORA}prfl: {{divergence: -1}}": "prfl.divergence is -1, expected a number of at least 0",
    "prfl: {guidance: 5}": "prfl.guidance is 5, expected a mapping with keys guidance_scale, negat",
    "prfl: {guidance: {guidance_scale: 5}}": "prfl.guidance.negative is missing, expected a string",
    "prfl: {guidance: {negative: n}}": "guidance.guidance_scale is missing, expected a number",
    "prfl: {guidance: {guidance_scale: -5, negative: n}}": "guidance_scale is -5, expected a numbe",
    "prfl: {guidance: {guidance_scale: 0, negative: n}}": "guidance_scale is 0, expected a number",
    "rollout: {merge_lora: true}": "rollout.merge_lora is true, expected false without adapters. A",
    "rollout: {cash: true}": "unknown key 'rollout.cash': did you mean 'cache'?",
    "rollout: {compile: maybe}": "rollout.compile is 'maybe', expected one of auto, on, off",
    f"{LORA}rollout: {{merge_lora: true, cache: false}}": "rollout.cache is false, expected true",
    "rollout: {fp8_linears: [0.9, 0.1]}": "rollout.fp8_linears is [0.9, 0.1], expected noise level",
    "rollout: {fp8_linears: [0]}": "rollout.fp8_linears is [0], expected a list of 2",
    "rollout: {stride: 0}": "rollout.stride is 0, expected a whole number of at least 1",
    "rollout: {stride: [[0.5, 1]]}": "rollout.stride[0] is [0.5, 1], expected [a number of at le",
    "rollout: {stride: [[0.5, 1, 0]]}": "rollout.stride[0][2] is 0, expected a whole number of at",
    "rollout: {stride: [[1, 0.5, 2]]}": "rollout.stride[0] is [1.0, 0.5, 2], expected (lowest, hi",
    "rollout: {solver_order: 4}": "solver_order is 4, expected a whole number of at least 1 and a",
    "rollout: {solver_order: [[0, 1, 4]]}": "rollout.solver_order[0][2] is 4, expected a whole n",
    "prfl: {solver: euler}\nrollout: {solver_order: 1}": "rollout.solver_order is 1, expected null",
    "rollout: {adapter_scale: 0.5}": "rollout.adapter_scale is 0.5, expected 1 without adapter",
    "rollout: {adapter: a, cache: false}": "rollout.cache is false, expected true with merge_lora",
    "rollout: {adapter: a, drift: 0.1}": "rollout.drift is 0.1, expected null beside rollout.adap",
    "rollout: {sparse_attention: 0}": "rollout.sparse_attention is 0, expected a number above 0",
    "rollout: {sparse_attention: [[1, 0, 0.5]]}": "rollout.sparse_attention[0] is [1.0, 0.0, 0.5],",
    "rollout: {sparse_dense_layers: [-1]}": "rollout.sparse_dense_layers[0] is -1, expected a whol",
    "rollout: {guidance_interval: [0.2, 1]}": "rollout.guidance_interval is [0.2, 1.0], expected n",
    "rollout: {drift_limit: -1}": "rollout.drift_limit is -1, expected a number above 0",
    "rollout: {adapter: [a, null], drift: 0.1}": "drift is 0.1, expected null beside rollout.adap",
    "hardware: {precision: None}": "hardware.precision is 'None', expected one of fp32, bf16",
    "prfl: {solver: unipd}": "did you mean 'unipc'?",
    "lora: {}": "lora.lora_rank is missing, expected a whole number",
    "lora: {lora_rank: 2, target_modules: []}": "target_modules is [], expected a list of one or m",
    "hardware: {patch: 1}": "hardware.patch is 1, expected true or false",
    "hardware: {device: ''}": "hardware.device is '', expected a string",
    "hardware: {gradient_checkpointing: true}": "unknown key 'hardware.gradient_checkpointing'",
    "memory: atuo": "memory is 'atuo', expected auto or a mapping with keys weight_dtype, activ",
    "memory:": "memory is empty, expected auto or a mapping",
    "memory: 24GiB": "memory is '24GiB', expected auto or a mapping",
    "memory: [full]": "memory is ['full'], expected auto or a mapping",
    "memory: auto": "hardware.precision is 'fp32', expected bf16 with memory: auto",
    "memory: {ofload: cpu}": "unknown key 'memory.ofload': did you mean 'offload'?",
    f"{CHECKPOINTING}ful}}": "checkpointing is 'ful', expected one of none, full, attention; did",
    f"{CHECKPOINTING}null}}": "checkpointing is empty, expected one of none, full, attention",
    f"{CHECKPOINTING}true}}": "checkpointing is true, expected one of none, full, attention",
    "memory: {offload: gpu}": "memory.offload is 'gpu', expected cpu or null",
    "memory: {offload: true}": "memory.offload is true, expected cpu or null",
    f"reward_{CHECKPOINTING}cpu}}": "reward_memory.activation_checkpointing is 'cpu', expected",
    "reward_memory: {offload: disk}": "reward_memory.offload is 'disk', expected cpu or null",
    "reward_memory: {optimizer: adamw8bit}": "unknown key 'reward_memory.optimizer'",
    f"{BF16}memory: auto\nreward_memory: {{weight_dtype: bf16}}": "memory is 'auto', expected a ma",
    "memory: {feed_forward_chunk: 0}": "feed_forward_chunk is 0, expected a whole number of at lea",
    "memory: {feed_forward_chunk: 1.5}": "feed_forward_chunk is 1.5, expected a whole number",
    "memory: {optimizer: adam}": "memory.optimizer is 'adam', expected one of adamw, adamw-sr",
    "memory: {gradient_dtype: bf16}": "gradient_dtype is 'bf16', expected one of parameter, fp32",
    "memory: {weight_dtype: int4}": "weight_dtype is 'int4', expected one of fp32, bf16, fp8, nf4",
    "memory: {weight_dtype: bf16}": "memory.weight_dtype is 'bf16', expected fp32 with hardware.pr",
    "reward_memory: {weight_dtype: nf4}": "reward_memory.weight_dtype is 'nf4', expected fp32 with",
    f"{BF16}memory: {{weight_dtype: nf4}}": "weight_dtype is 'nf4', expected fp32 or bf16 without",
    f"{BF16}memory: {{weight_dtype: bf16, optimizer: paged-adamw8bit}}": "trains fp32 weights only",
    "hardware: {fp8_linears: true}": "hardware.fp8_linears is true, expected false with precision",
    f"{FP8}{LORA}memory: {{weight_dtype: nf4}}": "fp8_linears is true, expected false with nf4 we",
    "model: twice": "key 'model' appears twice",
    "1: 2": "key 1 is not a string",
    "a: [": "not YAML",
    "? {a: b}\n: c": "not a string",
    f"a: {'[' * 1000}": "not YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_values_name_the_key(error_of, text):
    assert BAD[text] in error_of(f"{BASE}{text}\n")


NF4 = "memory: {weight_dtype: nf4}\n"
PARTS = "reward: {transformer: a, mlp: b, pool: c}"
BOMB = [("1", "x0")] + [(f"*x{i}", f"x{i + 1}") for i in range(60)]
BAD_FILES = [
    ("train", "", "holds empty, expected keys and values"),
    ("train", "- 1\n", "holds [1], expected keys and values"),
    ("train", "model: m\n", "data is missing, expected a string"),
    ("train", REWARD, "reward is missing, expected a reward model for"),
    ("train", REWARD + "reward: 3", "reward is 3, expected a string, a mapping"),
    ("train", REWARD + PARTS[:-9] + "}", "reward.pool is missing"),
    ("train", BASE.replace("{steps: 3}", "{}"), "run.steps is missing, expected a whole number"),
    ("train-reward", REWARD + "memory: auto\n", "is 'fp32', expected bf16 with memory: auto"),
    ("train-reward", REWARD + "memory: {reward_offload: cpu}\n", "did you mean 'offload'?"),
    ("train-reward", REWARD + BF16 + NF4, "weight_dtype is 'nf4', expected one of fp32, bf16"),
    ("train-reward", REWARD + NF4.replace("nf4", "bf16"), "precision: bf16"),
    ("score", SCORE.replace("s.csv", "s.txt"), "out is 's.txt', expected a name that ends in .j"),
    ("score", SCORE + "timesteps: [1001]\n", "timesteps[0] is 1001, expected a whole number of"),
    ("train-reward", REWARD + "hardware: {fp8_linears: true}\n", "set precision: bf16"),
    ("score", SCORE + FP8, "fp8_linears is true, expected false: scores are exact"),
    ("score", SCORE.replace("reward: r", PARTS), "model is missing"),
]


@pytest.mark.parametrize(("command", "text", "message"), BAD_FILES)
def test_bad_files(error_of, command, text, message):
    assert message in error_of(text, command)


def test_sft_alone_needs_no_reward(tmp_path):
    assert load(tmp_path, REWARD + "objectives: [sft]\n").reward is None


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: cannot be read: No such file"):
        load_config(TrainFile, tmp_path / "nowhere.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(TrainFile, tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 2001-99-99", "not YAML: month must be in 1..12"),
        (f"a: {'9' * 5000}", "not YAML: Exceeds the limit"),
        ("&a {model: *a}", "not YAML: found unconstructable recursive node"),
        ("".join(f"{b}: &{b} [{a}, {a}]\n" for a, b in BOMB), "holds over 10000 values"),
        (f"model: [{'x, ' * 5000}]", "…, expected a string"),
    ],
)
def test_values_that_python_cannot_take(error_of, text, message):
    error = error_of(text, "train")
    assert message in error and len(error) < 400


def test_mappings_build_without_a_file():
    assert parse_config(ScoreFile, {"reward": "r", "data": "d", "out": "o.csv"}).batch_size == 1


def keys_of(section):
    for name, field in section.model_fields.items():
        yield name
        for part in sections_in(field.annotation):
            yield from keys_of(part)


@pytest.mark.parametrize("command", ["train", "train-reward"])
def test_the_template_has_every_key_and_loads(tmp_path, command):
    kind, text = FILES[command], template(command)
    with pytest.raises(ConfigError, match="model is empty, expected a string"):
        load(tmp_path, text, kind)
    for key in ("model", "data", "out"):
        text = text.replace(f"\n{key}:\n", f"\n{key}: {key[0]}\n")
    text = text.replace("\n  steps:\n", "\n  steps: 3\n").replace("reward: null", "reward: r")
    expected = BASE if kind is TrainFile else REWARD
    assert load(tmp_path, text, kind) == load(tmp_path, expected, kind)
    for key in keys_of(kind):
        assert re.search(rf"^[# -]*{key}:", text, re.M), key


def test_the_reference_is_the_models():
    path = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
    assert path.read_text(encoding="utf-8") == reference_page(), (
        "write it anew: python -m prfl_fast.cli.reference > docs/configuration.md"
    )


def test_every_key_is_described():
    for line in reference_page().splitlines():
        assert not line.startswith("| `") or line.endswith(". |"), line


def test_a_run_from_before_a_key_goes_on_at_its_default(tmp_path):
    known = train._identity(load(tmp_path, BASE))
    assert not {f"rollout.{name}" for name in train._LATER} & known.keys()
    changed = train._identity(load(tmp_path, f"{BASE}rollout: {{sparse_attention: 0.5}}"))
    assert changed["rollout.sparse_attention"] == 0.5
