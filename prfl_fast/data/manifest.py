"""Read and write datasets of latents and conditions: a folder of tensors and its manifest.

``manifest.jsonl`` has one JSON object per line: ``{"id", "latents", "labels"}`` for a video, or
``{"id", "win", "lose", "labels"}`` for a preference pair. ``latents``, ``win`` and ``lose`` name
safetensors files in the folder; ``labels`` is optional.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.nn.functional import pad

from prfl_fast.models.adapter import FIRST_FRAME
from prfl_fast.models.velocity import check_finite
from prfl_fast.utils.checks import check, is_number, plain
from prfl_fast.utils.io import load_tensors, open_tensors, save_tensors, write_atomic

MANIFEST = "manifest.jsonl"
_RANKS = {
    "latents": 4,
    "encoder_hidden_states": 2,
    "encoder_hidden_states_short": 2,
    "encoder_hidden_states_image": 2,
    "latent_condition": 4,
    FIRST_FRAME: 4,
}
TEXT, SHORT = "encoder_hidden_states", "encoder_hidden_states_short"
# File with the text of the prompt "", which text drop takes in place of a sample's text.
EMPTY_PROMPT = "empty_prompt.safetensors"
_REQUIRED = ("latents", "encoder_hidden_states")
# torch's names of dtypes by those of safetensors; a dataset has floating-point tensors only.
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}


class Sample(NamedTuple):
    """Hold one video: ``latents [C, F, H, W]``, conditions without batch dimension, labels.

    ``short`` are the text states ``[T, D]`` of a short caption beside those in the conditions.
    """

    latents: torch.Tensor
    conditions: dict[str, torch.Tensor]
    labels: Mapping[str, Any] = {}
    id: str = ""
    short: torch.Tensor | None = None


class Pair(NamedTuple):
    """Hold two videos; ``win`` is preferred."""

    win: Sample
    lose: Sample


class LatentDataset:
    """Open a dataset folder; item i is a :class:`Sample` or a :class:`Pair`.

    The constructor checks the header of each file, and reading an item checks its values.

    Attributes:
        pairs: True if items are pairs.
        shapes: shape of latents and conditions by name, the same in all files. Text has the rows of
            the longest one, and shorter texts get rows of zeros, as models pad them.
        short: True if samples have the text states of a short caption.

    Args:
        allow_outside: allow paths in the manifest that lead out of the folder.

    Raises:
        FileNotFoundError: if the folder or its manifest does not exist.
        ValueError: if the manifest or a file is malformed or incomplete; the message names the
            line.
    """

    def __init__(self, folder: str | os.PathLike[str], *, allow_outside: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = self.folder / MANIFEST
        if not self.manifest.is_file():
            raise FileNotFoundError(
                f"{self.folder}: no {MANIFEST} there. write_dataset() writes a dataset folder"
            )
        self._records = self._read_manifest()
        self.pairs = "win" in self._records[0]
        self.shapes: dict[str, tuple[int, ...]] = {}
        for record in self._records:
            for key in ("win", "lose") if self.pairs else ("latents",):
                where = f"{self.manifest}:{record['line']}: {key}"
                ok = allow_outside or self._is_inside(record[key])
                hint = "Move the files, or set allow_outside if you trust the manifest"
                check(ok, where, record[key], "a path inside the folder", hint=hint)
                self._check_file(record[key], where)
        self.short = SHORT in self.shapes
        short, text = self.shapes.pop(SHORT, self.shapes[TEXT])[1], self.shapes[TEXT][1]
        check(short == text, f"{self.folder}: width of {SHORT}", short, f"the text's {text}")

    def _read_manifest(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        ids: dict[str, int] = {}
        try:
            # Only "\n" ends a line: str.splitlines also splits at U+2028, which JSON leaves raw.
            lines = self.manifest.read_bytes().decode("utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.manifest}: not UTF-8 text ({error.reason})") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{self.manifest}:{number}"
            record = _parse_line(line, where)
            kinds = ["pairs" if "win" in r else "videos" for r in (record, *records[:1])]
            check(len(set(kinds)) == 1, f"{where}: item", kinds[0], f"{kinds[-1]} on all lines")
            name, first = record["id"], ids.setdefault(record["id"], number)
            check(first == number, f"{where}: id", name, f"a new one, as line {first} has it")
            records.append({**record, "line": number})
        check(bool(records), str(self.manifest), "", "one JSON object per line")
        return records

    def _is_inside(self, name: str) -> bool:
        # Links inside the folder may lead anywhere: its owner made them, perhaps not the manifest.
        folder = os.path.abspath(self.folder)
        path = os.path.abspath(os.path.join(folder, name))
        return path.startswith(os.path.join(folder, ""))

    def _check_file(self, name: str, where: str) -> None:
        path = self.folder / name
        try:
            with open_tensors(path) as file:
                parts = {key: file.get_slice(key) for key in file.keys()}
                shapes = {key: tuple(part.get_shape()) for key, part in parts.items()}
                dtypes = {key: part.get_dtype() for key, part in parts.items()}
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error
        where = f"{where}: {path}"
        known = set(_REQUIRED) <= shapes.keys() <= _RANKS.keys()
        expected = f"{' and '.join(_REQUIRED)}, and of others only {', '.join(_RANKS)}"
        check(known, f"{where}: tensors", sorted(shapes), expected)
        for key, shape in shapes.items():
            kind = (_FLOATS | _INTEGERS).get(dtypes[key], dtypes[key])
            expected, hint = f"one of {', '.join(_FLOATS.values())}", "Convert it with .float()"
            check(kind in _FLOATS.values(), f"{where}: dtype of {key}", kind, expected, hint=hint)
            ok = len(shape) == _RANKS[key] and 0 not in shape
            check(ok, f"{where}: {key}", list(shape), f"{_RANKS[key]} dimensions, none 0")
        grid = list(shapes["latents"][1:])
        condition = shapes.get("latent_condition", shapes["latents"])
        same, expected = list(condition[1:]) == grid, f"latents' frames, height and width {grid}"
        check(same, f"{where}: latent_condition", list(condition), expected)
        channels, frames, *size = shapes["latents"]
        first, wanted = shapes.get(FIRST_FRAME), (channels, 1, *size)
        ok = first is None or (frames > 1 and first == wanted)
        expected = f"{list(wanted)}, and latents of two frames or more"
        check(ok, f"{where}: {FIRST_FRAME}", first, expected)
        # Texts may differ in length: each shape has the rows of the longest.
        both, texts = (shapes, self.shapes or shapes), (TEXT, SHORT)
        rows = max(of[key][0] for of in both for key in texts if key in of)
        shapes, self.shapes = (
            {key: (rows, *s[1:]) if key in texts else s for key, s in of.items()} for of in both
        )
        expected = f"{_listed(self.shapes)} as on earlier lines"
        check(shapes == self.shapes, f"{where}: shapes", _listed(shapes), expected)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample | Pair:
        """Read one item; raise ``ValueError`` if a file is damaged or has non-finite values."""
        record = self._records[index]
        if self.pairs:
            return Pair(self._load(record, "win"), self._load(record, "lose"))
        return self._load(record, "latents")

    def _load(self, record: Mapping[str, Any], key: str) -> Sample:
        path = self.folder / record[key]
        tensors = load_tensors(path)
        for name, tensor in tensors.items():
            where = f"{self.manifest}:{record['line']}: {key}: {name} in {path}"
            check_finite(where, tensor)
            if tensor.dtype == torch.float64:  # batches are float32
                check_finite(f"{where} as float32", tensor.float())
        latents, short, text = tensors.pop("latents"), tensors.pop(SHORT, None), tensors[TEXT]
        tensors[TEXT] = pad(text, (0, 0, 0, self.shapes[TEXT][0] - len(text)))
        return Sample(latents, tensors, record.get("labels", {}), record["id"], short)

    def empty_prompt(self) -> torch.Tensor:
        """Read the text states of the empty prompt, ``encoder_hidden_states`` ``[T, D]``.

        Raise ``ValueError`` if ``empty_prompt.safetensors`` is missing, or does not fit the text.
        """
        path = self.folder / EMPTY_PROMPT
        if not path.is_file():
            raise ValueError(f"{path}: no such file, expected {TEXT} [T, D] of the prompt ''")
        rows, width = self.shapes[TEXT]
        text: Any = load_tensors(path).get(TEXT)
        ok = text is not None and text.is_floating_point() and text.ndim == 2
        ok = ok and 0 < len(text) <= rows and text.shape[1] == width
        check(ok, f"{path}: {TEXT}", text, f"1 to {rows} rows of {width} floating-point numbers")
        check_finite(f"{path}: {TEXT} as float32", text.float())
        return text

    def labels(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Return ``(place, labels)`` of each item without reading tensors; place is file:line."""
        return [(f"{self.manifest}:{r['line']}", r.get("labels", {})) for r in self._records]

    def files(self) -> list[Path]:
        """Return the paths of all files of tensors, in the manifest's order."""
        keys = ("win", "lose") if self.pairs else ("latents",)
        return [self.folder / record[key] for record in self._records for key in keys]

    def ids(self) -> list[str]:
        """Return the ids of all items."""
        return [record["id"] for record in self._records]


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _parse_line(line: str, where: str) -> dict[str, Any]:
    repeated: list[str] = []

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        repeated.extend(name for i, name in enumerate(names) if name in names[:i])
        return dict(pairs)

    try:
        record = json.loads(line, object_pairs_hook=keep)
    except RecursionError as error:
        raise ValueError(f"{where}: not JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    check(not repeated, f"{where}: key", ", ".join(repeated), "each key once in an object")
    check(isinstance(record, dict), f"{where}: line", record, "a JSON object")
    files = {"win", "lose"} if "win" in record or "lose" in record else {"latents"}
    expected = {"id", "labels", *files}
    for key in sorted(record):
        check(key in expected, f"{where}: key", key, f"one of {', '.join(sorted(expected))}")
    for key in sorted({"id", *files}):
        value = record.get(key)
        check(isinstance(value, str) and bool(value), f"{where}: {key}", value, "a string")
    labels = record.get("labels", {})
    check(isinstance(labels, dict), f"{where}: labels", labels, "a JSON object")
    for name, value in labels.items():
        ok = isinstance(value, (bool, str)) or is_number(value)
        check(ok, f"{where}: labels.{name}", value, "a finite number or a string")
    return record


def write_dataset(
    folder: str | os.PathLike[str], samples: Iterable[Sample] | Iterable[Pair]
) -> LatentDataset:
    """Write samples or pairs as a dataset folder and open it; the manifest is written last.

    A sample without an id is numbered. Tensors keep their dtype.

    Raises:
        FileExistsError: if the folder already has a manifest.
        ValueError: if there are no samples, samples are mixed with pairs, or a tensor is invalid.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder}: already has a {MANIFEST}. Choose a new folder")
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    lines = []

    def save(sample: Sample, name: str) -> str:
        file = f"samples/{name}.safetensors"
        short = {} if sample.short is None else {SHORT: sample.short}
        save_tensors({"latents": sample.latents, **sample.conditions, **short}, folder / file)
        return file

    for number, item in enumerate(samples):
        first = item.win if isinstance(item, Pair) else cast(Sample, item)
        record: dict[str, Any] = {"id": first.id or f"{number:06d}"}
        if isinstance(item, Pair):
            for side, sample in item._asdict().items():
                record[side] = save(sample, f"{number:06d}-{side}")
        else:
            record["latents"] = save(first, f"{number:06d}")
        if first.labels:
            record["labels"] = {name: plain(value) for name, value in first.labels.items()}
        lines.append(json.dumps(record) + "\n")
    check(bool(lines), "samples", [], "at least one")
    # Last, so that an interrupted call leaves no manifest and thus no dataset.
    with write_atomic(folder / MANIFEST) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    try:
        return LatentDataset(folder)
    except ValueError:
        (folder / MANIFEST).unlink()
        raise
