"""Read the clips to encode from a folder or list, or prompts from a text file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prfl_fast.data.rows import read_rows, read_text
from prfl_fast.data.video import IMAGES, VIDEOS
from prfl_fast.utils.checks import check, is_number

# Names of columns, in the order in which they are tried; the first ones are the reference's.
VIDEO = ("video_path", "video", "path", "file_name", "file")
CAPTION = ("long_caption", "caption", "text", "prompt")
SHORT_CAPTION = ("short_caption",)
IDENTIFIER = ("source_id", "id")


class Clip(NamedTuple):
    """Describe a clip: a name, its file, captions and labels. A prompt alone has no file."""

    id: str
    path: Path | None
    caption: str
    short_caption: str | None = None
    labels: Mapping[str, Any] = {}


def read_clips(source: Path) -> list[Clip]:
    """Return the clips of a folder or list.

    Args:
        source: a folder, searched with its subfolders, in which ``NAME.txt`` holds the caption of
            ``NAME.mp4``; a ``.csv``, ``.json`` (an array of objects) or ``.jsonl`` file with the
            columns ``video_path``, ``long_caption`` or ``caption``, and optionally
            ``short_caption``, ``source_id`` and labels; or a ``.txt`` file with a prompt per line.

    Raises:
        ValueError: if the list is malformed, a clip has no caption or two have one id.
        FileNotFoundError: if a file is missing.
    """
    check(source.exists(), "CLIPS", str(source), "a folder or a file that exists")
    if source.is_dir():
        clips = _folder(source)
    elif source.suffix == ".txt":
        lines = read_text(source).splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
        clips = [Clip(f"{i:06d}", None, prompt) for i, prompt in enumerate(prompts)]
    else:
        ok = source.suffix in (".csv", ".json", ".jsonl")
        check(ok, "CLIPS", str(source), "a folder, .csv, .json, .jsonl, .txt")
        clips = [_clip(source, where, row) for where, row in read_rows(source)]
    check(bool(clips), "CLIPS", str(source), "at least one clip")
    seen: set[str] = set()
    for clip in clips:
        check(clip.id not in seen, f"{source}: id", clip.id, "each once")
        seen.add(clip.id)
    return clips


def _folder(folder: Path) -> list[Clip]:
    known = (*VIDEOS, *IMAGES)
    found = (p for p in sorted(folder.rglob("*")) if not p.name.startswith("."))
    files = [p for p in found if p.suffix.lower() in known]
    clips, missing = [], []
    for path in files:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            missing.append(str(path))
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        clips.append(Clip(name, path, " ".join(read_text(caption).split())))
    if missing:
        more = f", nor do {len(missing) - 1} of the other clips" if missing[1:] else ""
        text = Path(missing[0]).with_suffix(".txt")
        raise ValueError(
            f"{missing[0]} has no caption{more}. Write it to {text}, or list the clips in a .csv "
            "or .jsonl file"
        )
    return clips


def _number(text: Any) -> Any:
    """Return a cell of a CSV file as a number if it is one."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if is_number(value) else text
    return text


def _clip(source: Path, where: str, row: Any) -> Clip:
    check(isinstance(row, dict), where, row, "an object")
    row, names_given = dict(row), ", ".join(map(str, row))

    def take(names: tuple[str, ...]) -> Any:
        found = next((name for name in names if row.get(name) is not None), names[0])
        return row.pop(found, None)

    file, caption = take(VIDEO), take(CAPTION)
    short, name = take(SHORT_CAPTION), take(IDENTIFIER)
    for names, value in ((VIDEO, file), (CAPTION, caption), (SHORT_CAPTION, short)):
        expected = f"a string in one of the columns {', '.join(names)}; it has {names_given}"
        ok = isinstance(value, str) or (names is not VIDEO and is_number(value))
        missing = value is None and names is SHORT_CAPTION
        check(ok or missing, f"{where}: {names[0]}", value, expected)
    # The reference's paths are relative to the folder in which it is called.
    path = next((p for p in (source.parent / file, Path(file)) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{where}: {source.parent / file}: no such file")
    labels = {k: v for k, v in row.items() if v is not None}  # null, as an empty cell of a CSV
    if source.suffix == ".csv":
        labels = {k: _number(v) for k, v in labels.items()}
    for key, value in labels.items():
        ok = isinstance(value, bool | str) or is_number(value)
        check(ok, f"{where}: {key}", value, "a label: a number, string or boolean")
    name = Path(file).with_suffix("").as_posix() if name is None else str(name)
    return Clip(name, path, str(caption), None if short is None else str(short), labels)
