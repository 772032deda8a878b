"""The official Wan layout (Wan2.1, Wan2.2, HY-Video-PRFL) as small models of our own code.

Children, parameters, signatures and dtypes are those of ``wan/modules/model.py`` of these
repositories; :mod:`official_wan` adds the variants of the trainers.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

IMAGE_TOKENS = 257
T5_CONTEXT_TOKEN_NUMBER = 512  # Wan2.1 and HY-Video-PRFL have this name in the module


def get_sequence_parallel_state():
    """Return True if tokens are split over ranks; HY-Video-PRFL asks inside its attention."""
    return False


class _Float32Linear(TorchFunctionMode):
    """Run Linear in float32 on any weights, as CUDA's autocast with dtype float32 does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            args = [a if a is None else a.float() for a in args]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def float32_autocast(device):
    with torch.autocast(device.type, enabled=False), _Float32Linear():
        yield


def sinusoid(dim, position):
    half = torch.arange(dim // 2, dtype=torch.float64, device=position.device) / (dim // 2)
    angles = position.double().flatten()[:, None] / 10000**half
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def rope_tables(head_dim):
    """Return complex128 ``[1024, .]`` for frames, height and width."""
    pairs = head_dim // 2
    tables = []
    for count in (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3):
        exponent = torch.arange(count, dtype=torch.float64) / count
        angles = torch.outer(torch.arange(1024), 10000.0**-exponent)
        tables.append(torch.polar(torch.ones_like(angles), angles))
    return tables


def flat_rope(tables, frames, height, width, frame_indices=None):
    """Return complex128 ``[F*H*W, 1, d/2]``."""
    first = tables[0][:frames] if frame_indices is None else tables[0][frame_indices]
    parts = first[:, None, None], tables[1][None, :height, None], tables[2][None, None, :width]
    grid = [part.expand(frames, height, width, -1) for part in parts]
    return torch.cat(grid, dim=-1).reshape(frames * height * width, 1, -1)


def rotate(x, freqs):
    """Rotate the first tokens of ``[..., L, H, d]``; tokens past the table keep their values."""
    count = len(freqs)
    pairs = torch.view_as_complex(x[..., :count, :, :].double().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * freqs).flatten(-2)
    return torch.cat([turned, x[..., count:, :, :]], dim=-3)


def rotate_by_grid(x, grid_sizes, freqs):
    """Rotate each sample of ``[B, L, H, d]`` by its own grid."""
    pairs = x.shape[-1] // 2
    tables = freqs.split([pairs - 2 * (pairs // 3), pairs // 3, pairs // 3], dim=1)
    return torch.stack(
        [rotate(u, flat_rope(tables, *g)) for u, g in zip(x, grid_sizes.tolist(), strict=True)]
    )


def attend(q, k, v, lengths=None):
    """Return attention of ``[B, L, H, d]`` in v's dtype, flat; keys past ``lengths`` are masked."""
    mask = None
    if lengths is not None:
        mask = torch.arange(k.shape[1]) < lengths[:, None]
        mask = mask[:, None, None].to(k.device)
    heads = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask)
    return out.transpose(1, 2).flatten(2).to(q.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight


class LayerNorm(nn.LayerNorm):
    def __init__(self, dim, eps, elementwise_affine=False):
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x):
        affine = [None if p is None else p.float() for p in (self.weight, self.bias)]
        return F.layer_norm(x.float(), self.normalized_shape, *affine, self.eps).type_as(x)


class SelfAttention(nn.Module):
    def __init__(self, dim, num_heads, window_size=(-1, -1), qk_norm=True, eps=1e-6):
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.window_size, self.qk_norm, self.eps = window_size, qk_norm, eps
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = RMSNorm(dim, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, eps) if qk_norm else nn.Identity()

    def heads(self, x):
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def project(self, x, context):
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(context))
        return self.heads(q), self.heads(k), self.heads(self.v(context))

    def forward(self, x, seq_lens, grid_sizes, freqs):
        q, k, v = self.project(x, x)
        q, k = (rotate_by_grid(t, grid_sizes, freqs).float() for t in (q, k))
        return self.o(attend(q, k, v, seq_lens))


class CrossAttention(SelfAttention):
    def forward(self, x, context, context_lens):
        return self.o(attend(*self.project(x, context), context_lens))


class ImageCrossAttention(CrossAttention):
    """Attend to image and text tokens separately; the last 512 tokens are text."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.k_img, self.v_img = (nn.Linear(self.dim, self.dim) for _ in range(2))
        self.norm_k_img = RMSNorm(self.dim, self.eps) if self.qk_norm else nn.Identity()

    def image_tokens(self, context):
        return context.shape[1] - T5_CONTEXT_TOKEN_NUMBER

    def forward(self, x, context, context_lens, dtype=None, t=0):
        count = self.image_tokens(context)
        image, text = context[:, :count], context[:, count:]
        q, k, v = self.project(x, text)
        k_img = self.heads(self.norm_k_img(self.k_img(image)))
        parts = [q, k, v, k_img, self.heads(self.v_img(image))]
        q, k, v, k_img, v_img = (p if dtype is None else p.to(dtype) for p in parts)
        return self.o(attend(q, k, v, context_lens) + attend(q, k_img, v_img))


class FixedImageCrossAttention(ImageCrossAttention):
    """The same where the first 257 tokens are the image."""

    def image_tokens(self, context):
        return IMAGE_TOKENS


def modulation_rows(modulation, e):
    """Return the rows of ``modulation + e`` as ``[B, 1, D]``, or ``[B, L, D]`` of a 4-D e."""
    rows = (modulation + e).chunk(modulation.shape[1], dim=-2)
    return [row.squeeze(-2) for row in rows] if e.ndim == 4 else rows


class BlockBase(nn.Module):
    """Hold the children of every variant's block; these define its forward."""

    self_attention, cross_attention, image_attention = (
        SelfAttention,
        CrossAttention,
        ImageCrossAttention,
    )
    wide, cast_modulation = True, False  # norms and modulation in float32, or in e's dtype

    def __init__(self, image, dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps):
        super().__init__()
        self.dim, self.ffn_dim, self.num_heads, self.eps = dim, ffn_dim, num_heads, eps
        cross = self.image_attention if image else self.cross_attention
        self.norm1 = LayerNorm(dim, eps)
        self.self_attn = self.self_attention(dim, num_heads, window_size, qk_norm, eps)
        self.norm3 = LayerNorm(dim, eps, True) if cross_attn_norm else nn.Identity()
        self.cross_attn = cross(dim, num_heads, (-1, -1), qk_norm, eps)
        self.norm2 = LayerNorm(dim, eps)
        linears = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)
        self.ffn = nn.Sequential(linears[0], nn.GELU(approximate="tanh"), linears[1])
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def compute(self, x, e, self_attn, cross_attn, inner=None, outer=None):
        """Run the block; ``inner`` casts inputs of attention and FFN, ``outer`` the residual."""
        table = self.modulation.to(e.dtype) if self.cast_modulation else self.modulation
        e = modulation_rows(table, e)

        def modulated(norm, shift, scale):
            y = norm(x).float() if self.wide else norm(x)
            y = y * (1 + scale) + shift
            return y if inner is None else y.to(inner)

        x = self.gated(x, e[2], self_attn(modulated(self.norm1, e[0], e[1])))
        x = x if outer is None else x.to(outer)
        x = x + cross_attn(self.norm3(x).to(x.dtype))
        x = self.gated(x, e[5], self.ffn(modulated(self.norm2, e[3], e[4])))
        return x if outer is None else x.to(outer)

    def gated(self, x, gate, y):
        return x + y * gate


class Block(BlockBase):
    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens):
        assert e.dtype != torch.bfloat16
        return self.compute(
            x,
            e,
            lambda y: self.self_attn(y, seq_lens, grid_sizes, freqs),
            lambda y: self.cross_attn(y, context, context_lens),
        )


class Head(nn.Module):
    wide = True

    def __init__(self, dim, out_dim, patch_size, eps):
        super().__init__()
        self.dim, self.out_dim, self.patch_size, self.eps = dim, out_dim, patch_size, eps
        self.norm = LayerNorm(dim, eps)
        self.head = nn.Linear(dim, out_dim * math.prod(patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x, e):
        # As the blocks: one row of e is [B, D], a row for each token [B, L, D].
        e = e.unsqueeze(-2)
        rows = modulation_rows(self.modulation, e)
        y = self.norm(x) * (1 + rows[1]) + rows[0]
        if not self.wide:
            return self.head(y.to(x.dtype))
        with float32_autocast(x.device):
            return self.head(y)


class ImageEmbedding(nn.Module):
    def __init__(self, image_dim, dim, first_last=False):
        super().__init__()
        layers = nn.LayerNorm(image_dim), nn.Linear(image_dim, image_dim), nn.GELU()
        self.proj = nn.Sequential(*layers, nn.Linear(image_dim, dim), nn.LayerNorm(dim))
        if first_last:
            self.emb_pos = nn.Parameter(torch.zeros(1, 2 * IMAGE_TOKENS, image_dim))

    def forward(self, x):
        if hasattr(self, "emb_pos"):
            x = x.reshape(-1, 2 * x.shape[1], x.shape[2]) + self.emb_pos
        return self.proj(x)


class Wan21(nn.Module):
    """Take lists of ``[C, F, H, W]``, t ``[B]`` and lists of text ``[T, text_dim]``."""

    block, head_class = Block, Head

    def __init__(
        self,
        model_type="t2v",
        *,
        patch_size=(1, 2, 2),
        text_len=512,
        in_dim=16,
        dim=2048,
        ffn_dim=8192,
        freq_dim=256,
        text_dim=4096,
        out_dim=16,
        num_heads=16,
        num_layers=32,
        qk_norm=True,
        cross_attn_norm=True,
        eps=1e-6,
        image_dim=1280,  # 1280 in the repositories
    ):
        super().__init__()
        self.model_type, self.patch_size, self.text_len = model_type, patch_size, text_len
        self.in_dim, self.dim, self.ffn_dim, self.freq_dim = in_dim, dim, ffn_dim, freq_dim
        self.text_dim, self.out_dim, self.num_heads = text_dim, out_dim, num_heads
        self.num_layers, self.qk_norm, self.eps = num_layers, qk_norm, eps
        self.cross_attn_norm, self.window_size = cross_attn_norm, (-1, -1)
        self.patch_embedding = nn.Conv3d(in_dim, dim, patch_size, stride=patch_size)
        text = nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        self.text_embedding = nn.Sequential(*text)
        time = nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        self.time_embedding = nn.Sequential(*time)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        image = self.has_image(model_type)
        sizes = dim, ffn_dim, num_heads, (-1, -1), qk_norm, cross_attn_norm, eps
        self.blocks = nn.ModuleList([self.block(image, *sizes) for _ in range(num_layers)])
        self.head = self.head_class(dim, out_dim, patch_size, eps)
        # A plain attribute: no buffer, so that .to() never changes its dtype.
        self.freqs = torch.cat(rope_tables(dim // num_heads), dim=1)
        if image:
            self.img_emb = ImageEmbedding(image_dim, dim, model_type == "flf2v")

    def has_image(self, model_type):
        return model_type in ("i2v", "flf2v")

    def embed_patches(self, x, y):
        """Return a list of ``[1, L, D]`` and the grids, int64 ``[B, 3]``."""
        x = x if y is None else [torch.cat(pair) for pair in zip(x, y, strict=True)]
        x = [self.patch_embedding(u[None]) for u in x]
        grids = torch.stack([torch.tensor(u.shape[2:]) for u in x])
        return [u.flatten(2).transpose(1, 2) for u in x], grids

    def pad_tokens(self, x, seq_len):
        seq_lens = torch.tensor([u.shape[1] for u in x])
        assert seq_lens.max() <= seq_len
        return torch.cat([F.pad(u, (0, 0, 0, seq_len - u.shape[1])) for u in x]), seq_lens

    def embed_time(self, t, seq_len):
        with float32_autocast(self.patch_embedding.weight.device):
            e = self.time_embedding(sinusoid(self.freq_dim, t).float().unflatten(0, t.shape))
            return e, self.time_projection(e).unflatten(-1, (6, self.dim))

    def embed_context(self, context, clip_fea=None):
        if isinstance(context, (list, tuple)):
            context = [F.pad(u, (0, 0, 0, self.text_len - len(u))) for u in context]
            context = torch.stack(context)
        context = self.text_embedding(context)
        return context if clip_fea is None else torch.cat([self.img_emb(clip_fea), context], dim=1)

    def unpatchify(self, x, grids):
        out = []
        for u, grid in zip(x, grids.tolist(), strict=True):
            u = u[: math.prod(grid)].view(*grid, *self.patch_size, self.out_dim)
            sizes = [self.out_dim, *(n * p for n, p in zip(grid, self.patch_size, strict=True))]
            out.append(u.permute(6, 0, 3, 1, 4, 2, 5).reshape(sizes))
        return out

    def arguments(self, x, t, context, seq_len, clip_fea, y):
        if self.freqs.device != self.patch_embedding.weight.device:
            self.freqs = self.freqs.to(self.patch_embedding.weight.device)
        tokens, grids = self.embed_patches(x, y)
        tokens, seq_lens = self.pad_tokens(tokens, seq_len)
        e, e0 = self.embed_time(t, seq_len)
        kwargs = {"e": e0, "seq_lens": seq_lens, "grid_sizes": grids, "freqs": self.freqs}
        kwargs |= {"context": self.embed_context(context, clip_fea), "context_lens": None}
        return tokens, e, kwargs

    def forward(self, x, t, context, seq_len, clip_fea=None, y=None):
        tokens, e, kwargs = self.arguments(x, t, context, seq_len, clip_fea, y)
        for block in self.blocks:
            tokens = block(tokens, **kwargs)
        return [u.float() for u in self.unpatchify(self.head(tokens, e), kwargs["grid_sizes"])]


class HYPRFL(Wan21):
    """Wan2.1 that also returns features, a list of ``[B, L, D]`` after the selected blocks."""

    enable_teacache = False

    def forward(
        self,
        x,
        t,
        context,
        seq_len,
        clip_fea=None,
        y=None,
        cond_flag=False,
        output_features=False,
        selected_layers=(20, 30, 40),
    ):
        assert not self.enable_teacache
        tokens, e, kwargs = self.arguments(x, t, context, seq_len, clip_fea, y)
        features = []
        for index, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, **kwargs)
            if index in selected_layers:
                features.append(tokens)
        if output_features:
            return features
        return [u.float() for u in self.unpatchify(self.head(tokens, e), kwargs["grid_sizes"])]


class Wan22(Wan21):
    """Take t ``[B]`` or ``[B, L]``; e is ``[B, L, 6, D]`` always, images have no tokens."""

    def has_image(self, model_type):
        return False

    def embed_time(self, t, seq_len):
        # t [B] with B > 1 raises, as in the repository.
        return super().embed_time(t.expand(len(t), seq_len) if t.ndim == 1 else t, seq_len)

    def forward(self, x, t, context, seq_len, y=None):
        return super().forward(x, t, context, seq_len, None, y)
