"""Reward checkpoints in the layout of HY-Video-PRFL: safetensors shards and ``.ckpt`` files."""

import os
import re
from pathlib import Path

import torch

from prfl_fast.utils.io import read_json
from prfl_fast.utils.shards import read_weights

# Results of the pool: with its query added, and the attention alone.
RETURN_TYPES = ("query", "attention")

def read_blocks(folder: Path, num_blocks: int | None) -> tuple[dict[str, torch.Tensor], int]:
    """Read the embeddings and the first ``num_blocks`` blocks from a folder of safetensors.

    The files use official Wan's parameter names, with or without an index; the head is omitted.
    None reads all blocks. The second result is the number of blocks.

    Raises:
        FileNotFoundError: if the folder, or a file that the index names, is missing.
        ValueError: if a file is truncated, or a tensor is in two files.
    """
    state = {
        name: tensor
        for name, tensor in read_weights(folder).items()
        if (num_blocks is None or _block_index(name) < num_blocks) and not name.startswith("head.")
    }
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


def _block_index(name: str) -> int:
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


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
