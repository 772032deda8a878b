"""Read the lists of HY-Video-PRFL: text files of paths to JSON files with paths to .npy files.

Each JSON file describes a video. ``vae_latent_path`` holds latents ``[1, C, F, H, W]``;
``textlong_path`` and ``textshort_path`` text states ``[1, T, D]``; ``imgclip_path`` states of N
images ``[N, 257, D]``; ``f1_black_path`` the latents of the given frames, ``[1, C, F, H, W]``, or
with mask channels before them. The other names that its dataset classes know are read as well.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from prfl_fast.data.clip_lists import CAPTION
from prfl_fast.data.manifest import (
    EMPTY_PROMPT,
    NEGATIVE_PROMPT,
    SHORT,
    LatentDataset,
)
from prfl_fast.data.rows import read_text
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.conditions import IMAGE, LATENT, TEXT
from prfl_fast.utils.checks import check, is_number
from prfl_fast.utils.io import read_json
from prfl_fast.utils.optional import need

SUFFIX = ".list"
# Keys of a JSON file by tensor; the first one that it has counts.
_KEYS = {
    "latents": ("video_vae_latent_path", "vae_latent_path", "latents_path"),
    IMAGE: ("image_embeds", "imgclip_path"),
    LATENT: ("f1_black_path", "latents_condition_path"),
}
_LONG, _SHORT = ("textlong_path",), ("save_textshort_path", "textshort_path")
_TEXTS = (*_SHORT, "text_en_path", *_LONG)  # of a video without both captions
# Its texts of the empty and of the negative prompt, from its working directory.
_NULL, _UNCOND = "temp_data/null/wanx/null.npy", "temp_data/null/wanx/uncond.npy"
_MASK_CHANNELS = 4


def open_latents(path: str | os.PathLike[str], *, allow_outside: bool = False) -> LatentDataset:
    """Open a dataset folder, or a list of HY-Video-PRFL, whose name ends in ``.list``."""
    kind = ReferenceList if Path(path).suffix == SUFFIX else LatentDataset
    return kind(path, allow_outside=allow_outside)


class ReferenceList(LatentDataset):
    """Open a list of HY-Video-PRFL as a dataset of videos, as :class:`LatentDataset` does a folder.

    Relative paths start at the working directory, as there, or else at the list's folder or one
    above it: the first from which the first path leads to a file. A given frame without mask
    channels gets them: ones in the first frame, zeros in the others. A video with a long and a
    short caption has the long one as its text. Labels are those that end in ``_quality`` or are
    called ``text_alignment``; a null is no label. A path may repeat.

    Args:
        allow_outside: allow paths that lead out of the folder at which relative ones start.

    Raises:
        FileNotFoundError: if there is no such list.
        ValueError: if the list or a file is malformed or incomplete; the message names the line.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_outside: bool = False) -> None:
        self.folder = self.manifest = Path(path)
        if not self.manifest.is_file():
            raise FileNotFoundError(f"{path}: no such list")
        self._images = True
        self._known: dict[str, dict[str, tuple[tuple, str]]] = {}  # headers by JSON file
        self._open(allow_outside)

    def drop_images(self) -> None:
        """Leave out image states and given frames, which its lists have for text-to-video too."""
        self._images = False
        for bucket in self.buckets:
            for name in (IMAGE, LATENT):
                bucket.shapes.pop(name, None)

    def _read_manifest(self) -> list[dict[str, Any]]:
        lines = read_text(self.manifest).split("\n")
        named = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip()]
        check(bool(named), str(self.manifest), "", "a path of a JSON file per line")
        places = (Path(), *self.manifest.absolute().parents)
        found = (place for place in places if (place / named[0][1]).is_file())
        self._start = next(found, Path())
        records: dict[str, dict[str, Any]] = {}
        for number, path in named:
            if path not in records:
                records[path] = self._describe(path, f"{self.manifest}:{number}: {path}")
        return [{**records[path], "line": number} for number, path in named]

    def _describe(self, path: str, where: str) -> dict[str, Any]:
        """Return the record of a JSON file: id, labels, and the paths of its tensors."""
        try:
            content: Any = read_json(self._start / path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: not a readable JSON file ({error})") from error
        check(isinstance(content, dict), f"{where}: content", content, "a JSON object")
        paths = {
            name: content[key] for name, keys in _KEYS.items() for key in _first(content, keys)
        }
        long, short, any_text = (_first(content, keys) for keys in (_LONG, _SHORT, _TEXTS))
        if long and short:
            paths |= {TEXT: content[long[0]], SHORT: content[short[0]]}
        elif any_text:
            paths[TEXT] = content[any_text[0]]
        for name, keys in (("latents", _KEYS["latents"]), (TEXT, _TEXTS)):
            check(name in paths, f"{where}: {name}", None, f"a path under {' or '.join(keys)}")
        for name, value in paths.items():
            check(isinstance(value, str), f"{where}: {name}", value, "a path")
        labels = {
            key: value
            for key, value in content.items()
            if (key.endswith("_quality") or key == "text_alignment") and value is not None
        }
        for key, value in labels.items():
            ok = isinstance(value, (bool, str)) or is_number(value)
            check(ok, f"{where}: {key}", value, "a finite number, a string or null")
        captions = (content.get(key) for key in CAPTION)
        return {
            "id": str(content.get("source_id", Path(path).stem)),
            "caption": next((text for text in captions if isinstance(text, str)), ""),
            "labels": labels,
            "meta": path,
            "paths": paths,
        }

    def _base(self) -> Path:
        return self._start

    def _where(self, record: Mapping[str, Any], key: str) -> str:
        return f"{self.manifest}:{record['line']}: {record['meta']}"

    def _paths(self, record: Mapping[str, Any], key: str) -> dict[str, str]:
        paths: dict[str, str] = record["paths"]
        return {n: p for n, p in paths.items() if self._images or n not in (IMAGE, LATENT)}

    def _headers(self, record: Mapping[str, Any], key: str) -> dict[str, tuple[tuple, str]]:
        if record["meta"] not in self._known:
            arrays = {n: _read_header(self._start / p) for n, p in self._paths(record, key).items()}
            channels = arrays["latents"][0][1:2]
            self._known[record["meta"]] = {
                name: (_shape(name, shape, channels), dtype)
                for name, (shape, dtype) in arrays.items()
            }
        return self._known[record["meta"]]

    def _tensors(self, record: Mapping[str, Any], key: str) -> dict[str, torch.Tensor]:
        tensors = {
            name: torch.from_numpy(_read_array(self._start / path))
            for name, path in self._paths(record, key).items()
        }
        for name, tensor in tensors.items():
            tensors[name] = tensor.flatten(0, 1) if name == IMAGE else tensor[0]
        given = tensors.get(LATENT)
        if given is not None and len(given) == len(tensors["latents"]):
            mask = given.new_zeros(_MASK_CHANNELS, *given.shape[1:])
            mask[:, 0] = 1
            tensors[LATENT] = torch.cat([mask, given])
        return tensors

    def digest(self) -> str:
        """Return a SHA-256 digest of the list, and of the paths and labels of all its videos."""
        digest = hashlib.sha256(self.manifest.read_bytes())
        for record in self._records:
            digest.update(json.dumps([record["labels"], record["paths"]]).encode())
        return digest.hexdigest()

    def empty_prompt_file(self) -> Path:
        """Return ``empty_prompt.safetensors`` beside the list, or else HY-Video-PRFL's own file."""
        ours = self.manifest.parent / EMPTY_PROMPT
        return ours if ours.is_file() else self._start / _NULL

    def negative_prompt_file(self) -> Path:
        """Return ``negative.safetensors`` beside the list, or else HY-Video-PRFL's own file."""
        ours = self.manifest.parent / NEGATIVE_PROMPT
        return ours if ours.is_file() else self._start / _UNCOND

    def read_prompt(self, path: Path) -> Conditions:
        """Read the text states ``[T, D]`` of a prompt from safetensors, or ``[1, T, D]`` .npy."""
        if path.suffix != ".npy":
            return super().read_prompt(path)
        array = _read_array(path)
        check(array.ndim == 3, str(path), list(array.shape), "[1, T, D]")
        return {TEXT: torch.from_numpy(array)[0]}


def _first(content: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    """Return the first key that a JSON object has, in a list that is empty for none."""
    return [key for key in keys if key in content][:1]


def _shape(name: str, shape: tuple[int, ...], channels: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor of a sample from that of its array."""
    if name == IMAGE:
        return (shape[0] * shape[1], *shape[2:]) if len(shape) > 1 else shape
    masked = name == LATENT and shape[1:2] == channels
    return (shape[1] + _MASK_CHANNELS, *shape[2:]) if masked else tuple(shape[1:])


def _read_header(path: Path) -> tuple[tuple[int, ...], str]:
    """Return shape and dtype of the array in a .npy file."""
    form = need("numpy").lib.format
    with _whole(path), path.open("rb") as file:
        # Mapping the array checks this too, but opening 10,000 videos took 24 s of CPU, not 11.
        old = form.read_magic(file) == (1, 0)
        shape, _, dtype = (form.read_array_header_1_0 if old else form.read_array_header_2_0)(file)
        missing = file.tell() + prod(shape) * dtype.itemsize - path.stat().st_size
        if missing > 0:
            raise ValueError(f"{missing} bytes are missing")
    return shape, dtype.name


def _read_array(path: Path) -> Any:
    with _whole(path):
        return need("numpy").load(path, allow_pickle=False)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Turn errors about the content of a .npy file into a ``ValueError`` that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        yield
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole .npy file ({error}). Copy it again") from error
