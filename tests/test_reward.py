"""LatentRewardModel against a textbook reward model, its files, and its refusals."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from wan import float_means_double, inputs, tiny_wan

import prfl_fast.reward as reward_module
from prfl_fast.patching import patch
from prfl_fast.reward import LatentRewardModel

HEADS = 4


def build(case="t2v", *, num_blocks=2, layers=3, num_queries=1, seed=0):
    """A tiny reward model whose biases are large enough to matter, and its generator."""
    transformer = tiny_wan(case, layers=layers, seed=seed)
    reward = LatentRewardModel.from_backbone(transformer, num_blocks, HEADS, num_queries)
    with torch.no_grad():
        for parameter in [*reward.pool.parameters(), *reward.head.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return reward, transformer


def textbook(transformer, pool, head, x, timestep, conditions, num_blocks):
    """The reference's reward model for one sample: diffusers' blocks, ``nn.MultiheadAttention``."""
    assert x.shape[0] == 1
    if "latent_condition" in conditions:
        x = torch.cat([x, conditions["latent_condition"]], dim=1)
    _, time, text, image = transformer.condition_embedder(
        timestep, conditions["encoder_hidden_states"], conditions.get("encoder_hidden_states_image")
    )
    context = text if image is None else torch.cat([image, text], dim=1)
    rotary = transformer.rope(x)
    h = transformer.patch_embedding(x).flatten(2).transpose(1, 2)
    for block in transformer.blocks[:num_blocks]:
        h = block(h, context, time.unflatten(1, (6, -1)), rotary)
    attention = nn.MultiheadAttention(h.shape[-1], HEADS, batch_first=True).to(h.dtype)
    weights = {k.removeprefix("multihead_attn."): v for k, v in pool.items() if k != "queries"}
    attention.load_state_dict(weights)
    queries = pool["queries"].unsqueeze(0)
    pooled = (attention(queries, h, h, need_weights=False)[0] + queries).mean(1)
    for layer in ("fc1", "fc2"):
        pooled = torch.relu(pooled @ head[f"{layer}.weight"].T + head[f"{layer}.bias"])
    return torch.sigmoid(pooled @ head["fc3.weight"].T + head["fc3.bias"])[:, 0]


def textbook_batch(transformer, pool, head, x, timestep, conditions, num_blocks):
    rows = [
        textbook(
            transformer,
            pool,
            head,
            x[i : i + 1],
            timestep[i : i + 1],
            {k: v[i : i + 1] for k, v in conditions.items()},
            num_blocks,
        )
        for i in range(x.shape[0])
    ]
    return torch.cat(rows)


def doubled(x, timestep, conditions):
    return x.double(), timestep.double(), {k: v.double() for k, v in conditions.items()}


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("case", ["t2v", "i2v"])
@pytest.mark.parametrize("batch, num_queries", [(1, 1), (3, 1), (2, 3)])
def test_score_and_latent_gradient_equal_the_textbook_in_float64(case, batch, num_queries, patched):
    reward, transformer = build(case, num_queries=num_queries)
    if patched:
        patch(reward.backbone)
    reward.double().freeze()
    transformer.double()
    x, timestep, conditions = doubled(*inputs(case, batch=batch))
    x.requires_grad_()
    with float_means_double():
        score = reward(x, timestep, conditions)
        (gradient,) = torch.autograd.grad(score.sum(), x)
        pool, head = reward.pool.state_dict(), reward.head.state_dict()
        expected = textbook_batch(transformer, pool, head, x, timestep, conditions, 2)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    assert score.shape == (batch,) and ((score > 0) & (score < 1)).all()
    # The patched backbone's rotary table is float32 of its own rounding.
    assert (score - expected).abs().max() <= (1e-9 if patched else 1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


def test_scores_of_a_batch_are_those_of_its_samples():
    reward, _ = build()
    x, timestep, conditions = inputs(batch=3)
    together = reward.logits(x, timestep, conditions)
    for i in range(3):
        alone = reward.logits(
            x[i : i + 1], timestep[i], {k: v[i : i + 1] for k, v in conditions.items()}
        )
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=1e-5)
    assert len(set(together.tolist())) == 3


def test_from_backbone_copies_and_leaves_the_generator_alone():
    transformer = tiny_wan(layers=3)
    transformer.blocks[1].requires_grad_(False)
    before = {k: v.clone() for k, v in transformer.state_dict().items()}
    config, flags = dict(transformer.config), [p.requires_grad for p in transformer.parameters()]
    reward = LatentRewardModel.from_backbone(transformer, 2, HEADS)
    own = {p.data_ptr() for p in transformer.parameters()}
    assert not own & {p.data_ptr() for p in reward.parameters()}
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in transformer.state_dict().items())
    assert dict(transformer.config) == config and len(transformer.blocks) == 3
    assert flags == [p.requires_grad for p in transformer.parameters()]
    assert reward.num_blocks == 2 and not any("proj_out" in n for n, _ in reward.named_parameters())


def test_a_patched_generator_gives_a_patched_reward():
    transformer = patch(tiny_wan(layers=2))
    reward = LatentRewardModel.from_backbone(transformer, 2, HEADS)
    forwards = [block.forward for block in reward.backbone.blocks]
    assert all(
        f.__self__ is block for f, block in zip(forwards, reward.backbone.blocks, strict=True)
    )
    plain, _ = build(layers=2)
    plain.load_state_dict(reward.state_dict())
    arguments = inputs()
    torch.testing.assert_close(
        reward.logits(*arguments), plain.logits(*arguments), rtol=1e-4, atol=1e-5
    )


def test_embeddings_are_frozen_and_the_rest_trains():
    transformer = tiny_wan("i2v").requires_grad_(False)
    reward = LatentRewardModel.from_backbone(transformer, 2, HEADS)
    frozen = {n for n, p in reward.named_parameters() if not p.requires_grad}
    assert frozen and all(
        n.startswith(("backbone.patch_embedding.", "backbone.condition_embedder.")) for n in frozen
    )
    assert any("image_embedder" in n for n in frozen)
    trained = {n for n, p in reward.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"backbone", "pool", "head"}
    assert all(n.startswith("backbone.blocks.") for n in trained if n.startswith("backbone."))
    assert len(reward.trainable_parameters()) == len(trained)
    reward.logits(*inputs("i2v")).sum().backward()
    without = [n for n, p in reward.named_parameters() if p.grad is None]
    assert set(without) == frozen


def test_backward_of_a_frozen_reward_gives_the_latent_gradient_only():
    reward, _ = build()
    assert reward.freeze() is reward and not reward.training and reward.trainable_parameters() == []
    x, timestep, conditions = inputs()
    reward(x.requires_grad_(), timestep, conditions).sum().backward()
    assert x.grad is not None and x.grad.abs().min() >= 0 and x.grad.abs().max() > 0
    assert all(p.grad is None for p in reward.parameters())


def test_a_frozen_reward_saves_less_for_backward():
    """Inputs of linear layers are needed for weight gradients alone."""
    reward, _ = build()
    x, timestep, conditions = inputs()

    def saved_bytes():
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            score = reward(x.clone().requires_grad_(), timestep, conditions)
        parameters = {p.untyped_storage().data_ptr() for p in reward.parameters()}
        held = sum(size for address, size in sizes.items() if address not in parameters)
        return held, score

    trained, score = saved_bytes()
    del score
    reward.freeze()
    frozen, score = saved_bytes()
    assert frozen < trained


def test_pool_and_head_stay_wide_when_the_model_is_narrowed():
    transformer = tiny_wan(layers=2).to(torch.bfloat16)
    reward = LatentRewardModel.from_backbone(transformer, 2, HEADS)
    assert {p.dtype for p in reward.backbone.parameters()} == {torch.bfloat16}
    head = {k: v.clone() for k, v in reward.head.state_dict().items()}
    for narrow in (reward.to(torch.bfloat16), reward.half(), reward.bfloat16()):
        assert {p.dtype for p in [*narrow.pool.parameters(), *narrow.head.parameters()]} == {
            torch.float32
        }
        assert all(torch.equal(v, head[k]) for k, v in narrow.head.state_dict().items())
    assert {p.dtype for p in reward.double().parameters()} == {torch.float64}
    reward.float().to(torch.bfloat16)
    x, timestep, conditions = inputs()
    x = x.to(torch.bfloat16).requires_grad_()
    score = reward(x, timestep, conditions)
    assert score.dtype == torch.float32
    score.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and torch.isfinite(x.grad).all()


def test_pool_and_head_stay_wide_under_autocast():
    reward, _ = build()
    arguments = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logits = reward.logits(*arguments)
        features = reward._adapter.features(reward.backbone, *arguments, 2)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, reward.head(reward.pool(features)))


def test_pool_and_head_of_a_narrow_checkpoint_are_widened():
    reward, _ = build()
    again = LatentRewardModel(reward.backbone, reward.pool.bfloat16(), reward.head.bfloat16())
    assert {p.dtype for p in [*again.pool.parameters(), *again.head.parameters()]} == {
        torch.float32
    }


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["t2v", "i2v"])
def test_save_and_load_give_the_same_bits(tmp_path, case, dtype):
    reward, _ = build(case, num_queries=2)
    patch(reward.to(dtype).backbone)
    folder = tmp_path / "a" / "reward"
    reward.save(folder)
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert config["num_blocks"] == 2 and config["num_heads"] == HEADS and config["num_queries"] == 2
    loaded = LatentRewardModel.load(folder)
    patch(loaded.backbone)
    before, after = reward.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())
    assert torch.equal(loaded.logits(*inputs(case)), reward.logits(*inputs(case)))
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in reward.parameters()
    ]


def test_a_second_save_replaces_the_first(tmp_path):
    first, _ = build(num_blocks=1)
    second, _ = build(num_blocks=2, seed=1)
    first.save(tmp_path / "reward")
    second.save(str(tmp_path / "reward"))
    loaded = LatentRewardModel.load(str(tmp_path / "reward"))
    assert torch.equal(loaded.logits(*inputs()), second.logits(*inputs()))
    assert [p.name for p in tmp_path.iterdir()] == ["reward"]


def test_a_failed_save_leaves_the_earlier_files(tmp_path, monkeypatch):
    first, _ = build()
    first.save(tmp_path / "reward")

    def fail(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    second, _ = build(seed=1)
    monkeypatch.setattr(reward_module, "save_tensors", fail)
    with pytest.raises(OSError, match="no space left"):
        second.save(tmp_path / "reward")
    with pytest.raises(OSError, match="no space left"):
        second.save(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["reward"]
    loaded = LatentRewardModel.load(tmp_path / "reward")
    assert torch.equal(loaded.logits(*inputs()), first.logits(*inputs()))


def test_saving_never_removes_what_is_not_a_reward_model(tmp_path):
    reward, _ = build()
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds precious.txt.*choose a new folder"):
        reward.save(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        reward.save(tmp_path / "precious.txt")
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.md"):
        reward.save_reference(tmp_path, 3)
    assert (
        (tmp_path / "precious.txt").read_text() == (checkpoint / "notes.md").read_text() == "mine"
    )


def test_a_backbone_with_adapters_is_refused_by_save(tmp_path):
    peft = pytest.importorskip("peft")
    reward, _ = build()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), reward.backbone)
    with pytest.raises(ValueError, match="cannot be saved.*unexpected.*lora_A"):
        reward.save(tmp_path / "reward")
    assert not (tmp_path / "reward").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved reward model, to be copied by tests that damage it."""
    folder = tmp_path_factory.mktemp("saved") / "reward"
    build()[0].save(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    folder = tmp_path / "reward"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_load_of_something_missing(damaged, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a saved reward model"):
        LatentRewardModel.load(tmp_path / "nowhere")
    (damaged / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        LatentRewardModel.load(damaged)


@pytest.mark.parametrize(
    "keep", [0, 5, 400, -1], ids=["empty", "no-header", "no-data", "one-byte-short"]
)
def test_load_of_a_truncated_file(damaged, keep):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        LatentRewardModel.load(damaged)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "prfl_fast reward 9"}, "format is 'prfl_fast reward 9'"),
        ({"format": None}, "'format' is missing"),
        ({"class": "SomeOtherTransformer"}, "adapter is 'SomeOtherTransformer'"),
        ({"num_blocks": 5}, "num_blocks is 5, the backbone has 2"),
        ({"num_heads": 7}, "num_heads is 7"),
        ({"num_queries": None}, "'num_queries' is missing"),
        ({"backbone": {"no_such_key": 1}}, "no_such_key"),
    ],
)
def test_load_of_a_wrong_configuration(damaged, changes, message):
    edit_config(damaged, **changes)
    with pytest.raises(
        ValueError, match=f"config.json: not the configuration of a reward model: .*{message}"
    ):
        LatentRewardModel.load(damaged)


def test_load_of_a_configuration_that_is_not_json(damaged):
    (damaged / "config.json").write_text('{"format": ')
    with pytest.raises(ValueError, match=r"config\.json: not the configuration of a reward model"):
        LatentRewardModel.load(damaged)


def test_load_names_what_does_not_fit(damaged):
    def change(tensors):
        tensors["head.fc4.weight"] = torch.zeros(1, 2)
        tensors["pool.queries"] = torch.zeros(1, 40)
        for name in [n for n in tensors if "ffn" in n]:
            del tensors[name]

    edit_tensors(damaged / "model.safetensors", change)
    with pytest.raises(ValueError) as caught:
        LatentRewardModel.load(damaged)
    message = str(caught.value)
    assert "8 missing (backbone.blocks.0.ffn.net.0.proj" in message and "; …)" in message
    assert "1 unexpected (head.fc4.weight [1, 2])" in message
    assert "1 of another shape (pool.queries [1, 40], expected [1, 48])" in message


# The reference's layout. The names below are written out here, not taken from the library.


def official_state(transformer, blocks, head=True):
    """diffusers' Wan weights under the names of the official model."""
    state = transformer.state_dict()
    out = {}

    def linear(ours, theirs):
        for kind in ("weight", "bias"):
            out[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"].clone()

    linear("patch_embedding", "patch_embedding")
    embedder = "condition_embedder"
    linear(f"{embedder}.text_embedder.linear_1", "text_embedding.0")
    linear(f"{embedder}.text_embedder.linear_2", "text_embedding.2")
    linear(f"{embedder}.time_embedder.linear_1", "time_embedding.0")
    linear(f"{embedder}.time_embedder.linear_2", "time_embedding.2")
    linear(f"{embedder}.time_proj", "time_projection.1")
    i2v = f"{embedder}.image_embedder.norm1.weight" in state
    if i2v:
        linear(f"{embedder}.image_embedder.norm1", "img_emb.proj.0")
        linear(f"{embedder}.image_embedder.ff.net.0.proj", "img_emb.proj.1")
        linear(f"{embedder}.image_embedder.ff.net.2", "img_emb.proj.3")
        linear(f"{embedder}.image_embedder.norm2", "img_emb.proj.4")
    for i in range(blocks):
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for a, b in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                linear(f"blocks.{i}.{ours}.{a}", f"blocks.{i}.{theirs}.{b}")
            for norm in ("norm_q", "norm_k"):
                out[f"blocks.{i}.{theirs}.{norm}.weight"] = state[
                    f"blocks.{i}.{ours}.{norm}.weight"
                ].clone()
        if i2v:
            linear(f"blocks.{i}.attn2.add_k_proj", f"blocks.{i}.cross_attn.k_img")
            linear(f"blocks.{i}.attn2.add_v_proj", f"blocks.{i}.cross_attn.v_img")
            norm = state[f"blocks.{i}.attn2.norm_added_k.weight"]
            out[f"blocks.{i}.cross_attn.norm_k_img.weight"] = norm.clone()
        linear(f"blocks.{i}.norm2", f"blocks.{i}.norm3")
        linear(f"blocks.{i}.ffn.net.0.proj", f"blocks.{i}.ffn.0")
        linear(f"blocks.{i}.ffn.net.2", f"blocks.{i}.ffn.2")
        out[f"blocks.{i}.modulation"] = state[f"blocks.{i}.scale_shift_table"].clone()
    if head:
        linear("proj_out", "head.head")
        out["head.modulation"] = state["scale_shift_table"].clone()
    return out


def reference_parts(dim=48, num_queries=1, seed=5):
    """State dicts as the reference's ``MLP`` and ``QueryAttention`` have them."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return 0.2 * torch.randn(*shape, generator=generator)

    head = {}
    for name, (fan_in, fan_out) in {
        "fc1": (dim, 1024),
        "fc2": (1024, 512),
        "fc3": (512, 1),
    }.items():
        head |= {
            f"{name}.weight": randn(fan_out, fan_in) / fan_in**0.5,
            f"{name}.bias": randn(fan_out),
        }
    pool = {
        "queries": randn(num_queries, dim),
        "multihead_attn.in_proj_weight": randn(3 * dim, dim),
        "multihead_attn.in_proj_bias": randn(3 * dim),
        "multihead_attn.out_proj.weight": randn(dim, dim),
        "multihead_attn.out_proj.bias": randn(dim),
    }
    return head, pool


def write_reference(
    folder, transformer, blocks, *, shards=1, head_in_backbone=False, num_queries=1, wrap=False
):
    (folder / "transformer").mkdir(parents=True)
    state = official_state(transformer, blocks, head_in_backbone)
    if shards == 1:
        save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    else:
        names = sorted(state)
        weight_map = {}
        for i in range(shards):
            file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
            save_file({n: state[n] for n in names[i::shards]}, folder / "transformer" / file)
            weight_map |= dict.fromkeys(names[i::shards], file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps(index)
        )
    head, pool = reference_parts(num_queries=num_queries)
    torch.save({"state_dict": head} if wrap else head, folder / "mlp_step_100.ckpt")
    torch.save(pool, folder / "query_attention_step_100.ckpt")
    return (
        folder / "transformer",
        folder / "mlp_step_100.ckpt",
        folder / "query_attention_step_100.ckpt",
    )


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
    reward = LatentRewardModel.load_reference(generator, *paths, num_heads=HEADS)
    assert reward.num_blocks == 2
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    head, pool = reference_parts(num_queries=layout.get("num_queries", 1))
    x, timestep, conditions = doubled(*inputs(case))
    with torch.no_grad(), float_means_double():
        score = reward.double()(x, timestep, conditions)
        pool = {k: v.double() for k, v in pool.items()}
        head = {k: v.double() for k, v in head.items()}
        expected = textbook_batch(trained.double(), pool, head, x, timestep, conditions, 2)
    assert (score - expected).abs().max() <= 1e-12


def test_reads_the_first_blocks_of_a_whole_model_and_safetensors_parts(tmp_path):
    trained = tiny_wan(layers=3, seed=7)
    transformer, _, _ = write_reference(tmp_path, trained, 3, head_in_backbone=True)
    head, pool = reference_parts()
    save_file(head, tmp_path / "mlp.safetensors")
    save_file(pool, tmp_path / "pool.safetensors")
    reward = LatentRewardModel.load_reference(
        tiny_wan(layers=3).to(torch.bfloat16),
        transformer,
        tmp_path / "mlp.safetensors",
        tmp_path / "pool.safetensors",
        num_blocks=1,
        num_heads=HEADS,
    )
    assert reward.num_blocks == 1
    assert {p.dtype for p in reward.backbone.parameters()} == {torch.bfloat16}
    assert torch.equal(reward.pool.queries, pool["queries"])
    expected = trained.blocks[0].attn1.to_q.weight.bfloat16()
    assert torch.equal(reward.backbone.blocks[0].attn1.to_q.weight, expected)


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
        state.update(load_file(file))
    expected = official_state(generator, 2, head=False)
    assert state.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in state.items())
    if shards > 1:
        index = json.loads(
            (checkpoint / "diffusion_pytorch_model.safetensors.index.json").read_text()
        )
        assert index["weight_map"].keys() == expected.keys()
        assert {checkpoint / f for f in index["weight_map"].values()} == set(files)
        assert index["metadata"]["total_size"] == sum(v.nbytes for v in expected.values())
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["num_layers"] == 2 and config["dim"] == 48 and config["model_type"] == case
    head_names = [f"fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    assert list(torch.load(mlp, weights_only=True)) == head_names
    attention = nn.MultiheadAttention(48, HEADS, batch_first=True)
    pool_state = torch.load(pool, weights_only=True)
    expected_names = {"queries"} | {f"multihead_attn.{k}" for k in attention.state_dict()}
    assert pool_state.keys() == expected_names

    again = LatentRewardModel.load_reference(generator, checkpoint, mlp, pool, num_heads=HEADS)
    assert torch.equal(again.logits(*inputs(case)), reward.logits(*inputs(case)))
    # Saving again with another shard size leaves no stale shard, which the reference would read.
    reward.save_reference(tmp_path, 120)
    assert len(list(checkpoint.glob("*.safetensors"))) == 1


class Exploit:
    def __reduce__(self):
        return (print, ("unpickled",))


def damage_reference(paths, kind):
    transformer, mlp, pool = paths
    weights = transformer / "diffusion_pytorch_model.safetensors"
    if kind == "no-folder":
        return transformer.parent / "nowhere", mlp, pool
    if kind == "no-files":
        weights.unlink()
    elif kind == "truncated-weights":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif kind == "missing-tensor":
        edit_tensors(weights, lambda t: t.pop("blocks.1.self_attn.q.weight"))
    elif kind == "unexpected-tensor":
        edit_tensors(weights, lambda t: t.update({"blocks.0.surprise": torch.zeros(2)}))
    elif kind == "other-width":
        edit_tensors(weights, lambda t: t.update({"blocks.0.ffn.0.weight": torch.zeros(3, 48)}))
    elif kind == "duplicate":
        save_file({"patch_embedding.bias": torch.zeros(48)}, transformer / "extra.safetensors")
    elif kind == "missing-shard":
        index = {"weight_map": {"patch_embedding.bias": "part-1.safetensors"}}
        (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps(index)
        )
    elif kind == "bad-index":
        (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(
            '{"weight_map": 3}'
        )
    elif kind == "no-mlp":
        mlp.unlink()
    elif kind == "truncated-mlp":
        mlp.write_bytes(mlp.read_bytes()[:1000])
    elif kind == "mlp-not-a-state-dict":
        torch.save([1, 2], mlp)
    elif kind == "code-in-mlp":
        mlp.write_bytes(pickle.dumps({"fc1.weight": Exploit()}))
    elif kind == "mlp-of-another-width":
        torch.save(reference_parts(dim=24)[0], mlp)
    elif kind == "pool-with-text-projection":
        torch.save(reference_parts()[1] | {"text_proj.weight": torch.zeros(48, 768)}, pool)
    elif kind == "files-swapped":
        return transformer, pool, mlp
    return paths


@pytest.mark.parametrize(
    "kind, message",
    [
        ("no-folder", "nowhere: no such folder"),
        ("no-files", "holds no .safetensors file"),
        ("truncated-weights", "not a whole safetensors file"),
        ("missing-tensor", r"1 missing \(blocks.1.attn1.to_q.weight \[48, 48\]\)"),
        ("unexpected-tensor", r"1 unexpected \(blocks.0.surprise \[2\]\)"),
        ("other-width", r"ffn.net.0.proj.weight \[3, 48\], expected \[144, 48\]"),
        ("duplicate", "patch_embedding.bias is both in"),
        ("missing-shard", "part-1.safetensors: no such file, but the index names it"),
        ("bad-index", "not an index of safetensors files"),
        ("no-mlp", "mlp_step_100.ckpt: no such file"),
        ("truncated-mlp", "mlp_step_100.ckpt: cannot be read as a state dict"),
        ("mlp-not-a-state-dict", "holds list, expected a state dict of tensors"),
        ("code-in-mlp", "mlp_step_100.ckpt: cannot be read as a state dict"),
        ("mlp-of-another-width", r"fc1.weight \[1024, 24\], expected \[1024, 48\]"),
        ("pool-with-text-projection", r"1 unexpected \(text_proj.weight \[48, 768\]\)"),
        ("files-swapped", "mlp_step_100.ckpt|query_attention_step_100.ckpt"),
    ],
)
def test_refuses_a_damaged_reference_checkpoint(tmp_path, capsys, kind, message):
    generator = tiny_wan(layers=2)
    paths = damage_reference(write_reference(tmp_path, generator, 2), kind)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        LatentRewardModel.load_reference(generator, *paths, num_heads=HEADS)
    assert "unpickled" not in capsys.readouterr().out


def test_reference_checkpoint_with_more_blocks_than_the_generator(tmp_path):
    paths = write_reference(tmp_path, tiny_wan(layers=3), 3)
    with pytest.raises(ValueError, match="num_blocks is 3, expected 1 to 2"):
        LatentRewardModel.load_reference(tiny_wan(layers=2), *paths, num_heads=HEADS)
    with pytest.raises(ValueError, match="missing"):
        LatentRewardModel.load_reference(tiny_wan(layers=5), *paths, num_blocks=4, num_heads=HEADS)


# Refusals


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_blocks": 3}, "num_blocks is 3, expected 1 to 2"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": 1, "num_heads": 7}, "num_heads is 7, expected a divisor"),
        ({"num_blocks": 1, "num_heads": 0}, "num_heads is 0"),
        ({"num_blocks": 1, "num_queries": 0}, "num_queries is 0"),
    ],
)
def test_from_backbone_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LatentRewardModel.from_backbone(tiny_wan(layers=2), **arguments)


def test_unknown_models_and_widths_are_refused():
    with pytest.raises(TypeError, match="supported"):
        LatentRewardModel.from_backbone(nn.Linear(2, 2))
    reward, _ = build()
    narrow = LatentRewardModel.from_backbone(tiny_wan(heads=1), 1, HEADS)
    with pytest.raises(
        ValueError, match="pool is made for 24 channels, expected the backbone's 48"
    ):
        LatentRewardModel(reward.backbone, narrow.pool, reward.head)
    with pytest.raises(
        ValueError, match="head is made for 24 channels, expected the backbone's 48"
    ):
        LatentRewardModel(reward.backbone, reward.pool, narrow.head)


def bad_call(kind):
    x, timestep, conditions = inputs()
    text = conditions["encoder_hidden_states"]
    nan = x.clone()
    nan[1, 3, 0, 2, 2] = float("nan")
    calls = {
        "not-a-tensor": (x.tolist(), timestep, conditions),
        "one-sample": (x[0], timestep, conditions),
        "channels": (x[:, :12], timestep, conditions),
        "integers": (x.long(), timestep, conditions),
        "odd-height": (x[:, :, :, :3], timestep, conditions),
        "odd-width": (x[..., :5], timestep, conditions),
        "nan": (nan, timestep, conditions),
        "infinite": (x / 0.0, timestep, conditions),
        "timestep-batch": (x, timestep[:1].repeat(3), conditions),
        "timestep-shape": (x, timestep[:, None], conditions),
        "timestep-number": (x, 500, conditions),
        "timestep-high": (x, timestep + 1000, conditions),
        "timestep-negative": (x, -timestep - 1, conditions),
        "timestep-nan": (x, timestep * float("nan"), conditions),
        "no-text": (x, timestep, {}),
        "unknown-condition": (x, timestep, conditions | {"prompt": text}),
        "text-batch": (x, timestep, {"encoder_hidden_states": text[:1]}),
        "text-width": (x, timestep, {"encoder_hidden_states": text[..., :3]}),
        "text-rank": (x, timestep, {"encoder_hidden_states": text[:, 0]}),
        "text-string": (x, timestep, {"encoder_hidden_states": "a cat"}),
        "text-tokens": (x, timestep, {"encoder_hidden_states": text.long()}),
        "conditions-list": (x, timestep, [conditions]),
        "image": (x, timestep, conditions | {"encoder_hidden_states_image": text}),
        "long": (x[:, :, :1].expand(-1, -1, 65, -1, -1), timestep, conditions),
    }
    return calls[kind]


@pytest.mark.parametrize(
    "kind, message",
    [
        ("not-a-tensor", "latents are list"),
        ("one-sample", "latents are"),
        ("channels", "12 channels"),
        ("integers", "int64"),
        ("odd-height", "H = 3"),
        ("odd-width", "W = 5"),
        ("nan", "1 values that are not finite"),
        ("infinite", "not finite"),
        ("timestep-batch", r"timestep is \[3\], expected a tensor \[2\]"),
        ("timestep-shape", r"timestep is \[2, 1\]"),
        ("timestep-number", "timestep is 500"),
        ("timestep-high", r"expected 1000 times sigma, in \[0, 1000\]"),
        ("timestep-negative", r"in \[0, 1000\]"),
        ("timestep-nan", r"in \[0, 1000\]"),
        ("no-text", "encoder_hidden_states"),
        ("unknown-condition", "prompt"),
        ("text-batch", "batch 1, expected 2"),
        ("text-width", r"\[2, 7, 3\]"),
        ("text-rank", "encoder_hidden_states"),
        ("text-string", "is str, expected a floating-point tensor"),
        ("text-tokens", "is torch.int64, expected a floating-point tensor"),
        ("conditions-list", "conditions is list"),
        ("image", "the model takes no image"),
        ("long", "F = 65, expected at most 64"),
    ],
)
def test_bad_arguments_give_one_clear_error(kind, message):
    reward, _ = build()
    with pytest.raises(ValueError, match=message):
        reward(*bad_call(kind))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("encoder_hidden_states_image", lambda v: None, "this is an image-to-video model"),
        (
            "encoder_hidden_states_image",
            lambda v: v[..., :7],
            r"is \[2, 5, 7\], expected \[B, N, 20\]",
        ),
        ("encoder_hidden_states_image", lambda v: v[:, 0], r"is \[2, 20\]"),
        ("latent_condition", lambda v: None, "16 channels, expected 36"),
        ("latent_condition", lambda v: v[:, :4], "16 channels and latent_condition 4, expected 36"),
        ("latent_condition", lambda v: v[:, :, :1], r"latent_condition'\] is \[2, 20, 1, 4, 6\]"),
        ("latent_condition", lambda v: v[0], r"latent_condition'\] is \[20, 3, 4, 6\]"),
    ],
)
def test_bad_image_conditions_give_one_clear_error(name, change, message):
    reward, _ = build("i2v")
    x, timestep, conditions = inputs("i2v")
    conditions[name] = change(conditions[name])
    with pytest.raises(ValueError, match=message):
        reward(x, timestep, {k: v for k, v in conditions.items() if v is not None})


def test_non_finite_latents_of_a_generator_reach_the_loss():
    reward, _ = build()
    x, timestep, conditions = inputs()
    x[0, 0, 0, 0, 0] = float("nan")
    score = reward.freeze()(x.requires_grad_(), timestep, conditions)
    assert torch.isfinite(score).tolist() == [False, True]
