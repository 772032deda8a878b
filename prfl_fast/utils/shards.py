"""Read and write weights in one file or in shards, one tensor in memory at a time."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from prfl_fast.utils.checks import check
from prfl_fast.utils.io import load_pickled, load_tensors, read_json, write_atomic

SHARD_BYTES = 5 * 1024**3  # the limit of diffusers and HY-Video-PRFL
_SHARDS = "diffusion_pytorch_model"
_INDEX = f"{_SHARDS}.safetensors.index.json"
# Names of the files that save_shards writes.
SHARD_FILES = rf"{_SHARDS}[-\w]*\.safetensors(\.index\.json)?"
_DTYPES = {  # names in the header of safetensors
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8",
}  # fmt: skip

Change = Callable[[str, torch.Tensor], torch.Tensor]


def write_tensors(
    state: dict[str, torch.Tensor],
    path: Path,
    change: Change | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file atomically, tensor by tensor, and empty ``state`` on the way.

    A file whose tensors are mapped is unmapped with the last of them. ``change`` gets the name and
    value of each tensor when it is written, and returns the values to write, of the same shape and
    dtype. safetensors' own writer needs all of them at once, and orders metadata at random.

    Raises:
        ValueError: if a dtype is not one of safetensors.
        OSError: if the file cannot be written.
    """
    # Wide dtypes first, as safetensors orders them, so that every tensor is aligned. Else the order
    # stays that of the files read, so that few of them are mapped at a time.
    names = sorted(state, key=lambda name: -state[name].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor, start = state[name], end
        check(tensor.dtype in _DTYPES, name, tensor.dtype, "a dtype that safetensors holds")
        end += tensor.numel() * tensor.element_size()
        form = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = form | {"data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with write_atomic(path) as temporary, open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                value = state.pop(name).detach()
                value = value if change is None else change(name, value)
                file.write(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    except OSError as error:  # of a full disk, it names no file
        raise OSError(f"{path}: cannot be written: {error}") from error


def save_shards(
    state: dict[str, torch.Tensor],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
    change: Change | None = None,
) -> None:
    """Write safetensors files of at most ``shard_bytes`` bytes, with an index for several files.

    ``change``, and the emptied ``state``, are those of :func:`write_tensors`.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    for name in list(state):
        tensor = state.pop(name)
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > shard_bytes:  # a larger tensor gets its own file
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + nbytes, total + nbytes
    if len(shards) == 1:
        write_tensors(shards[0], folder / f"{_SHARDS}.safetensors", change)
        return
    files = [f"{_SHARDS}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {name: file for shard, file in zip(shards, files, strict=True) for name in shard}
    del tensor  # the last one
    for shard, file in zip(shards, files, strict=True):
        write_tensors(shard, folder / file, change)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def read_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Map the tensors of a file, or of a folder's shards; bytes are read when a tensor is used.

    A folder holds safetensors, with or without an index, or one ``.pth``.

    Raises:
        FileNotFoundError: if the file or folder, or a file that the index names, is missing.
        ValueError: if a file is truncated or no state dict, or a tensor is in two files.
    """
    path = Path(path)
    places: dict[str, Path] = {}
    state: dict[str, torch.Tensor] = {}
    for file in [path] if path.is_file() else _shard_files(path):
        for name, tensor in read_state(file).items():
            place = places.setdefault(name, file)
            if place is not file:
                raise ValueError(f"{path}: {name} is in {place.name} and in {file.name}")
            state[name] = tensor
    return state


def _shard_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.pth"))
    if len(files) > 1 and files[0].suffix == ".pth":
        raise ValueError(f"{folder}: holds {len(files)} .pth files. Give the one of the model")
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


def read_state(file: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Map a state dict written by safetensors or ``torch.save``; only tensors are unpickled.

    A missing file raises ``FileNotFoundError``, a truncated or other file ``ValueError``.
    """
    path = Path(file)
    if path.suffix == ".safetensors":
        return load_tensors(path)
    expected = "safetensors or a .pth, as GGUF holds quantized blocks"
    check(path.suffix != ".gguf", "file", str(path), expected)
    state = load_pickled(path, mmap=True)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    values = state.values() if isinstance(state, Mapping) else [None]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise ValueError(f"{path}: holds {type(state).__name__}, expected a state dict of tensors")
    return dict(state)
