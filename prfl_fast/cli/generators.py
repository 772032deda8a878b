"""Load the generator that samples: a pipeline's own, a trained one, or with an adapter."""

from pathlib import Path

import torch
from torch import nn

from prfl_fast.cli import loading
from prfl_fast.memory.policy import MemoryConfig, apply_memory, check_available
from prfl_fast.models.experts import FOLDERS, Experts
from prfl_fast.models.loading import load_transformer
from prfl_fast.models.lora_files import add_lora_file, lora_file
from prfl_fast.models.registry import patch
from prfl_fast.training.checkpoint import FINAL
from prfl_fast.utils.checks import check


def weights_path(path: str | Path) -> Path:
    """Return the weights of a path, which may be that of a run.

    Raise ``ValueError`` if there is none, or the run has saved nothing.
    """
    path = Path(path)
    check(path.exists(), "weights", str(path), "a file or folder that exists")
    if (path / FINAL).exists():
        return path / FINAL
    unfinished = (path / "config.yaml").is_file() and not (path / "config.json").is_file()
    hint = "The run has saved no checkpoint yet"
    check(not unfinished, "weights", str(path), f"a run with {FINAL}", hint=hint)
    return path


def load_sampler_model(
    model: str,
    weights: str | None,
    weight_dtype: str,
    device: torch.device,
    *,
    patched: bool = True,
) -> nn.Module:
    """Return a frozen generator on the device, in eval mode.

    Args:
        model: folder of the pipeline, or of its transformer.
        weights: None for the pipeline's own; an adapter of any trainer, which is added to it; a
            transformer in place of it; or a run of ``prfl-fast train``. Of two experts, a run's
            folders ``transformer`` and ``transformer_2`` hold those that were trained.
        weight_dtype: of the weights: ``fp32``, ``bf16``, ``fp8`` or ``nf4``.
        patched: run it on the fused kernels.

    Raises:
        ValueError: if a model or an adapter cannot be read, or does not fit.
    """
    path = None if weights is None else weights_path(weights)
    parts = _parts(path)
    whole = [name for name, part in parts.items() if lora_file(part) is None]
    memory = MemoryConfig(weight_dtype=weight_dtype)  # type: ignore[arg-type]
    check_available(memory, device)
    dtype = torch.float32 if weight_dtype == "fp32" else torch.bfloat16
    if whole == ["model"]:
        transformer = loading.load_model(str(parts["model"]), dtype)
    else:
        transformer = loading.load_model(model, dtype)
    for name in whole:
        if name != "model":
            _check_experts(transformer, path)
            setattr(transformer, name, load_transformer(parts[name], dtype))
    apply_memory(transformer.eval().requires_grad_(False), memory, device=device)
    for name, part in parts.items():
        if name not in whole:
            if name == "model":
                hint = "Give a folder with the adapters transformer and transformer_2"
                one = not isinstance(transformer, Experts)
                check(one, "weights", str(path), "two adapters of two experts", hint=hint)
                add_lora_file(transformer, part)
            else:
                add_lora_file(_check_experts(transformer, path).use(name), part)
    return patch(transformer) if patched else transformer


def _check_experts(model: nn.Module, path: Path | None) -> Experts:
    ok = isinstance(model, Experts)
    check(ok, "weights", str(path), "those of one transformer: the model has no experts")
    assert isinstance(model, Experts)
    return model


def _parts(path: Path | None) -> dict[str, Path]:
    """Return the files of a path by expert, or as ``model``; none for None."""
    if path is None:
        return {}
    folders = {name: path / folder for name, folder in FOLDERS.items()}
    pipeline = (path / "model_index.json").is_file()
    if any(folder.is_dir() for folder in folders.values()) and not pipeline:
        return {name: folder for name, folder in folders.items() if folder.is_dir()}
    return {"model": path}
