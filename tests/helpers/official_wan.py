"""Tiny models in the official Wan layout, as the repositories that train Wan write them.

One class for each repository, own code that keeps its children, parameters, signatures and dtypes:

* :class:`Wan21`, :class:`Wan22`: Wan-Video/Wan2.1 and Wan2.2, ``wan/modules/model.py``
* :class:`HYPRFL`: Tencent-Hunyuan/HY-Video-PRFL, features after blocks
* :class:`WanTransformer3DModel`, :class:`Wan2_2Transformer3DModel`: VideoX-Fun
* :class:`DiffSynth`, called through :func:`model_fn_wan_video`: DiffSynth-Studio
* :class:`Musubi`: musubi-tuner, both versions
"""

import contextlib
import itertools

import torch
import torch.nn.functional as F
from official_layout import (
    HYPRFL,
    IMAGE_TOKENS,
    BlockBase,
    FixedImageCrossAttention,
    Head,
    SelfAttention,
    Wan21,
    Wan22,
    attend,
    flat_rope,
    modulation_rows,
    rope_tables,
    rotate,
    rotate_by_grid,
    sinusoid,
)
from torch import nn
from torch.utils.checkpoint import checkpoint


class VideoXSelfAttention(SelfAttention):
    def forward(self, x, seq_lens, grid_sizes, freqs, dtype=torch.bfloat16, t=0):
        q, k, v = self.project(x, x)
        q, k = (rotate_by_grid(p, grid_sizes, freqs).to(p.dtype) for p in (q, k))
        return self.o(attend(q.to(dtype), k.to(dtype), v.to(dtype), seq_lens))


class VideoXCrossAttention(SelfAttention):
    def forward(self, x, context, context_lens, dtype=torch.bfloat16, t=0):
        q, k, v = (p.to(dtype) for p in self.project(x, context))
        return self.o(attend(q, k, v, context_lens))


class VideoXBlock(BlockBase):
    """Work in the latents' ``dtype``."""

    self_attention, cross_attention = VideoXSelfAttention, VideoXCrossAttention
    image_attention = FixedImageCrossAttention
    wide = False

    def forward(
        self,
        x,
        e,
        seq_lens,
        grid_sizes,
        freqs,
        context,
        context_lens,
        dtype=torch.bfloat16,
        t=0,
    ):
        return self.compute(
            x,
            e,
            lambda y: self.self_attn(y, seq_lens, grid_sizes, freqs, dtype, t=t),
            lambda y: self.cross_attn(y, context, context_lens, dtype, t=t),
            inner=dtype,
        )


class VideoXHead(Head):
    wide = False


class WanTransformer3DModel(Wan21):
    """Take and return tensors ``[B, C, F, H, W]``; the class name equals that of diffusers."""

    block, head_class = VideoXBlock, VideoXHead

    def __init__(self, *args, add_ref_conv=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.control_adapter = self.ref_conv = self.teacache = self.cfg_skip_ratio = None
        self.all_gather, self.sp_world_size, self.sp_world_rank = None, 1, 0
        self.gradient_checkpointing = False
        if add_ref_conv:
            self.ref_conv = nn.Conv2d(16, self.dim, self.patch_size[1:], self.patch_size[1:])

    def enable_teacache(self, coefficients, num_steps, rel_l1_thresh):
        self.teacache = (coefficients, num_steps, rel_l1_thresh)

    def embed_time(self, t, dtype):
        e = sinusoid(self.freq_dim, t).float().unflatten(0, t.shape)
        e = self.time_embedding(e).to(dtype)
        return e, self.time_projection(e).unflatten(-1, (6, self.dim))

    def forward(self, x, *args, **kwargs):
        # Without gradients a batch is guidance: two calls, the second half first.
        if torch.is_grad_enabled() or len(x) < 2:
            return self.run(x, *args, **kwargs)
        half = len(x) // 2

        def part(value, rows):
            batched = isinstance(value, (torch.Tensor, list, tuple)) and len(value) == len(x)
            return value[rows] if batched else value

        outputs = []
        for rows, flag in ((slice(half, None), True), (slice(half), False)):
            split = {name: part(value, rows) for name, value in kwargs.items()}
            split["cond_flag"] = flag
            outputs.insert(0, self.run(*(part(v, rows) for v in (x, *args)), **split))
        return torch.cat(outputs)

    def run(
        self,
        x,
        t,
        context,
        seq_len,
        clip_fea=None,
        y=None,
        y_camera=None,
        full_ref=None,
        subject_ref=None,
        cond_flag=True,
    ):
        assert self.teacache is None and self.sp_world_size == 1 and y_camera is None
        device, dtype = self.patch_embedding.weight.device, x.dtype
        self.freqs = self.freqs.to(device)
        x, grids = self.embed_patches(x, y)
        before, after = [], []  # tokens of reference frames
        if full_ref is not None:
            before = self.ref_conv(full_ref).flatten(2).transpose(1, 2)
            x = [torch.cat([ref[None], u], dim=1) for ref, u in zip(before, x, strict=True)]
            seq_len += before.shape[1]
            if t.ndim == 2:
                t = torch.cat([t[:, -1:].expand(-1, seq_len - t.shape[1]), t], dim=1)
        if subject_ref is not None:
            after = self.patch_embedding(subject_ref).flatten(2).transpose(1, 2)
            x = [torch.cat([u, ref[None]], dim=1) for ref, u in zip(after, x, strict=True)]
            seq_len += after.shape[1]
        extra = int(full_ref is not None)
        extra += 0 if subject_ref is None else subject_ref.shape[2]
        longer = grids + torch.tensor([extra, 0, 0])
        x, seq_lens = self.pad_tokens(x, seq_len)
        if t.ndim == 2 and t.shape[1] < seq_len:
            t = torch.cat([t, t[:, -1:].expand(-1, seq_len - t.shape[1])], dim=1)
        e, e0 = self.embed_time(t, dtype)
        context = self.embed_context(context, clip_fea)
        saving = torch.is_grad_enabled() and self.gradient_checkpointing
        for block in self.blocks:
            args = (x, e0, seq_lens, longer, self.freqs, context, None, dtype, t)
            if saving:
                x = checkpoint(lambda *a, b=block: b(*a), *args, use_reentrant=False)
            else:
                names = "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens", "dtype"
                x = block(x, **dict(zip((*names, "t"), args[1:], strict=True)))
        if saving:
            x = checkpoint(lambda *a: self.head(*a), x, e, use_reentrant=False)
        else:
            x = self.head(x, e)
        x = x[:, before.shape[1] :] if len(before) else x
        x = x[:, : -after.shape[1]] if len(after) else x
        return torch.stack(self.unpatchify(x, grids))


class Wan2_2Transformer3DModel(WanTransformer3DModel):  # noqa: N801
    """Have no image tokens."""

    def has_image(self, model_type):
        return False


class Attend(nn.Module):
    def forward(self, q, k, v):
        return attend(q, k, v)


class Gate(nn.Module):
    def forward(self, x, gate, residual):
        return x + gate * residual


class DiffSynthSelfAttention(SelfAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.attn = Attend()

    def forward(self, x, freqs):
        q, k, v = self.project(x, x)
        return self.o(self.attn(*(rotate(p, freqs).to(p.dtype) for p in (q, k)), v))


class DiffSynthCrossAttention(DiffSynthSelfAttention):
    def forward(self, x, y):
        return self.o(self.attn(*self.project(x, y)))


class DiffSynthImageCrossAttention(FixedImageCrossAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.attn = Attend()

    def forward(self, x, y):
        return super().forward(x, y, None)


class DiTBlock(BlockBase):
    """Take context, modulation and per-token rotary factors by position; no grid."""

    self_attention, cross_attention = DiffSynthSelfAttention, DiffSynthCrossAttention
    image_attention = DiffSynthImageCrossAttention
    wide, cast_modulation = False, True

    def __init__(self, *args):
        super().__init__(*args)
        self.gate = Gate()

    def gated(self, x, gate, y):
        return self.gate(x, gate, y)

    def forward(self, x, context, t_mod, freqs):
        return self.compute(
            x, t_mod, lambda y: self.self_attn(y, freqs), lambda y: self.cross_attn(y, context)
        )


class DiffSynth(Wan21):
    """Have no configuration and a forward that raises; see :func:`model_fn_wan_video`."""

    block, head_class = DiTBlock, VideoXHead

    def __init__(self, *args, has_ref_conv=False, seperated_timestep=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.freqs = tuple(rope_tables(self.dim // self.num_heads))
        self.has_image_input, self.control_adapter = hasattr(self, "img_emb"), None
        self.seperated_timestep = seperated_timestep
        if has_ref_conv:
            self.ref_conv = nn.Conv2d(16, self.dim, (2, 2), (2, 2))
        for name in ("text_len", "num_heads", "out_dim", "model_type", "window_size", "qk_norm"):
            delattr(self, name)

    def unpatchify(self, x, grid_size):
        sizes = [n * p for n, p in zip(grid_size, self.patch_size, strict=True)]
        x = x.view(len(x), *grid_size, *self.patch_size, -1).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return x.reshape(len(x), -1, *sizes)

    def forward(self, x, timestep, context, clip_feature=None, y=None, **kwargs):
        raise ValueError("not enough values to unpack (expected 2, got 1)")


def model_fn_wan_video(
    dit,
    latents=None,
    timestep=None,
    context=None,
    clip_feature=None,
    y=None,
    reference_latents=None,
    use_gradient_checkpointing=False,
    use_gradient_checkpointing_offload=False,
    fuse_vae_embedding_in_latents=False,
    **kwargs,
):
    """Run DiffSynth's model on tensors; text ``[B, T, text_dim]`` comes padded."""
    if dit.seperated_timestep and fuse_vae_embedding_in_latents:
        frame = latents.shape[3] * latents.shape[4] // 4
        timestep = timestep * (torch.arange(frame * latents.shape[2]) >= frame).to(latents.dtype)
    t = sinusoid(dit.freq_dim, timestep).to(timestep.dtype)
    t = t[None] if len(t) > len(context) else t
    t = dit.time_embedding(t)
    t_mod = dit.time_projection(t).unflatten(-1, (6, dit.dim))
    context = dit.text_embedding(context)
    x = latents if y is None else torch.cat([latents, y], dim=1)
    if clip_feature is not None:
        context = torch.cat([dit.img_emb(clip_feature), context], dim=1)
    x = dit.patch_embedding(x)
    frames, height, width = x.shape[2:]
    x = x.flatten(2).transpose(1, 2).contiguous()
    if reference_latents is not None:
        reference = dit.ref_conv(reference_latents).flatten(2).transpose(1, 2)
        x = torch.cat([reference, x], dim=1)
        frames += 1
    freqs = flat_rope(dit.freqs, frames, height, width).to(x.device)
    for block in dit.blocks:
        keep = contextlib.nullcontext()
        if use_gradient_checkpointing_offload:
            keep = torch.autograd.graph.save_on_cpu()
        if use_gradient_checkpointing or use_gradient_checkpointing_offload:
            with keep:
                x = checkpoint(block, x, context, t_mod, freqs, use_reentrant=False)
        else:
            x = block(x, context, t_mod, freqs)
    x = dit.head(x, t)
    if reference_latents is not None:
        x, frames = x[:, reference.shape[1] :], frames - 1
    return dit.unpatchify(x, (frames, height, width))


def attend_in_half(q, k, v, lengths):
    """Cast float32 to bfloat16, as musubi-tuner does in every attention mode."""
    assert lengths is None or bool((lengths == k.shape[1]).all())
    half = (p.bfloat16() if p.dtype == torch.float32 else p for p in (q, k, v))
    return attend(*half).to(q.dtype)


class MusubiSelfAttention(SelfAttention):
    def forward(self, x, seq_lens, grid_sizes, freqs):
        q, k, v = self.project(x, x)
        turned = (
            torch.stack([rotate(u, f) for u, f in zip(p, freqs, strict=True)]).to(p.dtype)
            for p in (q, k)
        )
        return self.o(attend_in_half(*turned, v, seq_lens))


class MusubiCrossAttention(SelfAttention):
    def forward(self, x, context, context_lens):
        return self.o(attend_in_half(*self.project(x, context), context_lens))


class MusubiImageCrossAttention(FixedImageCrossAttention):
    def forward(self, x, context, context_lens):
        image, text = context[:, :IMAGE_TOKENS], context[:, IMAGE_TOKENS:]
        q, k, v = self.project(x, text)
        k_img, v_img = self.heads(self.norm_k_img(self.k_img(image))), self.heads(self.v_img(image))
        return self.o(attend_in_half(q, k, v, context_lens) + attend_in_half(q, k_img, v_img, None))


class MusubiBlock(BlockBase):
    """Keep the residual in its own dtype; recompute inside ``forward``."""

    self_attention, cross_attention = MusubiSelfAttention, MusubiCrossAttention
    image_attention = MusubiImageCrossAttention
    gradient_checkpointing = activation_cpu_offloading = False

    def enable_gradient_checkpointing(self, activation_cpu_offloading=False):
        self.gradient_checkpointing = True
        self.activation_cpu_offloading = activation_cpu_offloading

    def _forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        assert e.dtype != torch.bfloat16
        return self.compute(
            x,
            e,
            lambda y: self.self_attn(y, seq_lens, grid_sizes, freqs),
            lambda y: self.cross_attn(y, context, context_lens),
            inner=x.dtype,
            outer=x.dtype,
        )

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        args = x, e, seq_lens, grid_sizes, freqs, context, context_lens
        if self.training and self.gradient_checkpointing:
            return checkpoint(self._forward, *args, use_reentrant=False)
        return self._forward(*args)


class MusubiHead(Head):
    def forward(self, x, e):
        rows = modulation_rows(self.modulation.float(), e.unsqueeze(-2))
        return self.head(self.norm(x) * (1 + rows[1]) + rows[0])


class Musubi(Wan21):
    """Take model_version "2.1" or "2.2"; keys of the rotary factors are grids, ``freqs_fhw``."""

    block, head_class = MusubiBlock, MusubiHead

    def __init__(self, *args, model_version="2.1", **kwargs):
        self.model_version = model_version
        super().__init__(*args, **kwargs)
        self.force_v2_1_time_embedding, self.attn_mode, self.split_attn = False, "torch", False
        self.freqs_fhw, self.blocks_to_swap, self.offloader = {}, None, None
        self.gradient_checkpointing = False

    def has_image(self, model_type):
        return self.model_version == "2.1" and super().has_image(model_type)

    def enable_gradient_checkpointing(self, activation_cpu_offloading=False):
        self.gradient_checkpointing = True
        for block in self.blocks:
            block.enable_gradient_checkpointing(activation_cpu_offloading)

    def set_time_embedding_v2_1(self, force_v2_1_time_embedding):
        self.force_v2_1_time_embedding = force_v2_1_time_embedding

    def embed_time(self, t, seq_len):
        if self.model_version == "2.1":
            return super().embed_time(t, seq_len)
        if self.force_v2_1_time_embedding:
            return tuple(part.unsqueeze(1) for part in super().embed_time(t, seq_len))
        return super().embed_time(t[:, None].expand(-1, seq_len) if t.ndim == 1 else t, seq_len)

    def forward(
        self,
        x,
        t,
        context,
        seq_len,
        clip_fea=None,
        y=None,
        skip_block_indices=None,
        f_indices=None,
    ):
        tokens, e, kwargs = self.arguments(x, t, context, seq_len, clip_fea, y)
        pairs = self.dim // self.num_heads // 2
        tables = self.freqs.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
        kwargs["freqs"] = []
        for index, grid in enumerate(kwargs["grid_sizes"].tolist()):
            frames = None if f_indices is None else f_indices[index]
            key = (*grid, *(frames or ()))
            if key not in self.freqs_fhw:
                self.freqs_fhw[key] = flat_rope(tables, *grid, frames)
            kwargs["freqs"].append(self.freqs_fhw[key])
        for index, block in enumerate(self.blocks):
            skipped = skip_block_indices is not None and index in skip_block_indices
            if self.blocks_to_swap and not skipped:
                self.offloader.wait_for_block(index)
            tokens = tokens if skipped else block(tokens, **kwargs)
            if self.blocks_to_swap:
                self.offloader.submit_move_blocks_forward(self.blocks, index)
        return [u.float() for u in self.unpatchify(self.head(tokens, e), kwargs["grid_sizes"])]


CLASSES = {
    "wan21": Wan21,
    "wan22": Wan22,
    "hyprfl": HYPRFL,
    "videox": WanTransformer3DModel,
    "videox22": Wan2_2Transformer3DModel,
    "diffsynth": DiffSynth,
    "musubi": Musubi,
    "musubi22": Musubi,
}
VARIANTS = tuple(CLASSES)


def tiny_official(
    variant, model_type="t2v", *, layers=2, heads=2, head_dim=24, seed=0, image_dim=20, **overrides
):
    """Build a random model whose perturbed norms and biases make every gradient count."""
    torch.manual_seed(seed)
    dim = heads * head_dim
    sizes = {"dim": dim, "ffn_dim": 3 * dim, "freq_dim": 32, "text_dim": 20, "num_heads": heads}
    sizes |= {"in_dim": 16 if model_type == "t2v" else 36, "num_layers": layers}
    sizes |= {"image_dim": image_dim}
    if variant == "musubi22":
        sizes["model_version"] = "2.2"
    model = CLASSES[variant](model_type, **{**sizes, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def official_inputs(
    variant, model_type="t2v", *, batch=2, size=(3, 4, 6), text=(7, 5), per_token=False, seed=1
):
    """Return arguments of :func:`call_official`, all tensors with a batch or lists of samples."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = size[0] * size[1] * size[2] // 4
    lengths = list(itertools.islice(itertools.cycle(text), batch))
    arguments = {"x": randn(batch, 16, *size), "seq_len": tokens}
    arguments["context"] = [randn(n, 20) for n in lengths]
    t = torch.rand(batch, generator=generator) * 1000
    first = torch.arange(tokens) < tokens // size[0]  # the first frame is given, its time 0
    arguments["t"] = t[:, None] * ~first if per_token else t
    if model_type != "t2v":
        arguments["y"] = randn(batch, 20, *size)
        if variant not in ("wan22", "videox22", "musubi22"):
            rows = 2 * batch if model_type == "flf2v" else batch
            arguments["clip_fea"] = randn(rows, IMAGE_TOKENS, 20)
    return arguments


def call_official(model, x, t, context, seq_len, **kwargs):
    """Call a model in its repository's form; return ``[B, C, F, H, W]``."""
    if isinstance(model, DiffSynth):
        context = torch.stack([F.pad(u, (0, 0, 0, 512 - len(u))) for u in context])
        kwargs["clip_feature"] = kwargs.pop("clip_fea", None)
        return model_fn_wan_video(model, latents=x, timestep=t, context=context, **kwargs)
    if isinstance(model, WanTransformer3DModel):
        return model(x=x, t=t, context=context, seq_len=seq_len, **kwargs)
    if kwargs.get("y") is not None:
        kwargs["y"] = list(kwargs["y"])
    return torch.stack(model(list(x), t=t, context=context, seq_len=seq_len, **kwargs))
