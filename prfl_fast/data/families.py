"""Load pipelines of other families than Wan, and encode prompts by their own code.

A pipeline is called with a stand-in for its transformer. The stand-in ends the call and hands on
its arguments, so templates, tokenizers, masks and pooled states are those of diffusers.
"""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import nn

from prfl_fast.models.adapter import Conditions
from prfl_fast.models.conditions import TEXT, trim_texts
from prfl_fast.models.family_adapter import FamilyAdapter
from prfl_fast.models.loading import transformer_class
from prfl_fast.models.registry import find_adapter
from prfl_fast.utils.checks import check, reason_of
from prfl_fast.utils.io import read_json
from prfl_fast.utils.optional import need

WAN = "AutoencoderKLWan"
_STG = {"stg_scale": 0.0, "modality_scale": 1.0, "guidance_rescale": 0.0}
_SIDE = 64  # pixels; conditions of a prompt do not depend on the size


class Family(NamedTuple):
    """Describe the pipeline of a family.

    Attributes:
        name: class of the pipeline.
        fps: frames per second of its videos.
        layout: shape of its latents: ``[B, C, F, H, W]`` for ``video``, ``[B, F·H·W, C]`` for
            ``tokens``, ``[B, F, C, H, W]`` for ``frames``.
        guidance: argument of its call that takes the scale of classifier-free guidance, or
            ``guider`` if a part of the pipeline holds the scale.
        options: arguments of its call that turn other kinds of guidance off.
        is_flow: False if it predicts no velocity of a flow, so that only its own scheduler samples.
    """

    name: str
    fps: float
    layout: Literal["video", "tokens", "frames"] = "video"
    guidance: Literal["guidance_scale", "true_cfg_scale", "guider"] = "guidance_scale"
    options: Mapping[str, float] = {}
    is_flow: bool = True


FAMILIES = {
    family.name: family
    for family in (
        Family("HunyuanVideoPipeline", 24, guidance="true_cfg_scale"),
        Family("HunyuanVideo15Pipeline", 24, guidance="guider"),
        Family("LTXPipeline", 25, "tokens"),
        Family(
            "LTX2Pipeline",
            24,
            "tokens",
            options={**_STG, **{f"audio_{name}": value for name, value in _STG.items()}},
        ),
        Family("MochiPipeline", 30),
        Family("CogVideoXPipeline", 8, "frames", is_flow=False),
    )
}


def find_family(model: Path) -> Family | None:
    """Return the family of a pipeline's folder; None for Wan, in diffusers' or official layout.

    Raises:
        ValueError: if the class of the pipeline is neither Wan's nor in ``FAMILIES``.
    """
    vae = model / "vae" / "config.json"
    kind = read_json(vae).get("_class_name", WAN) if vae.is_file() else WAN
    index = model / "model_index.json"
    if kind == WAN or not index.is_file():
        expected = f"{WAN}, or {index.name} beside it"
        check(kind == WAN, f"autoencoder of {model}", kind, expected)
        return None
    name = read_json(index).get("_class_name")
    hint = "Sample others in Python, by prfl_fast.rollout"
    expected = f"a pipeline of Wan, or one of {', '.join(FAMILIES)}"
    check(name in FAMILIES, f"class of {model}", name, expected, hint=hint)
    return FAMILIES[name]


class _CalledError(Exception):
    """Carry the arguments of a stand-in's call out of the pipeline."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given


def _call(*_: Any, **given: Any) -> NoReturn:
    raise _CalledError(given)


def stand_in(kind: Any, config: Mapping[str, Any]) -> Any:
    """Return a model of diffusers' class ``kind`` with a configuration and without weights."""
    with torch.device("meta"):
        model = kind.from_config(config)
    for name, child in list(model.named_children()):
        # LTX-2's rotary embedding stays: its pipeline calls it.
        if next(child.parameters(), None) is not None or next(child.buffers(), None) is not None:
            delattr(model, name)
    for name in model._parameters.keys() | model._buffers.keys():
        delattr(model, name)
    # Gives the model its dtype and device.
    model.register_parameter("stand_in", nn.Parameter(torch.zeros(1), requires_grad=False))
    model.forward = _call
    return model


def load_pipeline(
    model: Path, family: Family, dtype: torch.dtype, transformer: nn.Module | None = None
) -> Any:
    """Return a pipeline without its autoencoder, and with a stand-in for a missing transformer.

    Raises:
        ValueError: if a part of the pipeline cannot be loaded.
        MissingExtraError: if diffusers or transformers is not installed.
    """
    diffusers = need("diffusers")
    need("transformers", "video")
    need("diffusers.utils.logging").disable_progress_bar()
    config = read_json(model / "vae" / "config.json")
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    check(kind is not None, f"{model}: vae", config.get("_class_name"), "a class of diffusers")
    parts = {"vae": stand_in(kind, config), "transformer": transformer}
    # LTX-2 multiplies the latents that it returns by these statistics. Nothing reads that result.
    parts["vae"].latents_mean, parts["vae"].latents_std = torch.zeros(1), torch.ones(1)
    if transformer is None:
        parts["transformer"] = stand_in(*transformer_class(model))
    pipeline: Any = getattr(diffusers, family.name, None)
    expected = f"one with {family.name}. Update diffusers"
    check(pipeline is not None, "diffusers", diffusers.__version__, expected)
    try:
        pipe = pipeline.from_pretrained(model, torch_dtype=dtype, local_files_only=True, **parts)
    except Exception as error:  # its readers raise errors of any type
        reason = reason_of(error)
        raise ValueError(f"{model} cannot be loaded as {family.name}: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_options(pipe: Any, family: Family, fps: float) -> dict[str, Any]:
    """Return the arguments of a pipeline's call that all its uses share."""
    options: dict[str, Any] = {**family.options, "output_type": "latent"}
    if "frame_rate" in inspect.signature(pipe.__call__).parameters:
        options["frame_rate"] = fps
    return options


def guidance_options(pipe: Any, scale: float) -> dict[str, Any]:
    """Return the scale by the names of a call's arguments; LTX-2's audio has a scale of its own."""
    names = inspect.signature(pipe.__call__).parameters
    return {n: scale for n in ("guidance_scale", "audio_guidance_scale") if n in names}


class FamilyPrompts:
    """Encode prompts to the conditions that a pipeline gives its transformer.

    Args:
        model: folder of the pipeline.
        family: see :func:`find_family`.
        device: of the text encoders.
        dtype: of the text encoders.
        fps: frames per second, a condition of LTX.

    Raises:
        ValueError: if a part of the pipeline cannot be loaded.
    """

    def __init__(
        self,
        model: Path,
        family: Family,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        fps: float | None = None,
    ) -> None:
        pipe = load_pipeline(model, family, dtype).to(device)
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        if family.guidance == "guider":
            pipe.guider.disable()
        self._pipe, self._family, self._model = pipe, family, model
        self._options = call_options(pipe, family, fps or family.fps)
        if family.guidance == "guidance_scale":
            self._options |= guidance_options(pipe, 1.0)
        adapter: Any = find_adapter(pipe.transformer)
        assert isinstance(adapter, FamilyAdapter)
        self._names = adapter.pipeline_conditions(pipe.transformer)

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str]) -> list[Conditions]:
        """Return the conditions of each prompt without batch dimension, on the CPU.

        Texts have no masked tokens at their end.

        Raises:
            ValueError: if the pipeline cannot encode a prompt.
        """
        check(not isinstance(prompts, str), "prompts", prompts, "a list of strings")
        try:
            self._pipe(
                prompt=list(prompts),
                height=_SIDE,
                width=_SIDE,
                num_frames=1,
                num_inference_steps=4,  # Mochi divides by half of them, minus 1
                **self._options,
            )
        except _CalledError as call:
            given = call.given
        except Exception as error:  # its parts raise errors of any type
            reason = reason_of(error)
            raise ValueError(f"{self._model} cannot encode {prompts!r}: {reason}") from error
        return [self._of(given, i, len(prompts)) for i in range(len(prompts))]

    def _of(self, given: Mapping[str, Any], index: int, batch: int) -> Conditions:
        found: Conditions = {}
        for name in self._names:
            value = given.get(name)
            if isinstance(value, torch.Tensor):
                expected = f"batch {batch}, without guidance"
                check(len(value) == batch, f"{name} of {self._family.name}", value, expected)
                found[name] = value[index].cpu()
            elif value is not None:
                found[name] = torch.tensor(value, dtype=torch.float32)
        expected = f"{TEXT} among them"
        check(TEXT in found, f"arguments of {self._family.name}", sorted(given), expected)
        return trim_texts(found)

    @staticmethod
    def is_cut(prompt: str) -> bool:
        """Return False, because a pipeline does not report that it cuts a prompt."""
        return False
