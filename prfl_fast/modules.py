"""The parts of a timestep-conditioned video transformer on prfl_fast's kernels, as plain modules.

For people whose model prfl_fast does not know: build a model from these, or load a Wan block's
weights into them. :func:`prfl_fast.patch` runs the same functions (``self_attention``,
``cross_attention``, ``feed_forward``, ``transformer_block``) on the submodules that a foreign block
already owns.

Sources: the Wan block is that of diffusers' ``transformer_wan.py``; the query pool and the reward
head are those of PRFL (arXiv 2511.21541).
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from prfl_fast.chunks import in_chunks
from prfl_fast.kernels import (
    attention,
    bias_gelu,
    gated_residual,
    norm_modulate,
    qk_norm_rope,
    query_pool,
    residual_norm_modulate,
    rms_norm,
    rope_table,
)
from prfl_fast.norm_attention import norm_attention

# Wan pads every prompt to 512 tokens; what precedes them in the context is the image.
TEXT_TOKENS = 512


class Rope(NamedTuple):
    """3-D rotary position embedding of a token grid, compact.

    Attributes:
        cos, sin: float32 ``[positions, head_dim // 2]``, see :func:`prfl_fast.kernels.rope_table`.
        grid: frames, height, width of the tokens; tokens are frame-major.
        offset: first position on each axis (a sequence shard's place in the whole).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    grid: tuple[int, int, int]
    offset: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def from_grid(
        cls,
        grid: Iterable[int],
        head_dim: int,
        *,
        theta: float = 10000.0,
        device: torch.device | None = None,
    ) -> "Rope":
        """The embedding of a whole ``(frames, height, width)`` grid of tokens."""
        frames, height, width = grid
        cos, sin = rope_table(max(frames, height, width), head_dim, theta=theta, device=device)
        return cls(cos, sin, (frames, height, width))


class Modulation(NamedTuple):
    """Compact timestep conditioning: a learned table plus rows computed from the timesteps.

    Attributes:
        table: ``[n, D]``, one row per modulation vector.
        time: ``[R, n, D]``; R divides the number of tokens and each row serves as many consecutive
            tokens, so R = B is one timestep per sample, B·F one per latent frame, B·L one per
            token.
        row_index: optional integer ``[B, L]`` naming the row of each token instead.
    """

    table: torch.Tensor
    time: torch.Tensor
    row_index: torch.Tensor | None = None

    def vectors(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The n pairs (time rows ``[R, D]``, table row ``[D]``), views."""
        return list(zip(self.time.unbind(-2), self.table.unbind(-2), strict=True))


def _is_plain_linear(module: nn.Module) -> bool:
    """True where calling the module is ``F.linear`` on its weight and nothing else (no adapter,
    hook or quantiser).
    """
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
    )


class _Projections(torch.autograd.Function):
    """Linear layers of one input: its gradients add up inside the matrix products.

    Autograd would form one ``[B, L, D]`` gradient for each layer and add them in passes of their
    own; three layers at 14B and 720p move 4.6 GB for that.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, *parameters: Any
    ) -> tuple[torch.Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1::2]) else None, *weights)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        d_x: torch.Tensor | None = None
        d_parameters: list[torch.Tensor | None] = []
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            need_weight, need_bias = ctx.needs_input_grad[1 + 2 * i : 3 + 2 * i]
            if grad is None:
                d_parameters += [None, None]
                continue
            grad = grad.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                d_x = grad @ weight if d_x is None else d_x.addmm_(grad, weight)
            d_parameters.append(grad.t() @ x.flatten(0, -2) if need_weight else None)
            d_parameters.append(grad.sum(0) if need_bias else None)
        return d_x if d_x is None else d_x.view(ctx.shape), *d_parameters


def _project(layers: Iterable[nn.Module], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every layer's output for x."""
    layers = list(layers)
    # Autocast would apply to the products of the forward and not to those of the backward.
    if not all(map(_is_plain_linear, layers)) or torch.is_autocast_enabled(x.device.type):
        return tuple(layer(x) for layer in layers)
    return _Projections.apply(x, *(p for layer in layers for p in (layer.weight, layer.bias)))


def _project_out(to_out: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in to_out if isinstance(to_out, (nn.ModuleList, tuple)) else (to_out,):
        x = layer(x)
    return x


def self_attention(
    parts: Any, x: Any, rope: Rope, attend: Callable[..., torch.Tensor] = norm_attention
) -> torch.Tensor:
    """q/k/v projections, whole-D RMSNorm and RoPE on q and k, attention, output projection.

    Args:
        parts: owns ``to_q, to_k, to_v, to_out, norm_q, norm_k, heads`` (a
            :class:`TimestepConditionedAttention` or a diffusers ``WanAttention``; fused q/k/v
            projections are used when present).
        x: ``[B, L, D]``, already normalised and modulated; anything that the q/k/v projections take
            in its place.
        attend: in place of :func:`prfl_fast.norm_attention.norm_attention`, with its arguments.
    """
    if getattr(parts, "fused_projections", False):
        q, k, v = parts.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = _project((parts.to_q, parts.to_k, parts.to_v), x)
    out = attend(
        q,
        k,
        v,
        parts.norm_q.weight,
        parts.norm_k.weight,
        heads=parts.heads,
        eps=parts.norm_q.eps,
        **rope._asdict(),
    )
    return _project_out(parts.to_out, out)


class ContextKeys(NamedTuple):
    """What a block's cross-attention makes of the context, whatever the video tokens are.

    Attributes:
        k, v: ``[B, T, D]`` of the text, keys before their norm.
        extra_k, extra_v: ``[B, N, D]`` of the image, keys normalised; None in text-only models.
    """

    k: torch.Tensor
    v: torch.Tensor
    extra_k: torch.Tensor | None = None
    extra_v: torch.Tensor | None = None


def context_keys(parts: Any, context: torch.Tensor) -> ContextKeys:
    """Keys and values of the context; arguments as for :func:`cross_attention`."""
    image = None
    if getattr(parts, "add_k_proj", None) is not None:
        image, context = context[:, :-TEXT_TOKENS], context[:, -TEXT_TOKENS:]
    fused = getattr(parts, "fused_projections", False)
    k, v = (
        parts.to_kv(context).chunk(2, dim=-1)
        if fused
        else _project((parts.to_k, parts.to_v), context)
    )
    if image is None:
        return ContextKeys(k, v)
    if fused:
        extra_k, extra_v = parts.to_added_kv(image).chunk(2, dim=-1)
    else:
        extra_k, extra_v = _project((parts.add_k_proj, parts.add_v_proj), image)
    norm = parts.norm_added_k
    return ContextKeys(k, v, rms_norm(extra_k, norm.weight, eps=norm.eps), extra_v)


def cross_attention(
    parts: Any, x: torch.Tensor, context: torch.Tensor | ContextKeys
) -> torch.Tensor:
    """Attention of video tokens to text tokens and, in image-to-video models, image tokens; summed.

    Args:
        parts: owns what :func:`self_attention` needs; with ``add_k_proj, add_v_proj, norm_added_k``
            that are not None, the tokens before the last 512 of ``context`` are image tokens and
            go through those.
        x: ``[B, L, D]``. context: ``[B, T, D]``, or what :func:`context_keys` made of it.
    """
    q = parts.to_q(x)
    if not isinstance(context, ContextKeys):
        context = context_keys(parts, context)
    k, v, extra_k, extra_v = context
    norms: dict[str, Any] = {"heads": parts.heads, "eps": parts.norm_q.eps}
    weights = parts.norm_q.weight, parts.norm_k.weight
    if extra_k is None:
        return _project_out(parts.to_out, norm_attention(q, k, v, *weights, **norms))
    q, k = qk_norm_rope(q, k, *weights, **norms)
    out, _ = attention(q, k, v, heads=parts.heads, extra_k=extra_k, extra_v=extra_v)
    return _project_out(parts.to_out, out)


def feed_forward(
    up: Any, down: nn.Module, x: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """``down(gelu_tanh(up(x)))``; the bias of a plain ``nn.Linear`` is added inside the activation
    kernel. ``chunk`` tokens at a time, see :func:`prfl_fast.chunks.in_chunks`.
    """

    def run(x: torch.Tensor) -> torch.Tensor:
        if _is_plain_linear(up):
            return down(bias_gelu(F.linear(x, up.weight), up.bias))
        return down(bias_gelu(up(x)))

    return in_chunks(run, x, chunk)


def transformer_block(
    x: torch.Tensor,
    context: torch.Tensor,
    modulation: Modulation,
    rope: Rope,
    *,
    attn: Any,
    cross: Any,
    cross_norm: Any,
    up: nn.Module,
    down: nn.Module,
    eps: tuple[float, float],
    chunk: int | None = None,
) -> torch.Tensor:
    """One Wan block: modulated self-attention, cross-attention, modulated feed-forward, each with
    its residual.

    Args:
        x: ``[B, L, D]``. context: ``[B, T, D]``. modulation: six vectors (shift, scale, gate for
            the attention, then for the feed-forward).
        cross_norm: LayerNorm before the cross-attention, or a module without weight for none.
        eps: of the norms before the self-attention and before the feed-forward.
        chunk: tokens of the feed-forward at a time, see :func:`prfl_fast.chunks.in_chunks`.

    Returns:
        ``[B, L, D]`` in ``x.dtype``. Norms, modulation and residual sums are computed in float32
        and rounded once, where Wan rounds.
    """
    return modulated_block(
        x,
        modulation,
        lambda h: self_attention(attn, h, rope),
        lambda h: cross_attention(cross, h, context),
        lambda h: feed_forward(up, down, h, chunk),
        cross_norm=cross_norm,
        eps=eps,
    )


def modulated_block(
    x: torch.Tensor,
    modulation: Modulation,
    attend: Callable[[Any], torch.Tensor],
    look: Callable[[torch.Tensor], torch.Tensor],
    feed: Callable[[torch.Tensor], torch.Tensor],
    *,
    cross_norm: Any,
    eps: tuple[float, float],
    norm: Callable[..., Any] = norm_modulate,
) -> torch.Tensor:
    """:func:`transformer_block` around three functions of the normed tokens: self-attention, cross-
    attention, feed-forward. ``norm`` makes the first one's argument.
    """
    (shift, shift_table), (scale, scale_table), (gate, gate_table), *mlp = modulation.vectors()
    rows = modulation.row_index
    h = norm(
        x,
        scale=scale,
        shift=shift,
        scale_table=scale_table,
        shift_table=shift_table,
        row_index=rows,
        eps=eps[0],
    )
    # Results are used where they are made, so that none outlives it: one is 0.77 GB at 14B, 720p.
    affine = getattr(cross_norm, "weight", None) is not None
    x, h = residual_norm_modulate(
        x,
        attend(h),
        gate,
        cross_norm.weight if affine else None,
        cross_norm.bias if affine else None,
        gate_table=gate_table,
        row_index=rows,
        kind="layer" if affine else "none",
        eps=cross_norm.eps if affine else 0.0,
    )
    (shift, shift_table), (scale, scale_table), (gate, gate_table) = mlp
    x, h = residual_norm_modulate(
        x,
        look(h),
        scale=scale,
        shift=shift,
        scale_table=scale_table,
        shift_table=shift_table,
        row_index=rows,
        eps=eps[1],
    )
    return gated_residual(x, feed(h), gate, gate_table=gate_table, row_index=rows)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        if heads < 1 or dim % heads or (dim // heads) % 2:
            raise ValueError(
                f"heads is {heads}, expected a divisor of dim = {dim} with an even head size"
            )
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def _load(self, attn: Any) -> None:
        out = attn.to_out[0] if isinstance(attn.to_out, nn.ModuleList) else attn.to_out
        for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
            getattr(self, name).load_state_dict(getattr(attn, name).state_dict())
        self.to_out.load_state_dict(out.state_dict())


class TimestepConditionedAttention(_Attention):
    """Modulated LayerNorm → q/k/v → RMSNorm + RoPE → attention → output projection → gated
    residual.

    Args:
        dim: D, channels. heads: attention heads, a divisor of D.
    """

    def __init__(self, dim: int, heads: int, *, eps: float = 1e-6) -> None:
        super().__init__(dim, heads, eps)
        self.eps = eps
        self.scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)

    @classmethod
    def from_wan_block(cls, block: Any) -> "TimestepConditionedAttention":
        """A copy of a diffusers ``WanTransformerBlock``'s self-attention, its dtype and device."""
        module = cls(block.attn1.inner_dim, block.attn1.heads, eps=block.norm1.eps)
        module.to(block.attn1.to_q.weight)
        module._load(block.attn1)
        module.norm_q.eps = module.norm_k.eps = block.attn1.norm_q.eps
        module.scale_shift_table = nn.Parameter(block.scale_shift_table.detach()[0, :3].clone())
        return module

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, rope: Rope, row_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[B, L, D]`` → ``[B, L, D]``; time: ``[R, 3, D]`` shift, scale, gate rows (see
        :class:`Modulation`).
        """
        vectors = Modulation(self.scale_shift_table, time, row_index).vectors()
        (shift, shift_table), (scale, scale_table), (gate, gate_table) = vectors
        h = norm_modulate(
            x,
            scale=scale,
            shift=shift,
            scale_table=scale_table,
            shift_table=shift_table,
            row_index=row_index,
            eps=self.eps,
        )
        return gated_residual(
            x, self_attention(self, h, rope), gate, gate_table=gate_table, row_index=row_index
        )


class CrossAttention(_Attention):
    """LayerNorm (affine) → attention to text and, optionally, image tokens → residual.

    Args:
        image_dim: channels of the image tokens; None for a text-only model. With it, the last 512
            context tokens are text and those before them image tokens.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        eps: float = 1e-6,
        norm: bool = True,
        image_dim: int | None = None,
    ) -> None:
        super().__init__(dim, heads, eps)
        self.norm = nn.LayerNorm(dim, eps=eps) if norm else nn.Identity()
        self.add_k_proj = self.add_v_proj = None
        if image_dim is not None:
            self.add_k_proj, self.add_v_proj = nn.Linear(image_dim, dim), nn.Linear(image_dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    @classmethod
    def from_wan_block(cls, block: Any) -> "CrossAttention":
        """A copy of a diffusers ``WanTransformerBlock``'s cross-attention and its norm."""
        attn = block.attn2
        affine = getattr(block.norm2, "weight", None) is not None
        image_dim = attn.add_k_proj.in_features if attn.add_k_proj is not None else None
        module = cls(
            attn.inner_dim, attn.heads, eps=attn.norm_q.eps, norm=affine, image_dim=image_dim
        )
        module.to(attn.to_q.weight)
        module._load(attn)
        names = ("add_k_proj", "add_v_proj", "norm_added_k") if image_dim is not None else ()
        for name in names:
            getattr(module, name).load_state_dict(getattr(attn, name).state_dict())
        if affine:
            module.norm = nn.LayerNorm(attn.inner_dim, eps=block.norm2.eps).to(block.norm2.weight)
            module.norm.load_state_dict(block.norm2.state_dict())
        return module

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """``[B, L, D]``, context ``[B, T, D]`` → ``[B, L, D]``."""
        h = x
        if isinstance(self.norm, nn.LayerNorm):
            h = norm_modulate(x, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        return gated_residual(x, cross_attention(self, h, context))


class ModulatedFeedForward(nn.Module):
    """Modulated LayerNorm → linear → GELU(tanh) → linear → gated residual.

    Args:
        dim: D, channels. hidden_dim: channels between the two linears.
    """

    def __init__(self, dim: int, hidden_dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.up, self.down = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)

    @classmethod
    def from_wan_block(cls, block: Any) -> "ModulatedFeedForward":
        """A copy of a diffusers ``WanTransformerBlock``'s feed-forward, its dtype and device."""
        up, down = block.ffn.net[0].proj, block.ffn.net[2]
        module = cls(up.in_features, up.out_features, eps=block.norm3.eps).to(up.weight)
        module.up.load_state_dict(up.state_dict())
        module.down.load_state_dict(down.state_dict())
        module.scale_shift_table = nn.Parameter(block.scale_shift_table.detach()[0, 3:].clone())
        return module

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, row_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``[B, L, D]`` → ``[B, L, D]``; time: ``[R, 3, D]`` shift, scale, gate rows (see
        :class:`Modulation`).
        """
        vectors = Modulation(self.scale_shift_table, time, row_index).vectors()
        (shift, shift_table), (scale, scale_table), (gate, gate_table) = vectors
        h = norm_modulate(
            x,
            scale=scale,
            shift=shift,
            scale_table=scale_table,
            shift_table=shift_table,
            row_index=row_index,
            eps=self.eps,
        )
        y = feed_forward(self.up, self.down, h)
        return gated_residual(x, y, gate, gate_table=gate_table, row_index=row_index)


class QueryAttentionPool(nn.Module):
    """Learned queries attend to all tokens; folded, so that neither keys nor values are ever
    computed.

    With q_h the projected query of head h and W_k,h, W_v,h the head's slices of the in-projection,
    the score of
    token x is (W_k,hᵀ q_h)·x plus a constant that softmax drops, and Σ_l p_l (W_v,h x_l + b) =
    W_v,h (Σ_l p_l x_l) + b. One pass over x replaces two [L, D] × [D, D] projections.

    Args:
        dim: D, channels of the tokens. num_heads: a divisor of D. num_queries: their outputs are
            averaged.

    Parameters carry the names of the reference's pooling file (``queries``,
    ``multihead_attn.in_proj_weight`` …).
    """

    def __init__(self, dim: int, num_heads: int = 8, num_queries: int = 1) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads is {num_heads}, expected a divisor of dim = {dim}")
        if num_queries < 1:
            raise ValueError(f"num_queries is {num_queries}, expected at least 1")
        # Holds and initialises the parameters under the reference's names; its forward is never
        # called.
        self.multihead_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        nn.init.xavier_uniform_(self.queries)

    @classmethod
    def from_multihead_attention(
        cls, attention: nn.MultiheadAttention, queries: torch.Tensor
    ) -> "QueryAttentionPool":
        """A pool with copies of the weights of ``attention`` and of ``queries`` ``[num_queries,
        D]``.

        Raises:
            ValueError: separate key or value sizes, no bias, extra bias tokens, or queries of
                another width.
        """
        dim = attention.embed_dim
        if (
            attention.in_proj_weight is None
            or attention.in_proj_bias is None
            or attention.bias_k is not None
        ):
            raise ValueError(
                "attention is an nn.MultiheadAttention with kdim/vdim, bias=False or add_bias_kv, "
                "expected one with a packed in-projection and biases"
            )
        if queries.ndim != 2 or queries.shape[1] != dim:
            raise ValueError(f"queries is {list(queries.shape)}, expected [num_queries, {dim}]")
        pool = cls(dim, attention.num_heads, queries.shape[0]).to(attention.in_proj_weight)
        pool.multihead_attn.load_state_dict(attention.state_dict())
        with torch.no_grad():
            pool.queries.copy_(queries)
        return pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, L, D]`` → ``[B, D]``: attended tokens plus query, averaged over the queries, in the
        pool's dtype.

        Raises:
            ValueError: ``x`` is not ``[B, L, D]`` of the pool's D.
        """
        mha = self.multihead_attn
        dim, heads = mha.embed_dim, mha.num_heads
        if x.ndim != 3 or x.shape[-1] != dim:
            raise ValueError(f"x is {list(x.shape)}, expected [B, L, {dim}]")
        w_q, w_k, w_v = mha.in_proj_weight.view(3, heads, dim // heads, dim).unbind(0)
        b_q, _, b_v = mha.in_proj_bias.view(3, heads, dim // heads).unbind(0)
        q = torch.einsum("nd,hed->nhe", self.queries, w_q) + b_q
        folded = torch.einsum("nhe,hed->nhd", q, w_k) * (dim // heads) ** -0.5
        pooled, _ = query_pool(x, folded.flatten(0, 1))
        pooled = pooled.to(w_v.dtype).unflatten(1, (-1, heads))
        # The average over queries commutes with the linear value and output projections.
        values = torch.einsum("bhd,hed->bhe", pooled.mean(1), w_v) + b_v
        return mha.out_proj(values.flatten(1)) + self.queries.mean(0)


class RewardHead(nn.Module):
    """D → 1024 → 512 → 1 with ReLU between; Xavier-uniform weights, zero biases. The sigmoid is the
    caller's.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(dim, 1024), nn.Linear(1024, 512), nn.Linear(512, 1)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, D]`` → logits ``[B]``."""
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x))))).squeeze(-1)
