"""HY-Video-PRFL's checkpoint layout. Names are written out here, not taken from the library."""

import copy
import itertools
import json
import pickle

import pytest
import torch
from latent_reward import HEADS, build, doubled, edit_tensors, textbook_batch
from torch import nn
from wan import float_means_double, inputs, tiny_wan

from prfl_fast.rewards.latent import LatentRewardModel

safetensors = pytest.importorskip("safetensors.torch")

WEIGHTS = "diffusion_pytorch_model.safetensors"
# (diffusers, official Wan), of the model and below "blocks.<i>.".
EMBEDDINGS = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
}
BLOCK = {
    f"{ours}.{a}": f"{theirs}.{b}"
    for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for a, b in {
        "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o",
        "norm_q": "norm_q", "norm_k": "norm_k",
        "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
    }.items()
} | {"norm2": "norm3", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2"}  # fmt: skip


def official_state(transformer, blocks, head=True):
    """Return diffusers' Wan weights under the names of the official model."""
    names = EMBEDDINGS | ({"proj_out": "head.head"} if head else {})
    tables = {"scale_shift_table": "head.modulation"} if head else {}
    for i in range(blocks):
        names |= {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for ours, theirs in BLOCK.items()}
        tables[f"blocks.{i}.scale_shift_table"] = f"blocks.{i}.modulation"
    for ours, theirs in names.items():
        tables |= {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    state = transformer.state_dict()
    return {theirs: state[ours].clone() for ours, theirs in tables.items() if ours in state}


def reference_parts(dim=48, num_queries=1, seed=5):
    """Return state dicts of the reference's ``MLP`` and ``QueryAttention``."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return 0.2 * torch.randn(*shape, generator=generator)

    head, widths = {}, (dim, 1024, 512, 1)
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), 1):
        head[f"fc{i}.weight"] = randn(fan_out, fan_in) / fan_in**0.5
        head[f"fc{i}.bias"] = randn(fan_out)
    pool = {
        "queries": randn(num_queries, dim),
        "multihead_attn.in_proj_weight": randn(3 * dim, dim),
        "multihead_attn.in_proj_bias": randn(3 * dim),
        "multihead_attn.out_proj.weight": randn(dim, dim),
        "multihead_attn.out_proj.bias": randn(dim),
    }
    return head, pool


def write_index(transformer, text):
    (transformer / f"{WEIGHTS}.index.json").write_text(text)


def write_reference(
    folder, transformer, blocks, *, shards=1, head_in_backbone=False, num_queries=1, wrap=False
):
    (folder / "transformer").mkdir(parents=True)
    state = official_state(transformer, blocks, head_in_backbone)
    if shards == 1:
        safetensors.save_file(state, folder / "transformer" / WEIGHTS)
    else:
        weight_map = {}
        for i in range(shards):
            names = sorted(state)[i::shards]
            file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
            safetensors.save_file({n: state[n] for n in names}, folder / "transformer" / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        write_index(folder / "transformer", json.dumps(index))
    head, pool = reference_parts(num_queries=num_queries)
    torch.save({"state_dict": head} if wrap else head, folder / "mlp_step_100.ckpt")
    torch.save(pool, folder / "query_attention_step_100.ckpt")
    files = ("transformer", "mlp_step_100.ckpt", "query_attention_step_100.ckpt")
    return tuple(folder / name for name in files)


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "case, layout",
    [
        ("t2v", {}),
        ("t2v", {"shards": 3, "wrap": True}),
        ("t2v", {"head_in_backbone": True, "num_queries": 2}),
        ("i2v", {}),
    ],
    ids=["plain", "sharded-wrapped", "with-head", "i2v"],
)
def test_reads_the_reference_layout(tmp_path, case, layout):
    trained = tiny_wan(case, layers=2, seed=7)
    paths = write_reference(tmp_path, trained, 2, **layout)
    generator = tiny_wan(case, layers=3, seed=8)
    before = copy.deepcopy(generator.state_dict())
    reward = LatentRewardModel.load_reference(
        generator, *paths, num_heads=HEADS, return_type="query"
    )
    assert reward.num_blocks == 2
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    head, pool = reference_parts(num_queries=layout.get("num_queries", 1))
    x, timestep, conditions = doubled(*inputs(case))
    with torch.no_grad(), float_means_double():
        score = reward.double()(x, timestep, conditions)
        pool, head = ({k: v.double() for k, v in part.items()} for part in (pool, head))
        expected = textbook_batch(trained.double(), pool, head, x, timestep, conditions, 2)
    assert (score - expected).abs().max() <= 1e-12


def test_reads_the_first_blocks_of_a_whole_model_and_safetensors_parts(tmp_path):
    trained = tiny_wan(layers=3, seed=7)
    transformer, _, _ = write_reference(tmp_path, trained, 3, head_in_backbone=True)
    head, pool = reference_parts()
    safetensors.save_file(head, tmp_path / "mlp.safetensors")
    safetensors.save_file(pool, tmp_path / "pool.safetensors")
    paths = (transformer, tmp_path / "mlp.safetensors", tmp_path / "pool.safetensors")
    narrow = tiny_wan(layers=3).to(torch.bfloat16)
    reward = LatentRewardModel.load_reference(
        narrow, *paths, num_blocks=1, num_heads=HEADS, return_type="query"
    )
    assert reward.num_blocks == 1
    assert {p.dtype for p in reward.backbone.parameters()} == {torch.bfloat16}
    assert torch.equal(reward.pool.queries, pool["queries"])
    expected = trained.blocks[0].attn1.to_q.weight.bfloat16()
    assert torch.equal(reward.backbone.blocks[0].attn1.to_q.weight, expected)


@pytest.mark.cases(1)
@pytest.mark.parametrize("shard_bytes, shards", [(5 * 1024**3, 1), (100_000, 4)])
@pytest.mark.parametrize("case", ["t2v", "i2v"])
def test_writes_the_reference_layout(tmp_path, case, shard_bytes, shards):
    reward, generator = build(case)
    checkpoint, mlp, pool = reward.save_reference(tmp_path, 120, shard_bytes=shard_bytes)
    # The reference finds the step of a run to resume in these names.
    assert int(str(checkpoint).split("-")[-1].split(".")[0]) == 120
    assert int(str(mlp).split("_")[-1].split(".")[0]) == 120
    files = sorted(checkpoint.glob("*.safetensors"))
    assert (len(files) > 1) == (shards > 1)
    state = {}
    for file in files:
        state.update(safetensors.load_file(file))
    expected = official_state(generator, 2, head=False)
    assert state.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in state.items())
    if shards > 1:
        index = json.loads((checkpoint / f"{WEIGHTS}.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
        assert {checkpoint / f for f in index["weight_map"].values()} == set(files)
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["num_layers"] == 2 and config["dim"] == 48 and config["model_type"] == case
    head_names = [f"fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    assert list(torch.load(mlp, weights_only=True)) == head_names
    attention = nn.MultiheadAttention(48, HEADS, batch_first=True)
    expected_names = {"queries"} | {f"multihead_attn.{k}" for k in attention.state_dict()}
    assert torch.load(pool, weights_only=True).keys() == expected_names

    again = LatentRewardModel.load_reference(generator, checkpoint, mlp, pool, num_heads=HEADS)
    assert torch.equal(again.logits(*inputs(case)), reward.logits(*inputs(case)))
    # Saving again with another shard size leaves no stale shard, which the reference would read.
    reward.save_reference(tmp_path, 120)
    assert len(list(checkpoint.glob("*.safetensors"))) == 1


class Exploit:
    def __reduce__(self):
        return (print, ("unpickled",))


def edit_weights(change):
    return lambda t, *_: edit_tensors(t / WEIGHTS, change)


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


POOL = reference_parts()[1]
CODE = pickle.dumps({"fc1.weight": Exploit()})
BIAS = "patch_embedding.bias"
UNREADABLE = "mlp_step_100.ckpt: cannot be read"
# Each changes the files of (transformer folder, mlp, pool); the message that load_reference gives.
DAMAGES = {
    "no-folder": (lambda t, m, p: t.rename(t.parent / "gone"), "transformer: no such folder"),
    "no-files": (lambda t, m, p: (t / WEIGHTS).unlink(), "no .safetensors file in it"),
    "truncated-weights": (lambda t, m, p: truncate(t / WEIGHTS, -7), "not a whole safetensors"),
    "missing-tensor": (
        edit_weights(lambda t: t.pop("blocks.1.self_attn.q.weight")),
        r"1 missing \(blocks.1.attn1.to_q.weight \[48, 48\]\)",
    ),
    "unexpected-tensor": (
        edit_weights(lambda t: t.update({"blocks.0.surprise": torch.zeros(2)})),
        r"1 unexpected \(blocks.0.surprise \[2\]\)",
    ),
    "other-width": (
        edit_weights(lambda t: t.update({"blocks.0.ffn.0.weight": torch.zeros(3, 48)})),
        r"ffn.net.0.proj.weight \[3, 48\], expected \[144, 48\]",
    ),
    "duplicate": (
        lambda t, m, p: safetensors.save_file({BIAS: torch.zeros(48)}, t / "extra.safetensors"),
        "patch_embedding.bias is in .* and in ",
    ),
    "missing-shard": (
        lambda t, m, p: write_index(t, json.dumps({"weight_map": {BIAS: "part-1.safetensors"}})),
        "part-1.safetensors: no such file, but the index names it",
    ),
    "bad-index": (lambda t, m, p: write_index(t, '{"weight_map": 3}'), "not an index of safet"),
    "no-mlp": (lambda t, m, p: m.unlink(), "mlp_step_100.ckpt: no such file"),
    "truncated-mlp": (lambda t, m, p: truncate(m, 1000), UNREADABLE),
    "mlp-not-a-state-dict": (lambda t, m, p: torch.save([1, 2], m), "holds list, expected a state"),
    "code-in-mlp": (lambda t, m, p: m.write_bytes(CODE), UNREADABLE),
    "mlp-of-another-width": (
        lambda t, m, p: torch.save(reference_parts(dim=24)[0], m),
        r"fc1.weight \[1024, 24\], expected \[1024, 48\]",
    ),
    "pool-with-text-projection": (
        lambda t, m, p: torch.save(POOL | {"text_proj.weight": torch.ones(48, 768)}, p),
        r"1 unexpected \(text_proj.weight \[48, 768\]\)",
    ),
    "files-swapped": (
        lambda t, m, p: (m.rename(t / "x"), p.rename(m), (t / "x").rename(p)),
        "mlp_step_100.ckpt|query_attention_step_100.ckpt",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_refuses_a_damaged_reference_checkpoint(tmp_path, capsys, kind):
    generator = tiny_wan(layers=2)
    paths = write_reference(tmp_path, generator, 2)
    damage, message = DAMAGES[kind]
    damage(*paths)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LatentRewardModel.load_reference(generator, *paths, num_heads=HEADS, return_type="query")
    assert "unpickled" not in capsys.readouterr().out


def test_reference_checkpoint_with_more_blocks_than_the_generator(tmp_path):
    paths = write_reference(tmp_path, tiny_wan(layers=3), 3)
    given = {"num_heads": HEADS, "return_type": "query"}
    with pytest.raises(ValueError, match="num_blocks is 3, expected 1 to 2"):
        LatentRewardModel.load_reference(tiny_wan(layers=2), *paths, **given)
    with pytest.raises(ValueError, match="missing"):
        LatentRewardModel.load_reference(tiny_wan(layers=5), *paths, num_blocks=4, **given)


def test_the_return_type_is_read_or_asked_for(tmp_path):
    generator = tiny_wan(layers=2)
    paths = write_reference(tmp_path / "theirs", generator, 2)
    load = LatentRewardModel.load_reference
    for given in (None, "mean"):
        with pytest.raises(ValueError, match=r"return_type is .*, expected 'query' or 'attention'"):
            load(generator, *paths, num_heads=HEADS, return_type=given)
    pooled = {}
    for kind in ("query", "attention"):
        reward = load(generator, *paths, num_heads=HEADS, return_type=kind)
        pooled[kind] = reward.pool(torch.ones(2, 3, 48))
        written = reward.save_reference(tmp_path / kind)
        reward.save(tmp_path / f"{kind}-ours")
        for again in (
            load(generator, *written, num_heads=HEADS),
            LatentRewardModel.load(tmp_path / f"{kind}-ours"),
        ):
            assert torch.equal(again.pool(torch.ones(2, 3, 48)), pooled[kind])
    difference = pooled["query"] - pooled["attention"]
    torch.testing.assert_close(difference, reward.pool.queries.mean(0).expand(2, -1))
