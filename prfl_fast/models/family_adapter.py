"""Base class of adapters of other families of diffusers, and the checks that they share."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import pad

from prfl_fast.models.adapter import Conditions, check_inputs, check_timesteps, not_inference
from prfl_fast.models.block_adapter import (
    DiffusersAdapter,
    NoReference,
    Replacements,
    feed_forward_in_chunks,
)
from prfl_fast.models.conditions import LATENT
from prfl_fast.models.inference import (
    RolloutModel,
    RolloutOptions,
    UnsupportedError,
    check_rollout,
)
from prfl_fast.models.layer_rollout import LayerRollout
from prfl_fast.models.wan_forward import customized, is_library
from prfl_fast.utils.checks import check, check_choice
from prfl_fast.utils.modules import layers_of, stopped_at, unwrap

# The conditions of a family: name → (required, shape after the batch). A letter is any number.
Expected = Mapping[str, tuple[bool, tuple[int | str, ...]]]


def why_not_fused(block: Any, kinds: Mapping[str, str], processors: Sequence[str]) -> str:
    """Return why a block must run its class's forward, ``""`` if it can run on the kernels.

    Args:
        block: a transformer block.
        kinds: class name of each submodule that the kernels replace.
        processors: name of the attention processor that the kernels replace.
    """
    if not is_library(type(block).forward):
        return f"forward is that of {type(block).__module__}.{type(block).__name__}"
    for path, kind in kinds.items():
        try:
            module = block.get_submodule(path)
        except AttributeError:
            return f"{path} is missing"
        if reason := customized(path, module, (kind,), feed_forward_in_chunks):
            return reason
        if kind == "GELU" and module.approximate != "tanh":
            return f"{path} has approximate={module.approximate!r}"
        processor = getattr(module, "processor", None)
        if processor is not None:
            name = type(processor).__name__
            if name not in processors or not is_library(type(processor).__call__):
                return f"{path}.processor is a {type(processor).__module__}.{name}"
            if getattr(processor, "_parallel_config", None) is not None:
                return f"{path} runs with context parallelism"
        if kind == "Dropout" and module.training and module.p > 0:
            return f"{path} has dropout p={module.p} in train mode"
    return ""


def warn_not_fused(reason: str) -> None:
    """Warn that a patched block runs its own forward."""
    if not torch.compiler.is_compiling():
        text = f"a patched block runs its own forward, not prfl_fast's kernels: {reason}"
        warnings.warn(text, stacklevel=3)


class FamilyAdapter(NoReference, DiffusersAdapter):
    """Adapter of a class whose forward keeps running: only its blocks and rotary table change.

    Attributes:
        embeddings: names of the modules before the first block, that of the latents first.
        exact_conditions: names of conditions that keep their dtype; others get that of the model.
        why_not_fused: returns why a block must run its own forward, see :func:`why_not_fused`.
        block_forward, rope_forward: our forwards of the blocks and of ``rope``.
        token_counts: usual sizes of letters in ``expected_conditions``, which the planner takes.
        runs_on_meta: False if the forward does not run on meta tensors.
    """

    embeddings: ClassVar[Sequence[str]]
    exact_conditions: ClassVar[Sequence[str]] = ()
    why_not_fused: ClassVar[Callable[..., str]]
    block_forward: ClassVar[Callable[..., Any]]
    rope_forward: ClassVar[Callable[..., Any]]
    lists: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    token_counts: ClassVar[dict[str, int]] = {}
    runs_on_meta: ClassVar[bool] = True

    def replacements(self, base: Any) -> Replacements:
        """Return our forwards of the blocks and of the rotary embedding."""
        pairs = [(block, self.block_forward) for block in self.blocks(base)]
        return [*pairs, (base.rope, self.rope_forward)]

    def expected_conditions(self, base: Any) -> Expected:
        """Return the conditions that the model takes."""
        raise NotImplementedError

    def pipeline_conditions(self, base: Any) -> tuple[str, ...]:
        """Return the names of the conditions that diffusers' pipeline makes from a prompt."""
        return tuple(self.expected_conditions(base))

    def prompt_shapes(self, base: Any, tokens: int = 8) -> dict[str, tuple[int, ...]]:
        """Return shapes of a prompt's required conditions without batch dimension.

        Letters in ``expected_conditions`` stand for ``tokens``.
        """
        return {
            name: tuple(tokens if isinstance(n, str) else n for n in shape)
            for name, (required, shape) in self.expected_conditions(base).items()
            if required
        }

    def arguments(self, base: Any, x: torch.Tensor, conditions: Conditions) -> dict[str, Any]:
        """Return the model's arguments besides the latents and the timestep."""
        return {k: v for k, v in conditions.items() if k != LATENT}

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Return latents ``[B, C, F, H, W]`` as the model takes them."""
        return x

    def unpack(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the model's output as a velocity of latents x."""
        return out

    def patch_sizes(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return frames, rows and columns of a patch."""
        return config["patch_size_t"], config["patch_size"], config["patch_size"]

    def check_patchable(self, base: Any) -> None:
        """Raise ``ValueError`` for replaced forwards and other attention processors."""
        super().check_patchable(base)
        for index, block in enumerate(self.blocks(base)):
            reason = self.why_not_fused(block)
            if "processor" in reason or "parallelism" in reason:
                raise ValueError(
                    f"block {index}: {reason}, expected diffusers' own attention on one device. "
                    "Call model.set_attn_processor with the processor of a new model, and train "
                    "without enable_parallelism"
                )

    def embedding_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules before the first block, which a reward model keeps frozen."""
        found = (getattr(unwrap(model), name, None) for name in self.embeddings)
        return [module for module in found if module is not None]

    def feed_forwards(self, base: Any) -> list[Any]:
        """Return the feed-forwards of the blocks that have one as a module."""
        names = ("ff", "ff_context")
        found = (getattr(block, name, None) for block in self.blocks(base) for name in names)
        return [layer for layer in found if layer is not None]

    def check_latents(
        self, model: nn.Module, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless the model takes these latents, called ``name`` in errors."""
        base: Any = unwrap(model)
        check_inputs(name, x, conditions)
        expected = self.expected_conditions(base)
        for key, given in conditions.items():
            check_choice("a key of conditions", key, tuple(expected))
            ok = given.device == x.device
            check(ok, f"conditions[{key!r}]", given, f"a tensor on {x.device}")
        for key, (required, shape) in expected.items():
            value = conditions.get(key)
            if value is None and not required:
                continue
            came = () if value is None else value.shape[1:]
            ok = len(came) == len(shape) and (value is not None)
            # A letter is any number, but a prompt has a token.
            ok = ok and all(
                (m > 0 or n != "T") if isinstance(n, str) else n == m
                for n, m in zip(shape, came, strict=True)
            )
            text = ", ".join(map(str, ("B", *shape)))
            check(ok, f"conditions[{key!r}]", value, f"[{text}]")
        channels = x.shape[1] + (conditions[LATENT].shape[1] if LATENT in conditions else 0)
        # Optional image latents are zeros if they are missing.
        optional = LATENT not in conditions and expected.get(LATENT) is not None
        kind = "out_channels" if optional else "in_channels"
        wanted = base.config[kind]
        expected_text = f"{wanted} (the model's {kind})"
        check(channels == wanted, f"channels of {name} and {LATENT}", channels, expected_text)
        for axis, size, patch in zip(
            "FHW", x.shape[2:], self.patch_sizes(base.config), strict=True
        ):
            check(size % patch == 0, f"{axis} of {name}", size, f"a multiple of {patch}, the patch")

    def timestep(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the timesteps as the model takes them; ``dtype`` is the dtype of its latents."""
        return timestep

    def velocity(
        self, model: nn.Module, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the velocity ``[B, C, F, H, W]`` in ``x.dtype``.

        Args:
            x: latents ``[B, C, F, H, W]``.
            timestep: 1000·σ, ``[]`` or ``[B]``.
            conditions: see :meth:`check_latents`.
        """
        base: Any = unwrap(model)
        given, conditions = not_inference(x), not_inference(conditions)
        dtype = next(getattr(base, self.embeddings[0]).parameters()).dtype
        floats = {
            k: v.to(dtype)
            for k, v in conditions.items()
            if v.is_floating_point() and k not in self.exact_conditions
        }
        conditions = {**conditions, **floats}
        latents = torch.cat([given.to(dtype), *(floats[k] for k in (LATENT,) if k in floats)], 1)
        missing = base.config.in_channels - latents.shape[1]
        latents = pad(latents, (0, 0, 0, 0, 0, 0, 0, missing)) if missing > 0 else latents
        timestep = timestep.to(x.device)
        timestep = timestep.expand(len(x)) if timestep.ndim == 0 else timestep
        out, *_ = model(
            hidden_states=self.pack(latents),
            timestep=self.timestep(timestep, dtype),
            return_dict=False,
            **self.arguments(base, latents, conditions),
        )
        return self.unpack(out, x).to(x.dtype)

    def features(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        num_blocks: int,
    ) -> torch.Tensor:
        """Return the video's residual stream ``[B, L, D]`` after block ``num_blocks``.

        Later blocks and the head do not run. Arguments are those of :meth:`velocity`.
        """
        base: Any = unwrap(model)
        lists = {name: getattr(base, name) for name in self.lists}
        base._modules.update(self.first_blocks(base, num_blocks))
        try:
            with stopped_at(base.norm_out.register_forward_pre_hook) as found:
                self.velocity(base, x, timestep, conditions)
        finally:
            base._modules.update(lists)
        return found[0][0]  # type: ignore[no-any-return]

    def open_rollout(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timesteps: Sequence[torch.Tensor],
        conditions: Conditions,
        options: RolloutOptions = RolloutOptions(),  # noqa: B008 - frozen
    ) -> RolloutModel:
        """Return the patched model opened for one rollout.

        In most families the text embedding depends on the timestep, so no value is kept from step
        to step. The rollout can merge LoRA and run linear layers in FP8.

        Raises:
            UnsupportedError: if the model is not patched, is compiled as a whole, or has hooks.
            ValueError: if latents, timesteps or conditions have the wrong shape.
        """
        base: Any = unwrap(model)
        if not self.is_patched(base):
            raise UnsupportedError("the model is not patched. Call prfl_fast.patch(model)")
        for index, block in enumerate(self.blocks(base)):
            if reason := self.why_not_fused(block):
                raise UnsupportedError(f"block {index}: {reason}, so it runs its own forward")
        own = (*(f for _, f in self.replacements(base)), feed_forward_in_chunks)
        check_rollout(list(layers_of(model)), own, options.compile)
        self.check_latents(model, x, conditions)
        check_timesteps(timesteps, len(x))
        call = functools.partial(self.velocity, model, conditions=conditions)
        return LayerRollout(call, x, list(self.blocks(base)), list(timesteps), options)
