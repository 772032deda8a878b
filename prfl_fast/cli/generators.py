"""Load the generator that samples: a pipeline's own, a trained one, or with an adapter."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from prfl_fast.cli import loading
from prfl_fast.memory.policy import MemoryConfig, apply_memory, check_available
from prfl_fast.models.experts import FOLDERS, NAMES, Experts
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


def check_weights(
    path: str | Path, folders: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check weights before the work starts, without reading those of a transformer.

    Args:
        path: see :func:`load_sampler_model`.
        folders: of the pipeline's transformers; two are experts.
        shapes: of latents and conditions by name, without batch dimension; if there are none,
            they are not checked.

    Raises:
        ValueError: if the weights cannot be read, or do not fit the pipeline or the shapes.
    """
    path = weights_path(path)
    for name, part in _parts(path).items():
        if name == "model" and lora_file(part) is None:
            for folder in loading.folders_of(str(part))[0]:
                _check_shapes(folder, shapes)
            continue
        if name == "model":
            hint = "Give a folder with the adapters transformer and transformer_2"
            check(len(folders) == 1, "weights", str(path), "two adapters of two experts", hint=hint)
        else:
            expected = "those of one transformer: the model has no experts"
            check(len(folders) == 2, "weights", str(path), expected)
        if lora_file(part) is None:
            _check_shapes(str(part), shapes)
        else:
            folder = folders[0] if name == "model" else folders[NAMES.index(name)]
            with warnings.catch_warnings():
                # torch warns that meta tensors take no values.
                warnings.simplefilter("ignore")
                add_lora_file(loading.empty_model(folder), part)


def _check_shapes(folder: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    model = loading.empty_model(folder)
    if shapes:
        loading.check_shapes(shapes, model, f"{folder}: does not fit the videos")


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
        ValueError: if a model or an adapter cannot be read, or does not fit; :func:`check_weights`
            finds most of this before.
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
            setattr(transformer, name, load_transformer(parts[name], dtype))
    apply_memory(transformer.eval().requires_grad_(False), memory, device=device)
    for name, part in parts.items():
        if name not in whole:
            changed = transformer.use(name) if isinstance(transformer, Experts) else transformer
            add_lora_file(changed, part)
    return patch(transformer) if patched else transformer


def _parts(path: Path | None) -> dict[str, Path]:
    """Return the files of a path by expert, or as ``model``; none for None."""
    if path is None:
        return {}
    folders = {name: path / folder for name, folder in FOLDERS.items()}
    pipeline = (path / "model_index.json").is_file()
    if any(folder.is_dir() for folder in folders.values()) and not pipeline:
        return {name: folder for name, folder in folders.items() if folder.is_dir()}
    return {"model": path}
