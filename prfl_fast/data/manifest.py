"""Read and write datasets of latents and conditions: a folder of tensors and its manifest.

``manifest.jsonl`` has one JSON object per line: ``{"id", "latents", "caption", "labels"}`` for a
video, or ``{"id", "win", "lose", "caption", "labels"}`` for a preference pair. ``latents``, ``win``
and ``lose`` name safetensors files in the folder; ``caption`` and ``labels`` are optional.
"""

import copy
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from prfl_fast.data.rows import read_text
from prfl_fast.models.adapter import FIRST_FRAME, Conditions
from prfl_fast.models.conditions import LATENT, MASKS, OF_PROMPT, RANKS, TEXT, TEXTS
from prfl_fast.models.velocity import check_finite
from prfl_fast.utils.checks import check, is_number, plain
from prfl_fast.utils.io import digest_of, load_tensors, open_tensors, save_tensors, write_atomic
from prfl_fast.utils.progress import count_progress

MANIFEST = "manifest.jsonl"
# Metadata of a file without latents: their shape, such as "16,21,60,104".
LATENT_SIZE = "latent_size"
SHORT = f"{TEXT}_short"
_RANKS = {"latents": 4, SHORT: 2, **RANKS}
# Files with the text of the prompt "", which text drop takes in place of a sample's text, and of
# the negative prompt.
EMPTY_PROMPT, NEGATIVE_PROMPT = "empty_prompt.safetensors", "negative.safetensors"
_REQUIRED = ("latents", TEXT)
_MASKS = tuple(MASKS.values())  # of floating-point numbers, integers or bools
# torch's names of dtypes by those of safetensors; a dataset has floating-point tensors only.
_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_INTEGERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
_INTEGERS["BOOL"] = "bool"


class Sample(NamedTuple):
    """Hold one video: ``latents [C, F, H, W]``, conditions without batch dimension, labels.

    ``short`` are the text states ``[T, D]`` of a short caption beside those in the conditions.
    ``caption`` is shown to people, and no model reads it.
    """

    latents: torch.Tensor
    conditions: dict[str, torch.Tensor]
    labels: Mapping[str, Any] = {}
    id: str = ""
    short: torch.Tensor | None = None
    caption: str = ""


class Pair(NamedTuple):
    """Hold two videos; ``win`` is preferred."""

    win: Sample
    lose: Sample


class Bucket(NamedTuple):
    """Hold the samples of one size: shapes of their tensors by name, and their indices."""

    shapes: dict[str, tuple[int, ...]]
    indices: list[int]


class LatentDataset:
    """Open a dataset folder; item i is a :class:`Sample` or a :class:`Pair`.

    The constructor checks the header of each file, and reading an item checks its values. Samples
    may differ in the frames, height and width of their latents, and in the length of their texts;
    both videos of a pair have one size.

    Attributes:
        pairs: True if items are pairs.
        buckets: one :class:`Bucket` per size of latents, the largest first. Text has the rows of
            the longest one of the dataset in all of them.
        short: True if samples have the text states of a short caption.
        prompts_only: True if files hold texts and the size of latents, but no latents. Samples have
            latents of NaN then, which give noise its shape.

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
            hint = "prfl-fast encode or write_dataset() makes a dataset"
            raise FileNotFoundError(f"{self.folder}: no {MANIFEST} there. {hint}")
        self._open(allow_outside)

    def _open(self, allow_outside: bool) -> None:
        """Read the manifest, check the headers of all files, and form the buckets."""
        self._records = self._read_manifest()
        self.pairs = "win" in self._records[0]
        self.short, form = False, ""
        rows: dict[str, int] = {}  # of the longest text
        self._prompts: set[Path] = set()  # files without latents
        alone: list[bool] = []
        found: dict[tuple[int, ...], Bucket] = {}
        for index, record in enumerate(self._shown(self._records)):
            size: tuple[int, ...] = ()
            for key in self._sides():
                where = self._where(record, key)
                for path in self._paths(record, key).values():
                    ok = allow_outside or self._is_inside(path)
                    hint = "Move the files, or set allow_outside if you trust the manifest"
                    check(
                        ok, where, path, f"a path inside {os.path.abspath(self._base())}", hint=hint
                    )
                shapes = self._check_headers(record, key)
                short = shapes.pop(SHORT, None)
                self.short |= short is not None
                rows[TEXT] = max(rows.get(TEXT, 0), 0 if short is None else short[0])
                for name in TEXTS & shapes.keys():
                    rows[name] = max(rows.get(name, 0), shapes[name][0])
                    shapes[name] = (0, *shapes[name][1:])  # set to the longest's below
                form = form or _form(shapes)
                expected = f"{form} as on earlier lines"
                check(_form(shapes) == form, f"{where}: shapes", _listed(shapes), expected)
                expected = f"{list(size)}, those of win: a pair shares its noise"
                ok = size in ((), shapes["latents"])
                check(ok, f"{where}: latents", list(shapes["latents"]), expected)
                size = shapes["latents"]
                path = self._paths(record, key)["latents"]
                alone.append(self._base() / path in self._prompts)
            found.setdefault(size, Bucket(shapes, [])).indices.append(index)
        self.prompts_only = any(alone)
        ok = all(alone) == any(alone)
        check(ok, f"{self.manifest}: files without latents", sum(alone), "none, or all")
        self.buckets = [found[size] for size in sorted(found, key=lambda s: (-prod(s), s))]
        for bucket in self.buckets:
            for name in rows.keys() & bucket.shapes.keys():
                bucket.shapes[name] = (rows[name], *bucket.shapes[name][1:])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of latents and conditions by name, those of the largest bucket."""
        return self.buckets[0].shapes

    def _shown(self, records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the records, and show the progress: ten thousand files take seconds."""
        with count_progress("open", "samples", len(records)) as show:
            for record in records:
                show("")
                yield record

    # ReferenceList overrides the next methods, which find and read the tensors of a video.

    def _base(self) -> Path:
        """Return the folder at which relative paths start."""
        return self.folder

    def _sides(self) -> tuple[str, ...]:
        return ("win", "lose") if self.pairs else ("latents",)

    def _where(self, record: Mapping[str, Any], key: str) -> str:
        return f"{self.manifest}:{record['line']}: {key}"

    def _paths(self, record: Mapping[str, Any], key: str) -> dict[str, str]:
        """Return paths as written, by the tensors in them; that of the latents has all others."""
        return {"latents": record[key]}

    def _headers(self, record: Mapping[str, Any], key: str) -> dict[str, tuple[tuple, str]]:
        """Return shape and dtype of each tensor of a video; the names of dtypes are torch's."""
        path = self._base() / record[key]
        with open_tensors(path) as file:
            parts = {name: file.get_slice(name) for name in file.keys()}
            known = _FLOATS | _INTEGERS
            found = {
                name: (tuple(part.get_shape()), known.get(part.get_dtype(), part.get_dtype()))
                for name, part in parts.items()
            }
            size = (file.metadata() or {}).get(LATENT_SIZE)
        if size is not None:
            self._prompts.add(path)
            ok = "latents" not in found and re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", size)
            expected = "C,F,H,W of latents that the file lacks"
            check(bool(ok), f"{path}: {LATENT_SIZE}", size, expected)
            found["latents"] = (tuple(map(int, size.split(","))), "float32")
        return found

    def _tensors(self, record: Mapping[str, Any], key: str) -> dict[str, torch.Tensor]:
        return load_tensors(self._base() / record[key])

    def _read_manifest(self) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        ids: dict[str, int] = {}
        # Only "\n" ends a line: str.splitlines also splits at U+2028, which JSON leaves raw.
        for number, line in enumerate(read_text(self.manifest).split("\n"), 1):
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
        folder = os.path.abspath(self._base())
        path = os.path.abspath(os.path.join(folder, name))
        return path.startswith(os.path.join(folder, ""))

    def _check_headers(self, record: Mapping[str, Any], key: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a video's tensors, checked against each other."""
        where = self._where(record, key)
        try:
            headers = self._headers(record, key)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error
        where = f"{where}: {self._base() / self._paths(record, key)['latents']}"
        known = set(_REQUIRED) <= headers.keys() <= _RANKS.keys()
        expected = f"{' and '.join(_REQUIRED)}, and of others only {', '.join(_RANKS)}"
        check(known, f"{where}: tensors", sorted(headers), expected)
        shapes = {name: shape for name, (shape, _) in headers.items()}
        for name, (shape, kind) in headers.items():
            expected, hint = f"one of {', '.join(_FLOATS.values())}", "Convert it with .float()"
            ok = kind in _FLOATS.values() or (name in _MASKS and kind in _INTEGERS.values())
            check(ok, f"{where}: dtype of {name}", kind, expected, hint=hint)
            ok = len(shape) == _RANKS[name] and 0 not in shape
            check(ok, f"{where}: {name}", list(shape), f"{_RANKS[name]} dimensions, none 0")
        for text, mask in MASKS.items():
            if mask in shapes:
                tokens = shapes.get(text, (None,))[0]
                check(
                    shapes[mask][0] == tokens,
                    f"{where}: tokens of {mask}",
                    shapes[mask][0],
                    f"{tokens}, those of {text}",
                )
        grid = list(shapes["latents"][1:])
        condition = shapes.get(LATENT, shapes["latents"])
        same, expected = list(condition[1:]) == grid, f"latents' frames, height and width {grid}"
        check(same, f"{where}: {LATENT}", list(condition), expected)
        channels, frames, *size = shapes["latents"]
        first, wanted = shapes.get(FIRST_FRAME), (channels, 1, *size)
        ok = first is None or (frames > 1 and first == wanted)
        expected = f"{list(wanted)}, and latents of two frames or more"
        check(ok, f"{where}: {FIRST_FRAME}", first, expected)
        width = shapes[TEXT][1]
        short = shapes.get(SHORT, shapes[TEXT])[1]
        check(short == width, f"{where}: width of {SHORT}", short, f"the text's {width}")
        return shapes

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample | Pair:
        """Read one item; raise ``ValueError`` if a file is damaged or has non-finite values."""
        record = self._records[index]
        if self.pairs:
            return Pair(self._load(record, "win"), self._load(record, "lose"))
        return self._load(record, "latents")

    def _load(self, record: Mapping[str, Any], key: str) -> Sample:
        tensors, paths = self._tensors(record, key), self._paths(record, key)
        for name, tensor in tensors.items():
            path = self._base() / paths.get(name, paths["latents"])
            where = f"{self._where(record, key)}: {name} in {path}"
            check_finite(where, tensor)
            if tensor.dtype == torch.float64:  # batches are float32
                check_finite(f"{where} as float32", tensor.float())
        if self.prompts_only:  # NaN, so that no use of more than the shape goes unnoticed
            shape = self._headers(record, key)["latents"][0]
            tensors["latents"] = torch.full(
                (1,), torch.nan, dtype=torch.float32, device="cpu"
            ).expand(shape)
        latents, short = tensors.pop("latents"), tensors.pop(SHORT, None)
        labels, caption = record.get("labels", {}), record.get("caption", "")
        return Sample(latents, tensors, labels, record["id"], short, caption)

    def empty_prompt_file(self) -> Path:
        """Return the path of the text states of the empty prompt, which need not exist."""
        return self.folder / EMPTY_PROMPT

    def empty_prompt(self) -> Conditions:
        """Read the conditions of the empty prompt, at least ``encoder_hidden_states`` ``[T, D]``.

        Raise ``ValueError`` if ``empty_prompt.safetensors`` is missing, or does not fit the
        samples.
        """
        path = self.empty_prompt_file()
        if not path.is_file():
            raise ValueError(f"{path}: no such file, expected {TEXT} [T, D] of the prompt ''")
        found = self.read_prompt(path)
        for name, tensor in found.items():
            rows, *rest = own = self.shapes[name] or (0,)
            ok = tensor.is_floating_point() or name in _MASKS
            ok = ok and (tensor.shape == self.shapes[name] or name in TEXTS)
            expected = f"the samples' {list(own)}"
            if name in TEXTS:
                ok = ok and tensor.ndim == len(own) and 0 < len(tensor) <= rows
                ok = ok and list(tensor.shape[1:]) == rest
                expected = f"1 to {rows} numbers"
                if rest:
                    expected = f"1 to {rows} rows of {rest[0]} floating-point numbers"
            check(ok, f"{path}: {name}", tensor, expected)
            check_finite(f"{path}: {name} as float32", tensor.float())
        return found

    def subset(self, ids: Collection[str]) -> "LatentDataset":
        """Return the dataset of the items with these ids, in the manifest's order."""
        part = copy.copy(self)
        kept = [i for i, name in enumerate(self.ids()) if name in ids]
        part._records = [self._records[i] for i in kept]
        place = {i: number for number, i in enumerate(kept)}
        own = ([place[i] for i in bucket.indices if i in place] for bucket in self.buckets)
        pairs = zip(self.buckets, own, strict=True)
        part.buckets = [Bucket(bucket.shapes, indices) for bucket, indices in pairs if indices]
        return part

    def split(self, share: float) -> tuple["LatentDataset", "LatentDataset"]:
        """Return the items that train, and the share that is held out, at least one.

        A hash of the id chooses them, independent of order and seed. When items are added, most
        of the others stay in their part.

        Raises:
            ValueError: if no item remains.
        """
        # A list may repeat an id, and its items stay together.
        ids = sorted(set(self.ids()), key=lambda name: hashlib.sha256(name.encode()).digest())
        count = max(1, round(share * len(ids)))
        expected = f"a share that leaves some of the {len(ids)} ids of {self.folder}"
        check(count < len(ids), "held_out", share, expected)
        return self.subset(set(ids[count:])), self.subset(set(ids[:count]))

    def negative_prompt_file(self) -> Path:
        """Return the path of the text states of the negative prompt, which need not exist."""
        return self.folder / NEGATIVE_PROMPT

    def read_prompt(self, path: Path) -> Conditions:
        """Read the conditions of a prompt that all samples share, at least its text ``[T, D]``.

        Raise ``ValueError`` unless it has every condition of a prompt that the samples have (mask,
        pooled states), or if the samples lack one of the names.
        """
        return self._known_prompt(load_tensors(path), path)

    def _known_prompt(self, found: Conditions, path: Path) -> Conditions:
        needed = OF_PROMPT & self.shapes.keys()
        known = needed <= found.keys() <= self.shapes.keys() - {"latents"}
        expected = f"{', '.join(sorted(needed))}, and beside them only conditions of the samples"
        check(known, f"{path}: tensors", sorted(found), expected)
        return found

    def labels(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Return ``(place, labels)`` of each item without reading tensors; place is file:line."""
        return [(f"{self.manifest}:{r['line']}", r.get("labels", {})) for r in self._records]

    def digest(self) -> str:
        """Return the SHA-256 digest of the manifest, which has paths and labels of all samples."""
        return digest_of(self.manifest)

    def files(self) -> list[Path]:
        """Return the paths of all files of tensors, in the manifest's order."""
        groups = (self._paths(record, key) for record in self._records for key in self._sides())
        return [self._base() / path for group in groups for path in group.values()]

    def ids(self) -> list[str]:
        """Return the ids of all items."""
        return [record["id"] for record in self._records]

    def captions(self) -> list[str]:
        """Return the captions of all items, empty where the manifest has none."""
        return [record.get("caption", "") for record in self._records]


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _form(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the shapes with letters for the numbers that samples need not share."""
    free = {TEXT: "T, {1}", "latents": "{0}, F, H, W", LATENT: "{0}, F, H, W"}
    free[FIRST_FRAME] = "{0}, 1, H, W"
    return ", ".join(
        f"{name} [{free.get(name, ', '.join(map(str, shape))).format(*shape)}]"
        for name, shape in sorted(shapes.items())
    )


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
    expected = {"id", "caption", "labels", *files}
    for key in sorted(record):
        check(key in expected, f"{where}: key", key, f"one of {', '.join(sorted(expected))}")
    for key in sorted({"id", *files}):
        value = record.get(key)
        check(isinstance(value, str) and bool(value), f"{where}: {key}", value, "a string")
    caption = record.get("caption", "")
    check(isinstance(caption, str), f"{where}: caption", caption, "a string")
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
        if first.caption:
            record["caption"] = first.caption
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
