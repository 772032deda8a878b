"""Reward checkpoints in the layout of HY-Video-PRFL: safetensors shards and ``.ckpt`` files."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from prfl_fast.utils.io import load_pickled, load_tensors, open_tensors, read_json, save_tensors

SHARD_BYTES = 5 * 1024**3  # the limit of diffusers and HY-Video-PRFL
_SHARDS = "diffusion_pytorch_model"
_INDEX = f"{_SHARDS}.safetensors.index.json"
# Results of the pool: with its query added, and the attention alone.
RETURN_TYPES = ("query", "attention")
# Names of the files that save_shards writes.
SHARD_FILES = rf"{_SHARDS}[-\w]*\.safetensors(\.index\.json)?"


def save_shards(state: Mapping[str, torch.Tensor], folder: Path, shard_bytes: int) -> None:
    """Write safetensors files of at most ``shard_bytes`` bytes, with an index for several files."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name, tensor in state.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > shard_bytes:  # a larger tensor gets its own file
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + nbytes, total + nbytes
    if len(shards) == 1:
        save_tensors(shards[0], folder / f"{_SHARDS}.safetensors")
        return
    files = [f"{_SHARDS}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for shard, file in zip(shards, files, strict=True):
        save_tensors(shard, folder / file)
    weight_map = {name: file for shard, file in zip(shards, files, strict=True) for name in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_blocks(folder: Path, num_blocks: int | None) -> tuple[dict[str, torch.Tensor], int]:
    """Read the embeddings and the first ``num_blocks`` blocks from a folder of safetensors.

    The files use official Wan's parameter names, with or without an index; the head is omitted.
    None reads all blocks. The second result is the number of blocks.

    Raises:
        FileNotFoundError: if the folder, or a file that the index names, is missing.
        ValueError: if a file is truncated, or a tensor is in two files.
    """
    places: dict[str, Path] = {}
    state: dict[str, torch.Tensor] = {}
    for file in _shard_files(folder):
        with open_tensors(file) as opened:
            for name in opened.keys():
                place = places.setdefault(name, file)
                if place is not file:
                    raise ValueError(f"{folder}: {name} is in {place.name} and in {file.name}")
                wanted = num_blocks is None or _block_index(name) < num_blocks
                if wanted and not name.startswith("head."):
                    state[name] = opened.get_tensor(name)
    if num_blocks is None:
        num_blocks = 1 + max(map(_block_index, state), default=-1)
    return state, num_blocks


def read_return_type(folder: Path) -> str | None:
    """Return the ``return_type`` in a folder's ``config.json``; None if it stores none."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    return config.get("return_type") if isinstance(config, dict) else None


def _shard_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            names = set(read_json(index)["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not an index of safetensors. Copy it again") from error
        files = [folder / name for name in sorted(names)]
    if not files:
        raise FileNotFoundError(f"{folder}: no such folder, or no .safetensors file in it")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, but the index names it. Copy it again")
    return files


def _block_index(name: str) -> int:
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def read_state(file: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a state dict written by safetensors or ``torch.save``; only tensors are unpickled.

    A missing file raises ``FileNotFoundError``, a truncated or other file ``ValueError``.
    """
    path = Path(file)
    if path.suffix == ".safetensors":
        return load_tensors(path)
    state = load_pickled(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    values = state.values() if isinstance(state, Mapping) else [None]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise ValueError(f"{path}: holds {type(state).__name__}, expected a state dict of tensors")
    return dict(state)


def check_replaceable(folder: str | os.PathLike[str], *patterns: str) -> None:
    """Raise ``ValueError`` unless saving would replace only files whose names match a pattern."""
    path = Path(folder)
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    others = [n for n in names if not any(re.fullmatch(pattern, n) for pattern in patterns)]
    if path.is_file():
        raise ValueError(f"{path} is a file. Choose a new folder")
    if others:
        listed = ", ".join(others[:3])
        raise ValueError(f"{path} holds {listed}, which saving would remove. Choose a new folder")
