"""Reward checkpoints in the layout of HY-Video-PRFL: safetensors shards and ``.ckpt`` files."""

import os
import re
from pathlib import Path
from typing import Any

import torch

from prfl_fast.utils.io import read_json
from prfl_fast.utils.shards import read_weights

# Results of the pool: with its query added, and the attention alone.
RETURN_TYPES = ("query", "attention")
POOL_HEADS = "pool_num_heads"  # our key of config.json


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


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's ``config.json``; nothing if it has none."""
    try:
        return dict(read_json(folder / "config.json"))
    except (OSError, ValueError, TypeError):
        return {}


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


def reference_parts(folder: Path) -> tuple[Path, Path, Path] | None:
    """Return backbone, head and pool of the newest step in the folder of a training run.

    None means that the folder has no such files.
    """
    steps = []
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        step = checkpoint.name.rpartition("-")[2]
        head, pool = (folder / "mlp" / f"{n}_step_{step}.ckpt" for n in ("mlp", "query_attention"))
        if step.isdecimal() and head.is_file() and pool.is_file():
            steps.append((int(step), (checkpoint, head, pool)))
    return max(steps)[1] if steps else None
