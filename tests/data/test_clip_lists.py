"""Folders and lists of clips."""

import json

import pytest

from prfl_fast.data.clip_lists import Clip, read_clips


@pytest.fixture
def files(tmp_path):
    for name in ("a.mp4", "sub/b.webm", "notes.md", "._a.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def test_a_folder_has_captions_beside_its_clips(files):
    with pytest.raises(ValueError, match=r"a\.mp4 has no caption, nor do 1 of the other clips"):
        read_clips(files)
    (files / "a.txt").write_text(" A disc\nmoves. \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"b\.webm has no caption\. Write it to .*b\.txt, or"):
        read_clips(files)
    (files / "sub" / "b.txt").write_text("\ufeffEin Kreis läuft.", encoding="utf-8")
    assert read_clips(files) == [
        Clip("a", files / "a.mp4", "A disc moves."),
        Clip("sub/b", files / "sub/b.webm", "Ein Kreis läuft."),
    ]


ROWS = [
    {"video_path": "a.mp4", "long_caption": "A disc, red", "short_caption": "A disc", "quality": 1},
    {
        "video_path": "sub/b.webm",
        "long_caption": "007",
        "quality": 0.5,
        "source_id": "001",
        "n": None,
    },
]
CSV = (
    "video_path,long_caption,short_caption,quality,source_id\r\n"
    'a.mp4,"A disc, red",A disc,1,\r\nsub/b.webm,007,,0.5,001\r\n'
)
LISTS = {
    "clips.csv": CSV,
    "clips.json": json.dumps(ROWS),
    "clips.jsonl": "\n".join(json.dumps(row | {"none": None}) for row in ROWS) + "\n\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_name_clips_captions_and_labels(files, name):
    (files / name).write_bytes(LISTS[name].encode())
    assert read_clips(files / name) == [
        Clip("a", files / "a.mp4", "A disc, red", "A disc", {"quality": 1}),
        Clip("001", files / "sub/b.webm", "007", None, {"quality": 0.5}),
    ]


def test_paths_may_be_relative_to_the_working_folder(files, monkeypatch):
    # As those of HY-Video-PRFL's temp_input_data.json.
    (files / "lists").mkdir()
    row = {"source_id": "0004", "long_caption": "L", "short_caption": "S", "video_path": "a.mp4"}
    (files / "lists" / "temp_input_data.json").write_text(json.dumps([row]))
    monkeypatch.chdir(files)
    (clip,) = read_clips(files / "lists" / "temp_input_data.json")
    assert clip.path.samefile(files / "a.mp4") and clip[2:] == ("L", "S", {})


BAD = {
    "none.csv": ("video_path,caption\n", "is '.*', expected at least one clip"),
    "path.csv": ("film;caption\nA\n", r"video_path is None, .* columns .*; it has film;caption"),
    "caption.csv": ("video_path,caption\na.mp4,\n", r":2: long_caption is None, expected a string"),
    "file.csv": ("video_path,caption\nno.mp4,A\n", r":2: .*no\.mp4: no such file"),
    "cells.csv": ("video_path,caption\na.mp4,A,B\n", "expected no more cells than the first line"),
    "twice.csv": ("video_path,caption\na.mp4,A\na.mp4,B\n", "id is 'a', expected each once"),
    "object.json": ("{}", "is {}, expected an array of objects"),
    "broken.json": ("[", "not JSON"),
    "rows.jsonl": ('{"video": "a.mp4", "text": "A"}\n[1]\n', r"rows.jsonl:2 is \[1\], expected an"),
    "broken.jsonl": ("\n{", "broken.jsonl:2: not JSON"),
    "label.json": ('[{"video": "a.mp4", "text": "A", "q": [1]}]', r"q is \[1\], expected a label"),
    "caption.json": ('[{"video": "a.mp4", "text": ["A"]}]', r"long_caption is \['A'\], expected a"),
    "clips.xml": ("<a/>", r"CLIPS is '.*clips.xml', expected a folder, .csv, .json, .jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lists_are_named(files, name):
    text, reason = BAD[name]
    (files / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=reason):
        read_clips(files / name)


def test_encodings_and_missing_lists_are_named(files):
    (files / "a.csv").write_bytes("video_path,caption\na.mp4,läuft\n".encode("latin-1"))
    with pytest.raises(ValueError, match="a.csv: not UTF-8 text"):
        read_clips(files / "a.csv")
    with pytest.raises(ValueError, match="expected a folder or a file that exists"):
        read_clips(files / "nowhere.csv")
