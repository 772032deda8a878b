"""Save and load a model: all of it, or the adapter that trains, in the format of diffusers."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prfl_fast.models.experts import FOLDERS, Experts
from prfl_fast.models.other import VelocityModel
from prfl_fast.parallel.ranks import Ranks
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training.sharded_checkpoint import MODEL, any_sharded, copy_into, write_gathered
from prfl_fast.utils.adapters import (
    ADAPTER_METADATA,
    PIPELINE_PART,
    adapter_scales,
    alpha_key,
    pattern_value,
    scale_of,
    trained_adapters,
)
from prfl_fast.utils.checks import check
from prfl_fast.utils.digests import DIGESTS, check_folder, write_digests
from prfl_fast.utils.io import check_fit, load_tensors, open_tensors, read_json, save_tensors
from prfl_fast.utils.modules import layers_of, unwrap
from prfl_fast.utils.optional import need
from prfl_fast.utils.sharded import class_name, is_dtensor, is_fsdp, local_part

# Kinds of adapters whose scale in a layer is alpha / rank.
_SCALED = ("LORA", "LOHA", "LOKR")
_UNSAVABLE = (torch.complex128, torch.quint8, torch.qint8, torch.qint32)


def adapter_name(model: torch.nn.Module) -> str | None:
    """Return the name of the peft adapter that is saved, or None if ``model`` has no adapter.

    It is the only adapter, or of several the one that trains; frozen ones are part of the model.

    Raises:
        ValueError: if the model has several adapters, and not exactly one of them trains.
    """
    names = list(getattr(model, "peft_config", None) or ())
    if len(names) < 2:
        return names[0] if names else None
    trained = trained_adapters(model)
    hint = "Freeze or delete the others: one adapter is saved"
    check(len(trained) == 1, f"adapters that train, of {names},", trained, "one", hint=hint)
    return trained[0]


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors to save, not copied: those of the adapter, or the whole state dict.

    Raises:
        ValueError: if the model has an adapter and also trains parameters outside it.
    """
    name = adapter_name(model)
    if name is None:
        return dict(model.state_dict())
    read = need("peft").get_peft_model_state_dict
    tensors: dict[str, torch.Tensor] = read(model, adapter_name=name)
    stored = {local_part(t).data_ptr() for t in tensors.values()}
    for other, parameter in model.named_parameters():
        if parameter.requires_grad and local_part(parameter).data_ptr() not in stored:
            raise ValueError(
                f"{other} is trained beside adapter {name!r}, but only the adapter is saved. "
                "Freeze it, or list it in peft's modules_to_save"
            )
    return tensors


def _model_file(model: torch.nn.Module) -> str:
    if adapter_name(model) is not None:
        return "pytorch_lora_weights.safetensors"
    prefix = "diffusion_pytorch_" if hasattr(model, "save_config") else ""
    return f"{prefix}model.safetensors"


def _adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors, not copied, by the names that ``load_lora_weights`` reads."""
    stored = stored_tensors(model).items()
    return {PIPELINE_PART + n.removeprefix("base_model.model."): t for n, t in stored}


def _adapter_settings(model: torch.nn.Module) -> dict[str, Any]:
    """Return the adapter's configuration as plain values, for diffusers to read rank and alpha.

    Alpha includes the weight that ``set_adapters`` gave the adapter, in each layer.
    """
    name = adapter_name(model)
    config = model.peft_config[name].to_dict()  # type: ignore[union-attr, index, operator]
    plain: dict[str, Any] = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    if name is not None and plain.get("peft_type") in _SCALED:
        scales = adapter_scales(model, name)
        weights = {
            layer: scale / (scale_of(plain, layer) or 1.0) for layer, scale in scales.items()
        }
        first = next(iter(weights.values()), 1.0)
        if all(math.isclose(weight, first, rel_tol=1e-9) for weight in weights.values()):
            if not math.isclose(first, 1.0, rel_tol=1e-9):
                plain[alpha_key(plain)] *= first
                patterns = plain.get("alpha_pattern") or {}
                plain["alpha_pattern"] = {k: v * first for k, v in patterns.items()}
        else:
            alphas = {k: pattern_value(plain, "alpha", k) * w for k, w in weights.items()}
            plain["alpha_pattern"] = alphas
    return {PIPELINE_PART + key: value for key, value in plain.items()}


def without_function(model: torch.nn.Module) -> Any:
    """Return the model whose names are saved: without wrappers but peft's, and without function."""
    *wrappers, bare = layers_of(model)
    if isinstance(bare, VelocityModel):
        return unwrap(bare.model)
    return next((layer for layer in wrappers if hasattr(layer, "get_base_model")), bare)


def check_savable(model: torch.nn.Module, shards: bool = False) -> None:
    """Check that ``model`` can be saved, before a training whose result would be lost.

    ``shards`` allows parts of sharded tensors, of a run that knows its other ranks.

    Raises:
        ValueError: if the model trains several adapters or parameters beside an adapter, or a
            tensor has no plain bytes (torchao's weights, meta tensors, shards).
        MissingExtraError: if safetensors, or the peft of an adapter, is not installed.
    """
    need("safetensors.torch")
    if isinstance(model, Experts):
        for expert in model.trained:
            check_savable(getattr(model, expert), shards)
        return
    model = without_function(model)
    for name, tensor in stored_tensors(model).items():
        kind, hint = type(tensor).__name__, "Train an adapter, which is saved alone"
        hint = "Give Trainer the mesh" if is_dtensor(tensor) else hint
        tensor = local_part(tensor) if shards else tensor
        plain = isinstance(tensor, torch.Tensor) and not is_traceable_wrapper_subclass(tensor)
        if plain and (tensor.is_meta or is_lazy(tensor)):
            plain, kind = False, "a meta tensor or one without a shape yet"
        elif plain and (tensor.layout != torch.strided or tensor.dtype in _UNSAVABLE):
            plain, kind = False, f"{tensor.layout} of {tensor.dtype}"
        expected = "a plain tensor, as safetensors cannot hold it"
        check(plain, name, kind, expected, hint=hint)
    if adapter_name(model) is not None:
        try:
            json.dumps(_adapter_settings(model))
        except TypeError as error:
            raise ValueError(f"the adapter's configuration cannot be saved: {error}") from error


def model_parts(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors of a model that is saved in parts, not copied; none for an adapter."""
    found: dict[str, torch.Tensor] = {}
    experts = model.trained if isinstance(model, Experts) else ()
    for prefix, part in [(f"{FOLDERS[name]}.", getattr(model, name)) for name in experts] or [
        ("", model)
    ]:
        bare = without_function(part)
        if adapter_name(bare) is not None:  # it is small
            return {}
        found |= {f"{MODEL}{prefix}{n}": t for n, t in stored_tensors(bare).items()}
    return found


def save_model(model: torch.nn.Module, folder: Path, ranks: Ranks | None = None) -> None:
    """Write ``model`` into ``folder``; :mod:`prfl_fast.training.checkpoint` lists the files.

    All ``ranks`` call it. Rank 0 writes, and sharded tensors are gathered one by one.
    """
    ranks = ranks or Ranks()
    if isinstance(model, Experts):
        for expert in model.trained:
            save_model(getattr(model, expert), folder / FOLDERS[expert], ranks)
        return
    model = without_function(model)
    path, metadata = folder / _model_file(model), {"format": "pt"}
    adapter = adapter_name(model) is not None
    if adapter:
        tensors = _adapter_tensors(model)
        metadata[ADAPTER_METADATA] = json.dumps(_adapter_settings(model), sort_keys=True)
    else:
        tensors = stored_tensors(model)

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if not adapter and hasattr(model, "save_config"):
            model.save_config(folder)  # type: ignore[operator]
            if is_fsdp(model):  # whose class has a name of its own
                content = {**read_json(folder / "config.json"), "_class_name": class_name(model)}
                text = json.dumps(content, indent=2, sort_keys=True)  # as diffusers writes it
                (folder / "config.json").write_text(text + "\n")

    ranks.on_main(begin)
    if any_sharded(tensors):
        write_gathered(tensors, path, ranks, metadata)
    else:
        ranks.on_main(save_tensors, tensors, path, metadata)
    if adapter:
        ranks.on_main(write_digests, folder, (path.name,))


def save_reward(reward: LatentRewardModel, folder: Path, ranks: Ranks) -> None:
    """Write a reward model with its ``save`` on rank 0; sharded weights are gathered one by one."""
    tensors = reward.state_dict()
    if not any_sharded(tensors):
        ranks.on_main(reward.save, folder)
        return
    ranks.on_main(reward.check_savable, folder)  # an error before any rank waits for another

    def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
        write_gathered(tensors, path, ranks)

    if ranks.main:
        reward.save(folder, write=write)
    else:
        write(tensors, folder)


def load_model(model: torch.nn.Module, folder: Path) -> None:
    """Copy the weights in a folder of :func:`save_model` into ``model``, in place.

    The folder may hold a file of diffusers' ``save_lora_weights`` or ``save_lora_adapter``. An
    adapter is cast to the dtype of the adapter in ``model``.

    Raises:
        ValueError: if the file is missing, truncated, or of another model, or if its adapter has
            another rank or scale. The model is unchanged then.
    """
    parts = {folder: model}
    if isinstance(model, Experts):
        parts = {folder / FOLDERS[name]: getattr(model, name) for name in model.trained}
    # The list makes all checks run before the first copy.
    for found in [_read_model(part, path) for path, part in parts.items()]:
        copy_into(*found)


def _read_model(
    model: torch.nn.Module, folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], Path]:
    """Return the tensors in a folder, those of ``model`` that they replace, and the file's path."""
    model = without_function(model)
    path = folder / _model_file(model)
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    hint = "A run with other adapter settings may have written the folder"
    check(path.is_file(), f"content of {folder}", found, path.name, hint=hint)
    tensors = load_tensors(path)
    if adapter_name(model) is None:
        targets = stored_tensors(model)
    else:
        if (folder / DIGESTS).is_file():  # diffusers writes none
            check_folder(folder, (path.name,), "adapter")
        with open_tensors(path) as opened:
            saved = json.loads((opened.metadata() or {}).get(ADAPTER_METADATA, "{}"))
        _check_adapter(model, saved, path)
        targets = _adapter_tensors(model)
        tensors = {PIPELINE_PART + n.removeprefix(PIPELINE_PART): t for n, t in tensors.items()}
        tensors = {n: t.to(targets[n].dtype) if n in targets else t for n, t in tensors.items()}
    check_fit(targets, tensors, path, dtypes=True)
    return tensors, targets, path


def _check_adapter(model: torch.nn.Module, saved: Mapping[str, Any], path: Path) -> None:
    """Raise ``ValueError`` unless the adapter in a file has the rank and scales of the model's."""
    part, name = len(PIPELINE_PART), adapter_name(model)
    wanted = {key[part:]: value for key, value in _adapter_settings(model).items()}
    # As in diffusers, alpha equals the rank in a file without metadata.
    rank, alpha = wanted.get("r"), alpha_key(wanted)
    defaults = {"r": rank, alpha: rank, "use_rslora": False}
    defaults |= {"rank_pattern": wanted.get("rank_pattern"), "alpha_pattern": {}}
    found = {k: saved.get(PIPELINE_PART + k, saved.get(k, v)) for k, v in defaults.items()}
    hint = "Add the adapter with the file's value"
    for key in ("r", alpha, "use_rslora"):
        label, value = f"{key} of the adapter in {path}", found[key]
        ok = key not in wanted or value == wanted[key]
        if not ok and key == alpha and isinstance(value, (int, float)):
            ok = math.isclose(value, wanted[key], rel_tol=1e-6)
        check(ok, label, value, f"this model's {wanted.get(key)!r}", hint=hint)
    if name is None or wanted.get("peft_type") not in _SCALED:
        return
    for layer, scale in adapter_scales(model, name).items():
        value, label = scale_of(found, layer), f"scale of {layer} in the adapter in {path}"
        ok = math.isclose(value, scale, rel_tol=1e-6)
        check(ok, label, value, f"this model's {scale}", hint="Add it with the file's patterns")
