"""The diffusers Wan adapter: velocity, features, backbone, official parameter names, checks."""

import copy

import pytest
import torch
import wan
from numerics import assert_within_twice

import prfl_fast
from prfl_fast.models.registry import adapter_by_name, find_adapter
from prfl_fast.training import sft_loss

pytest.importorskip("diffusers")
TEXT = "encoder_hidden_states"


@pytest.mark.parametrize("case", wan.CASES)
def test_velocity_is_the_models_output(case):
    model = wan.tiny_wan(case)
    x, timestep, conditions = wan.inputs(case)
    latents = torch.cat([x, conditions["latent_condition"]], 1) if case == "i2v" else x
    image = conditions.get("encoder_hidden_states_image")
    expected = model(latents, timestep, conditions[TEXT], encoder_hidden_states_image=image).sample
    adapter = find_adapter(model)
    assert torch.equal(adapter.velocity(model, x, timestep, conditions), expected)
    out = adapter.velocity(model.to(torch.bfloat16), x, timestep, conditions)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("case", wan.CASES)
def test_features_are_the_residual_stream(case, patched):
    model = wan.tiny_wan(case, layers=3)
    if patched:
        prfl_fast.patch(model)
    inputs, adapter, seen = wan.inputs(case), find_adapter(model), []
    hook = model.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out))
    assert adapter.velocity(model, *inputs).shape == inputs[0].shape
    hook.remove()
    backbone = adapter.backbone(model, 2)
    for part in (model, backbone):
        assert torch.equal(adapter.features(part, *inputs, 2), seen[0])
    assert len(backbone.blocks) == 2 and backbone.config.num_layers == 2 and len(model.blocks) == 3
    names = {name.split(".")[0] for name, _ in backbone.named_parameters()}
    assert names == {"patch_embedding", "condition_embedder", "blocks"}
    with torch.no_grad():
        backbone.blocks[0].attn1.to_q.weight.zero_()
    assert model.blocks[0].attn1.to_q.weight.abs().sum() > 0


def test_scalar_timestep_is_expanded():
    model = wan.tiny_wan()
    x, _, conditions = wan.inputs()
    adapter = find_adapter(model)
    one = adapter.velocity(model, x, torch.tensor(500.0), conditions)
    assert torch.equal(one, adapter.velocity(model, x, torch.full((2,), 500.0), conditions))


def test_backbone_from_config_round_trip():
    adapter = find_adapter(model := wan.tiny_wan("i2v", layers=3))
    backbone = adapter.backbone(model, 2)
    twin = adapter.backbone_from_config(adapter.backbone_config(backbone))
    twin.load_state_dict(backbone.state_dict())
    features = (adapter.features(m, *wan.inputs("i2v"), 2) for m in (twin, backbone))
    assert torch.equal(*features)
    assert adapter_by_name(adapter.name) is adapter
    for function, arguments, message in (
        (adapter.backbone_from_config, [{"num_layers": 1, "color": "red"}], "does not fit"),
        (adapter_by_name, ["hunyuan"], "adapter is 'hunyuan', expected one of 'diffusers Wan"),
        (adapter.backbone, [model, 4], "num_blocks is 4, expected 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


def test_official_names_round_trip_and_agree_with_diffusers_converter(case):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    overrides = {"pos_embed_seq_len": 5} if case == "i2v" else {}
    model = wan.tiny_wan(case, **overrides)
    adapter, state = find_adapter(model), wan.tiny_wan(case, **overrides).state_dict()
    reference = adapter.to_reference(state)
    shared = ("patch_embedding", "blocks.")
    assert reference.keys().isdisjoint(k for k in state if not k.startswith(shared))
    names = {"blocks.0.self_attn.q.weight", "blocks.1.modulation", "blocks.0.norm3.weight"}
    assert names | {"head.modulation"} <= reference.keys()
    back = adapter.from_reference(reference)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    # Of first-and-last-frame models; diffusers' converter does not know it.
    reference.pop("img_emb.emb_pos", None)
    converted = convert_wan_transformer_to_diffusers(copy.copy(reference))
    assert converted.keys() == state.keys() - {"condition_embedder.image_embedder.pos_embed"}
    assert all(torch.equal(converted[k], state[k]) for k in converted)


def test_embedding_modules_and_sizes():
    model = wan.tiny_wan()
    adapter = find_adapter(model)
    assert adapter.hidden_size(model) == 48
    assert adapter.blocks(model) is model.blocks
    embedded = {id(p) for m in adapter.embedding_modules(model) for p in m.parameters()}
    outside = {name.split(".")[0] for name, p in model.named_parameters() if id(p) not in embedded}
    assert outside == {"blocks", "proj_out", "scale_shift_table"}


CHANGES = [
    (lambda x, c: (x, None), "conditions is NoneType, expected a dict"),
    (lambda x, c: (x, {}), "expected a dict with 'encoder_hidden_states'"),
    (lambda x, c: (x, {**c, "prompt": x}), "key of conditions is 'prompt', expected one of"),
    (lambda x, c: (x[0], c), "expected a floating-point tensor"),
    (lambda x, c: (x.long(), c), r"x is int64\["),
    (lambda x, c: (x[:, :8], c), "channels are 8 of x, expected 16"),
    (lambda x, c: (x, {**c, "latent_condition": x}), "16 of latent_condition, expected 16"),
    (lambda x, c: (x[..., :3], c), "W of x is 3, expected a multiple of the patch size 2"),
    (lambda x, c: (x[:1], c), "first dimension is the batch of x, 1"),
    (lambda x, c: (x, {TEXT: torch.randn(2, 7, 21)}), r"expected \[B, T, 20\]"),
    (lambda x, c: (x, {TEXT: c[TEXT].to("meta")}), "on meta, expected a floating-point tensor"),
]


@pytest.mark.parametrize("change, message", CHANGES)
def test_bad_latents_and_conditions(change, message):
    model = wan.tiny_wan()
    x, _, conditions = wan.inputs()
    with pytest.raises(ValueError, match=message):
        find_adapter(model).check_latents(model, *change(x, conditions))


def published(case="t2v"):
    """Return a model without the tests' own number of text tokens, and its inputs."""
    model = wan.tiny_wan(case)
    del model.text_tokens
    return model, wan.inputs(case)


@pytest.mark.cases(2)
@pytest.mark.parametrize("tokens", [1, 7, 300, 512])
@pytest.mark.parametrize("case", ["t2v", "i2v"])
def test_text_is_padded_with_zeros_to_512(case, tokens):
    model, (x, timestep, conditions) = published(case)
    adapter = find_adapter(prfl_fast.patch(model))
    text = torch.randn(2, tokens, 20, generator=torch.Generator().manual_seed(4))
    short = {**conditions, TEXT: text}
    full = {**conditions, TEXT: torch.cat([text, torch.zeros(2, 512 - tokens, 20)], 1)}
    for call in (adapter.velocity, lambda *args: adapter.features(*args, 1)):
        assert torch.equal(call(model, x, timestep, short), call(model, x, timestep, full))
    # diffusers' own forward of the padded text
    latents = torch.cat([x, conditions["latent_condition"]], 1) if case == "i2v" else x
    image = conditions.get("encoder_hidden_states_image")
    expected = model(latents, timestep, full[TEXT], encoder_hidden_states_image=image).sample
    assert torch.equal(adapter.velocity(model, x, timestep, short), expected)
    rollout = adapter.open_rollout(model, x, [timestep], short)
    with torch.no_grad():
        assert torch.equal(rollout.velocity(x, 0), expected)


@pytest.mark.parametrize("tokens", [0, 513])
@pytest.mark.parametrize("case", ["t2v", "i2v"])
def test_text_of_another_length_is_refused_by_name(case, tokens):
    model, (x, timestep, conditions) = published(case)
    adapter = find_adapter(model)
    conditions[TEXT] = torch.zeros(2, tokens, 20)
    reward = prfl_fast.LatentRewardModel.from_backbone(model, 1, 2)
    for call in (
        lambda: adapter.check_latents(model, x, conditions),
        lambda: adapter.velocity(model, x, timestep, conditions),
        lambda: reward(x, timestep, conditions),
    ):
        with pytest.raises(ValueError, match=rf"{TEXT}.* is .*{tokens}.*expected 1 to 512 text"):
            call()


def test_a_models_own_number_of_text_tokens_stays_with_its_reward(tmp_path):
    model, inputs = wan.tiny_wan(text_tokens=9), wan.inputs()
    reward = prfl_fast.LatentRewardModel.from_backbone(model, 1, 2).freeze()
    reward.save(tmp_path / "reward")
    loaded = prfl_fast.LatentRewardModel.load(tmp_path / "reward").freeze()
    assert loaded.backbone.text_tokens == 9
    assert torch.equal(reward(*inputs), loaded(*inputs))


@pytest.mark.parametrize("patched", [False, True])
def test_first_and_last_frame(patched):
    """diffusers takes the tokens of two images as [2B, N, C]; the adapter as [B, 2N, C] too."""
    model, (x, timestep, conditions) = wan.tiny_wan("flf"), wan.inputs("flf")
    with torch.no_grad():
        model.condition_embedder.image_embedder.pos_embed.normal_()
    latents = torch.cat([x, conditions["latent_condition"]], 1)
    pairs = conditions[f"{TEXT}_image"].reshape(4, 5, 20)
    expected = model(latents, timestep, conditions[TEXT], encoder_hidden_states_image=pairs).sample
    if patched:
        prfl_fast.patch(model)
    adapter = find_adapter(model)
    reward = prfl_fast.LatentRewardModel.from_backbone(model, 2, 2).freeze()
    scores = reward(x, timestep, conditions)
    loss = sft_loss(model, x, conditions, noise=x, sigma=0.5)
    for image in (conditions[f"{TEXT}_image"], pairs):
        given = {**conditions, f"{TEXT}_image": image}
        adapter.check_latents(model, x, given)
        found = adapter.velocity(model, x, timestep, given)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(reward(x, timestep, given), scores)
        torch.testing.assert_close(sft_loss(model, x, given, noise=x, sigma=0.5), loss)
        if patched:
            rollout = adapter.open_rollout(model, x, [timestep], given)
            with torch.no_grad():
                assert torch.equal(rollout.velocity(x, 0), found)
    one = {**conditions, f"{TEXT}_image": conditions[f"{TEXT}_image"][:, :5]}
    none = {k: v for k, v in conditions.items() if k != f"{TEXT}_image"}
    for given in (one, none):
        with pytest.raises(ValueError, match=rf"{TEXT}_image.*expected \[B, "):
            adapter.check_latents(model, x, given)


def saved_by_head(model, x):
    """Return the bytes that norm, modulation and projection after the blocks keep beside ``x``."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        shift, scale = (model.scale_shift_table + torch.zeros(1, 1, x.shape[-1])).chunk(2, dim=1)
        stream = model.norm_out(x.float()) * (1 + scale) + shift
        model.proj_out(stream.type_as(x))
    large = {size for size in sizes.values() if size >= x.nbytes}
    return sorted(large)


@pytest.mark.parametrize("train", [False, True])
def test_the_head_keeps_the_stream_in_its_own_dtype(train):
    model = wan.tiny_wan().bfloat16().requires_grad_(train)
    x = torch.randn(1, 600, 48, dtype=torch.bfloat16, requires_grad=True)
    assert max(saved_by_head(model, x)) == 2 * x.nbytes
    prfl_fast.patch(model)
    assert saved_by_head(model, x) == [x.nbytes]
    model.norm_out.register_forward_hook(lambda *_: None)  # a hook expects a tensor
    assert max(saved_by_head(model, x)) == 2 * x.nbytes


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_is_that_of_diffusers(dtype, rows):
    model = prfl_fast.patch(wan.tiny_wan())
    own = type(model.norm_out).forward.__get__(model.norm_out)
    shapes = (2, 24, 48), (2, rows, 48), (2, rows, 48)
    tensors = [torch.randn(shape) for shape in shapes]
    tensors[0] = tensors[0].to(dtype)
    grad, found = torch.randn(2, 24, 48).to(dtype), []
    for norm, wide in ((model.norm_out, False), (own, False), (own, True)):
        x, scale, shift = ((t.double() if wide else t).clone().requires_grad_() for t in tensors)
        if wide:  # diffusers computes in float32
            normed = torch.nn.functional.layer_norm(x, (48,), eps=model.norm_out.eps)
            out = normed * (1 + scale) + shift
        else:
            out = (norm(x.float()) * (1 + scale) + shift).type_as(x)
        found.append([out, *torch.autograd.grad(out, (x, scale, shift), grad.to(out.dtype))])
    for ours, plain, exact in zip(*found, strict=True):
        assert_within_twice(ours, plain, exact)


def test_a_users_forward_gets_the_norm_of_the_head_as_a_tensor():
    model = wan.tiny_wan()

    class Own(type(model)):
        def forward(self, x):
            return torch.relu(self.norm_out(x))

    model.__class__ = Own
    x = torch.randn(1, 2, 48)
    expected = model(x)
    assert torch.equal(prfl_fast.patch(model)(x), expected)
    assert find_adapter(model).is_patched(model)
    prfl_fast.unpatch(model)
    assert "forward" not in vars(model.norm_out)
