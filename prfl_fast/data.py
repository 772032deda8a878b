"""Datasets of video latents on disk, checked as a whole before the first step.

A dataset is a folder with one safetensors file per video and a ``manifest.jsonl`` with one JSON
object per line::

    {"id": "a", "latents": "samples/a.safetensors", "labels": {"motion_quality": 1}}
    {"id": "b", "win": "samples/b-win.safetensors", "lose": "samples/b-lose.safetensors"}

The second form is a preference pair; a manifest holds one form only. Paths are relative to the
folder. A file holds ``latents [C, F, H, W]``, ``encoder_hidden_states [T, D]`` and, for
image-to-video, ``encoder_hidden_states_image [N, D]`` and ``latent_condition [C', F, H, W]``, each
of a floating-point dtype, each of one shape throughout the dataset.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from prfl_fast._extras import need
from prfl_fast.training_state import load_tensors, save_tensors, write_atomic

MANIFEST = "manifest.jsonl"
_RANKS = {
    "latents": 4,
    "encoder_hidden_states": 2,
    "encoder_hidden_states_image": 2,
    "latent_condition": 4,
}
_REQUIRED = ("latents", "encoder_hidden_states")
_DTYPES = ("F32", "BF16", "F16", "F64")


class Sample(NamedTuple):
    """One video: ``latents [C, F, H, W]``, conditions without a batch dimension, labels by name."""

    latents: torch.Tensor
    conditions: dict[str, torch.Tensor]
    labels: Mapping[str, Any] = {}
    id: str = ""


class Pair(NamedTuple):
    """Two videos, the first preferred."""

    win: Sample
    lose: Sample


class Batch(NamedTuple):
    """Stacked samples in float32: ``latents [B, C, F, H, W]``, conditions, B records of labels."""

    latents: torch.Tensor
    conditions: dict[str, torch.Tensor]
    labels: list[Mapping[str, Any]]

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``."""
        conditions = {name: tensor.to(device) for name, tensor in self.conditions.items()}
        return Batch(self.latents.to(device), conditions, self.labels)


class PairBatch(NamedTuple):
    """Stacked pairs."""

    win: Batch
    lose: Batch

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch on ``device``."""
        return PairBatch(self.win.to(device), self.lose.to(device))


def collate(samples: Sequence[Sample | Pair]) -> Batch | PairBatch:
    """Stack samples into a :class:`Batch`, pairs into a :class:`PairBatch`."""
    if isinstance(samples[0], Pair):
        pairs = cast(Sequence[Pair], samples)
        return PairBatch(_stack([p.win for p in pairs]), _stack([p.lose for p in pairs]))
    return _stack(cast(Sequence[Sample], samples))


def _stack(samples: Sequence[Sample]) -> Batch:
    conditions = {
        name: torch.stack([s.conditions[name].float() for s in samples])
        for name in samples[0].conditions
    }
    return Batch(
        torch.stack([s.latents.float() for s in samples]), conditions, [s.labels for s in samples]
    )


def epoch_order(length: int, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(length)`` that depends on the three numbers only."""
    # Any pair of small seeds and epochs gets a generator of its own, with no draw shared between
    # neighbours.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(length, generator=generator).tolist()


class Batches:
    """The endless, shuffled batches of a dataset; ``batches[n]`` depends on n and the seed only.

    There is no position to save: a run that resumes asks for the next n. An epoch drops its
    incomplete last batch.

    Args:
        dataset: anything with ``len()`` and ``[i]`` that gives a :class:`Sample` or :class:`Pair`:
            a :class:`LatentDataset`, or a list.

    Raises:
        ValueError: the dataset is smaller than one batch, or ``batch_size`` is not positive.
    """

    def __init__(self, dataset: Any, batch_size: int = 1, seed: int = 0) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        if len(dataset) < batch_size:
            raise ValueError(
                f"batch_size is {batch_size}, but the dataset has {len(dataset)} samples"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self._epoch, self._order = -1, [0]

    def __getitem__(self, n: int) -> Batch | PairBatch:
        epoch, position = divmod(n, len(self.dataset) // self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.dataset), self.seed, epoch)
        start = position * self.batch_size
        return collate([self.dataset[i] for i in self._order[start : start + self.batch_size]])


class LatentDataset:
    """A dataset folder: opening it checks every file's header, reading an item checks its values.

    Attributes:
        pairs: whether the items are :class:`Pair` or :class:`Sample`.
        shapes: of each tensor by name, the same in every file.

    Raises:
        FileNotFoundError: the folder or its manifest does not exist.
        ValueError: the manifest is empty or malformed, or a file is missing, truncated, or has
            other tensors, shapes or dtypes than expected; the message names the manifest's line.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest = self.folder / MANIFEST
        if not self.manifest.is_file():
            raise FileNotFoundError(
                f"{self.folder}: no {MANIFEST} there; write_dataset makes a dataset folder"
            )
        self._records = self._read_manifest()
        self.pairs = "win" in self._records[0]
        self.shapes: dict[str, tuple[int, ...]] = {}
        for record in self._records:
            for key in ("win", "lose") if self.pairs else ("latents",):
                self._check_file(record[key], f"{self.manifest}:{record['line']}: {key}")

    def _read_manifest(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        ids: dict[str, int] = {}
        try:
            lines = self.manifest.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.manifest}: not UTF-8 text ({error.reason})") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{self.manifest}:{number}"
            record = _parse_line(line, where)
            if records and ("win" in record) != ("win" in records[0]):
                raise ValueError(f"{where}: a manifest holds single videos or pairs, not both")
            if record["id"] in ids:
                raise ValueError(
                    f"{where}: id {record['id']!r} was used on line {ids[record['id']]}"
                )
            ids[record["id"]] = number
            records.append({**record, "line": number})
        if not records:
            raise ValueError(f"{self.manifest}: empty, expected one JSON object per line")
        return records

    def _check_file(self, name: str, where: str) -> None:
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{where}: {path} does not exist")
        safetensors = need("safetensors")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = {key: file.get_slice(key) for key in file.keys()}
                found = {
                    key: (tuple(part.get_shape()), part.get_dtype()) for key, part in header.items()
                }
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"{where}: {path} is not a whole safetensors file ({error})"
            ) from error
        for key in _REQUIRED:
            if key not in found:
                raise ValueError(
                    f"{where}: {path} has no tensor {key!r} "
                    f"(it has: {', '.join(sorted(found)) or 'none'})"
                )
        for key, (shape, dtype) in found.items():
            if key not in _RANKS:
                raise ValueError(
                    f"{where}: {path} has an unknown tensor {key!r}, expected {', '.join(_RANKS)}"
                )
            if dtype not in _DTYPES:
                raise ValueError(
                    f"{where}: {key} in {path} is {dtype}, expected one of {', '.join(_DTYPES)}"
                )
            if len(shape) != _RANKS[key] or 0 in shape:
                raise ValueError(
                    f"{where}: {key} in {path} is {list(shape)}, expected {_RANKS[key]} "
                    "dimensions, none 0"
                )
        shapes = {key: shape for key, (shape, _) in found.items()}
        condition = shapes.get("latent_condition", shapes["latents"])
        if condition[1:] != shapes["latents"][1:]:
            raise ValueError(
                f"{where}: latent_condition in {path} is {list(condition)}, its frames, height and "
                "width must be "
                f"those of latents, {list(shapes['latents'])}"
            )
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            raise ValueError(
                f"{where}: {path} has {_listed(shapes)}, earlier lines have {_listed(self.shapes)}"
            )

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample | Pair:
        """Read one item.

        Raises:
            ValueError: a file was damaged since the check, or holds NaN or infinity.
        """
        record = self._records[index]
        if self.pairs:
            return Pair(*(self._load(record, key) for key in ("win", "lose")))
        return self._load(record, "latents")

    def _load(self, record: Mapping[str, Any], key: str) -> Sample:
        where = f"{self.manifest}:{record['line']}: {key}"
        tensors = load_tensors(self.folder / record[key])
        for name, tensor in tensors.items():
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            if bad:
                raise ValueError(
                    f"{where}: {name} in {self.folder / record[key]} has {bad} NaN or infinite "
                    "values"
                )
        return Sample(tensors.pop("latents"), tensors, record.get("labels", {}), record["id"])

    def labels(self) -> list[tuple[str, Mapping[str, Any]]]:
        """``(place, labels)`` of every item; the place names file and line. Reads no tensors."""
        return [(f"{self.manifest}:{r['line']}", r.get("labels", {})) for r in self._records]

    def ids(self) -> list[str]:
        """The items' ids."""
        return [record["id"] for record in self._records]


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _parse_line(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: is {type(record).__name__}, expected an object")
    files = {"win", "lose"} if "win" in record or "lose" in record else {"latents"}
    expected = {"id", "labels", *files}
    for key in sorted(record.keys() - expected):
        raise ValueError(f"{where}: unknown key {key!r}, expected {', '.join(sorted(expected))}")
    for key in sorted({"id", *files}):
        if not isinstance(record.get(key), str) or not record[key]:
            raise ValueError(f"{where}: {key} is {record.get(key)!r}, expected a string")
    labels = record.get("labels", {})
    if not isinstance(labels, dict):
        raise ValueError(f"{where}: labels is {labels!r}, expected an object")
    for name, value in labels.items():
        if not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"{where}: labels.{name} is {value!r}, expected a number or a string")
    return record


def write_dataset(
    folder: str | os.PathLike[str], samples: Iterable[Sample] | Iterable[Pair]
) -> LatentDataset:
    """Write samples or pairs as a dataset folder and open it; the manifest is written last.

    A sample without an id is numbered. Tensors keep their dtype.

    Raises:
        FileExistsError: the folder already has a manifest.
        ValueError: no samples, samples mixed with pairs, or what :class:`LatentDataset` refuses.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder}: already has a {MANIFEST}")
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    lines = []

    def save(sample: Sample, name: str) -> str:
        file = f"samples/{name}.safetensors"
        save_tensors({"latents": sample.latents, **sample.conditions}, folder / file)
        return file

    for number, item in enumerate(samples):
        first = item.win if isinstance(item, Pair) else cast(Sample, item)
        record: dict[str, Any] = {"id": first.id or f"{number:06d}"}
        if isinstance(item, Pair):
            record |= {
                side: save(getattr(item, side), f"{number:06d}-{side}") for side in ("win", "lose")
            }
        else:
            record["latents"] = save(first, f"{number:06d}")
        if first.labels:
            record["labels"] = dict(first.labels)
        lines.append(json.dumps(record) + "\n")
    if not lines:
        raise ValueError(f"{folder}: no samples to write")
    with write_atomic(folder / MANIFEST) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return LatentDataset(folder)
