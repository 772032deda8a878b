"""Datasets on disk: round trips, the order of batches, and rejected files."""

import json
import math

import pytest
import torch
from runs import samples, write_prompts

from prfl_fast.data.dataset import Batch, Batches, DrawnPairs, PairBatch, collate
from prfl_fast.data.manifest import LatentDataset, Pair, Sample, write_dataset
from prfl_fast.data.order import epoch_order
from prfl_fast.training.config import TrainConfig
from prfl_fast.utils.io import load_tensors, save_tensors


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path, samples(4))
    return tmp_path


FIRST = "samples/000000.safetensors"


def rewrite(folder, **changes):
    """Replace or (with None) remove tensors of the first file."""
    tensors = {**load_tensors(folder / FIRST), **changes}
    save_tensors({k: v for k, v in tensors.items() if v is not None}, folder / FIRST)


def test_round_trip_of_singles(folder):
    dataset = LatentDataset(folder)
    assert len(dataset) == 4 and not dataset.pairs
    assert dataset.shapes == {"latents": (16, 2, 4, 4), "encoder_hidden_states": (3, 20)}
    for i, original in enumerate(samples(4)):
        item = dataset[i]
        assert torch.equal(item.latents, original.latents)
        assert item.labels == {"motion_quality": i % 2}
        texts = [s.conditions["encoder_hidden_states"] for s in (item, original)]
        assert torch.equal(*texts)
    assert dataset.ids() == [f"{i:06d}" for i in range(4)]
    assert dataset.labels()[1] == (f"{folder / 'manifest.jsonl'}:2", {"motion_quality": 1})


def test_round_trip_of_pairs_and_image_conditions(tmp_path):
    def image(s):
        extra = {"encoder_hidden_states_image": torch.ones(5, 7)}
        extra["latent_condition"] = torch.ones(20, 2, 4, 4).bfloat16()
        extra["first_frame"] = s.latents[:, :1].half()
        return Sample(s.latents.half(), {**s.conditions, **extra}, s.labels)

    pairs = [Pair(image(a), image(b)) for a, b in zip(samples(3), samples(3, 1), strict=True)]
    dataset = write_dataset(tmp_path, pairs)
    assert dataset.pairs and isinstance(dataset[0], Pair)
    batch = collate([dataset[i] for i in (0, 2)])
    assert isinstance(batch, PairBatch) and batch.win.latents.shape == (2, 16, 2, 4, 4)
    tensors = (batch.win.latents, batch.lose.conditions["latent_condition"])
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert torch.equal(batch.win.conditions["first_frame"], batch.win.latents[:, :, :1])
    assert torch.equal(batch.lose.latents[1], pairs[2].lose.latents.float())


@pytest.mark.parametrize("seed", [True, 1.5, "7", None])
def test_a_seed_is_an_integer(seed):
    for make in (lambda: Batches([0], seed=seed), lambda: TrainConfig(steps=1, seed=seed)):
        with pytest.raises(ValueError, match=f"seed is {seed!r}, expected an integer"):
            make()


def test_order_is_a_permutation_that_depends_on_seed_and_epoch_only():
    orders = {(s, e): tuple(epoch_order(20, s, e)) for s in range(3) for e in range(3)}
    assert all(sorted(order) == list(range(20)) for order in orders.values())
    assert len(set(orders.values())) == 9
    torch.manual_seed(9)
    state = torch.get_rng_state()
    assert tuple(epoch_order(20, 1, 2)) == orders[1, 2]
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_can_be_asked_for_in_any_order(folder):
    dataset = LatentDataset(folder)
    batches = Batches(dataset, 2, seed=5)
    forward = [batches[n].latents for n in range(6)]
    for n in (5, 0, 3):
        batch = Batches(dataset, 2, seed=5)[n]
        assert isinstance(batch, Batch) and torch.equal(batch.latents, forward[n])
    epoch = torch.cat(forward[2:4]).sum((1, 2, 3, 4)).tolist()
    assert sorted(epoch) == sorted(s.latents.sum().item() for s in samples(4))
    # Of a list of 5, the epoch drops the incomplete third batch.
    assert Batches(samples(5), 2)[2].latents.shape[0] == 2


def test_batches_refuse_what_does_not_fit():
    for size, expected in ((5, "at most 4, the samples"), (0, "a positive integer")):
        with pytest.raises(ValueError, match=f"batch_size is {size}, expected {expected}"):
            Batches(samples(4), size)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_when_read(folder, value):
    latents = torch.zeros(16, 2, 4, 4)
    latents[3, 1, 2, 2] = value
    rewrite(folder, latents=latents)
    dataset = LatentDataset(folder)
    message = "manifest.jsonl:1: latents: latents in .* has 1 NaN or infinite values"
    with pytest.raises(ValueError, match=message):
        dataset[0]


FLAT, EMPTY = torch.ones(16, 4, 4), torch.ones(16, 0, 4, 4)
INTEGERS, GRID = torch.ones(16, 2, 4, 4, dtype=torch.int64), torch.ones(20, 1, 4, 4)
FILES = {
    "no latents": ({"latents": None}, r"is \['encoder_hidden_states'\], expected latents and"),
    "no text": ({"encoder_hidden_states": None}, r"tensors is \['latents'\], expected latents and"),
    "unknown tensor": ({"pixels": torch.ones(2)}, "'pixels'], expected .* of others only latents,"),
    "integers": ({"latents": INTEGERS}, "dtype of latents is 'int64', expected one of float32, "),
    "wrong rank": ({"latents": FLAT}, r"latents is \[16, 4, 4\], expected 4 dimensions"),
    "empty": ({"latents": EMPTY}, "none 0"),
    "other grid": ({"latent_condition": GRID}, r"is \[20, 1, 4, 4\], expected latents' frames"),
    "other first frame": ({"first_frame": GRID[:16, :, :2]}, r"is \(16, 1, 2, 4\), expected \[16"),
    "one frame": ({"latents": GRID[:16], "first_frame": GRID[:16]}, "two frames or more"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_are_checked_before_they_are_read(folder, case):
    changes, message = FILES[case]
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=rf"manifest.jsonl:1: latents: .*{message}"):
        LatentDataset(folder)


def test_shapes_must_agree_throughout(folder):
    rewrite(folder, latents=torch.ones(8, 1, 4, 4))
    message = (
        r"manifest.jsonl:2: .*latents \[16, 2, 4, 4\]', expected "
        r"encoder_hidden_states \[T, 20\], latents \[8, F, H, W\] as on earlier lines"
    )
    with pytest.raises(ValueError, match=message):
        LatentDataset(folder)


def test_truncated_and_missing_files(folder):
    first, message = folder / FIRST, "manifest.jsonl:1: latents: .*: not a whole"
    data = first.read_bytes()
    for damaged in (data[:-4], data[:20], b""):
        first.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            LatentDataset(folder)
    first.unlink()
    with pytest.raises(ValueError, match="manifest.jsonl:1: latents: .*: no such file"):
        LatentDataset(folder)


PROMPT = {"latent_size": "16,2,4,4"}
GOOD = {"id": "a", "latents": FIRST}
PAIR = {"id": "b", "win": "x", "lose": "y"}
MANIFESTS = {
    "empty": ([], "manifest.jsonl is '', expected one JSON object per line"),
    "blank": (["", "  "], "manifest.jsonl is ''"),
    "not json": ([GOOD, "{"], "manifest.jsonl:2: not JSON"),
    "a list": (["[]"], r"manifest.jsonl:1: line is \[\], expected a JSON object"),
    "no id": ([{"latents": "x"}], "manifest.jsonl:1: id is None, expected a string"),
    "no file": ([{"id": "a"}], "manifest.jsonl:1: latents is None, expected a string"),
    "half a pair": ([{"id": "a", "win": "x"}], "manifest.jsonl:1: lose is None"),
    "unknown key": ([{**GOOD, "label": {}}], "label.*one of caption, id, labels, latents"),
    "labels a list": ([{**GOOD, "labels": [1]}], r"labels is \[1\], expected a JSON object"),
    "label null": ([{**GOOD, "labels": {"q": None}}], "labels.q is None, expected a finite num"),
    "label NaN": ([{**GOOD, "labels": {"q": math.nan}}], "labels.q is nan, expected a finite n"),
    "same id": ([GOOD, GOOD], "manifest.jsonl:2: id is 'a', expected a new one, as line 1 has it"),
    "mixed": ([GOOD, PAIR], "manifest.jsonl:2: item is 'pairs', expected videos on all lines"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests_are_checked(folder, case):
    records, message = MANIFESTS[case]
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (folder / "manifest.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        LatentDataset(folder)


def test_manifest_that_is_not_text_or_not_there(folder):
    (folder / "manifest.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        LatentDataset(folder)
    (folder / "manifest.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no manifest.jsonl there"):
        LatentDataset(folder)


def test_writing_refuses_nothing_and_twice(folder, tmp_path):
    with pytest.raises(FileExistsError, match="already has a manifest.jsonl"):
        write_dataset(folder, samples(1))
    with pytest.raises(ValueError, match=r"samples is \[\], expected at least one"):
        write_dataset(tmp_path / "new", [])


def with_texts(folder, count=6, rows=2):
    """Write samples with a short caption of twos, and an empty prompt of minus ones."""
    short = torch.full((rows, 20), 2.0)
    write_dataset(folder, [s._replace(short=short) for s in samples(count)])
    empty = {"encoder_hidden_states": torch.full((1, 20), -1.0)}
    save_tensors(empty, folder / "empty_prompt.safetensors")
    return LatentDataset(folder)


def test_texts_are_dropped_or_short_by_chance(tmp_path):
    dataset = with_texts(tmp_path)
    assert dataset.short and "encoder_hidden_states_short" not in dataset.shapes
    assert dataset[0].short.shape == (2, 20) and len(dataset[0].conditions) == 1
    batches = Batches(dataset, 3, 4, text_drop=0.2, short_captions=0.5)
    counts = {"empty": 0, "short": 0, "long": 0}
    again = Batches(dataset, 3, 4, text_drop=0.2, short_captions=0.5)[7]
    assert torch.equal(*(b.conditions["encoder_hidden_states"] for b in (batches[7], again)))
    for n in range(60):
        for text in batches[n].conditions["encoder_hidden_states"]:
            first = text[0, 0].item()
            kind = {-1.0: "empty", 2.0: "short"}.get(first, "long")
            rows = {"empty": 1, "short": 2, "long": 3}[kind]
            assert (text[:rows] != 0).all() and (text[rows:] == 0).all()
            counts[kind] += 1
    # 0.2, 0.8 · 0.5 and 0.8 · 0.5 of 180, four standard deviations
    for kind, share in (("empty", 0.2), ("short", 0.4), ("long", 0.4)):
        assert abs(counts[kind] - 180 * share) < 4 * (180 * share * (1 - share)) ** 0.5
    plain = Batches(LatentDataset(tmp_path), 3, 4)[0]
    assert plain.conditions["encoder_hidden_states"].shape == (3, 3, 20)


def test_both_videos_of_a_pair_have_the_same_kind_of_text(tmp_path):
    write_dataset(tmp_path, [Pair(*samples(2))])
    empty = {"encoder_hidden_states": -torch.ones(1, 20)}
    save_tensors(empty, tmp_path / "empty_prompt.safetensors")
    pairs, kinds = Batches(LatentDataset(tmp_path), text_drop=0.5), set()
    for n in range(20):
        win, lose = (side.conditions["encoder_hidden_states"][0, 0, 0] == -1 for side in pairs[n])
        assert win == lose
        kinds.add(bool(win))
    assert kinds == {True, False}


def test_texts_that_are_missing_or_too_long_are_refused(folder, tmp_path):
    dataset = LatentDataset(folder)
    with pytest.raises(ValueError, match=r"empty_prompt.safetensors: no such file"):
        Batches(dataset, text_drop=0.1)
    with pytest.raises(ValueError, match="short_captions is 0.3, expected 0 for .*, which has"):
        Batches(dataset, short_captions=0.3)
    for value in (-0.1, 1.5, "0.1", True):
        with pytest.raises(ValueError, match="text_drop is"):
            Batches(dataset, text_drop=value)
    rows = torch.ones(3, 20)
    for text, message in (
        (torch.ones(4, 20), "expected 1 to 3 rows of 20"),
        (rows.int(), "is int32.*, expected 1 to 3 rows of 20 floating-point numbers"),
        (rows.double() * 1e300, "as float32 has 60 NaN or infinite values"),
    ):
        save_tensors({"encoder_hidden_states": text}, folder / "empty_prompt.safetensors")
        with pytest.raises(ValueError, match=message):
            Batches(dataset, text_drop=0.1)
    with pytest.raises(ValueError, match="text_drop is 0.1, expected 0 for a data"):
        Batches(samples(2), text_drop=0.1)
    wide = [s._replace(short=torch.ones(2, 21)) for s in samples(1)]
    with pytest.raises(ValueError, match="width of encoder_hidden_states_short is 21"):
        write_dataset(tmp_path / "wide", wide)
    assert not (tmp_path / "wide" / "manifest.jsonl").exists()


def test_texts_of_different_lengths_have_the_rows_of_the_longest(tmp_path):
    text = torch.ones(9, 20)
    items = [
        s._replace(conditions={"encoder_hidden_states": text[:n]}, short=text[: n + 2])
        for s, n in zip(samples(3), (3, 5, 1), strict=True)
    ]
    dataset = write_dataset(tmp_path / "texts", items)
    assert dataset.shapes["encoder_hidden_states"] == (7, 20)
    found = Batches(dataset, 3)[0].conditions["encoder_hidden_states"]
    assert found.shape == (3, 7, 20) and sorted(found.sum((1, 2)).tolist()) == [20, 60, 100]
    assert collate([dataset[0], dataset[1]]).conditions["encoder_hidden_states"].shape[1] == 5
    found = Batches(dataset, 3, short_captions=1)[0].conditions["encoder_hidden_states"]
    assert found.shape == (3, 7, 20) and sorted(found.sum((1, 2)).tolist()) == [60, 100, 140]
    lose = Batches(write_dataset(tmp_path / "lose", samples(3)))
    assert DrawnPairs(Batches(dataset), lose)[0].lose.conditions.keys() == {"encoder_hidden_states"}


def test_losers_are_drawn_from_a_second_list(tmp_path):
    for name, count in (("win", 3), ("lose", 5)):
        write_dataset(tmp_path / name, samples(count))
    win, lose = (Batches(LatentDataset(tmp_path / name), 2, 1) for name in ("win", "lose"))
    pairs = DrawnPairs(win, lose)
    for n in range(6):
        assert isinstance(pairs[n], PairBatch)
        assert torch.equal(pairs[n].win.latents, win[n].latents)
        assert torch.equal(pairs[n].lose.latents, lose[n].latents)
    lose.dataset.buckets[0].shapes["latents"] = (16, 1, 4, 4)
    with pytest.raises(ValueError, match="shapes of the losers' dataset"):
        DrawnPairs(win, lose)


def test_only_a_newline_ends_a_line_and_a_byte_order_mark_is_read(folder):
    records = [{**GOOD, "id": name} for name in ("a\u2028b", "c\x85", "d\x0b\x1ce")]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = "\ufeff" + "\r\n".join([*lines, "", ""])
    (folder / "manifest.jsonl").write_bytes(text.encode())
    assert LatentDataset(folder).ids() == [record["id"] for record in records]


def test_captions_are_kept_and_may_be_missing(folder, tmp_path):
    texts = ["Süß.", "", "b"]
    items = [s._replace(caption=t) for s, t in zip(samples(3), texts, strict=True)]
    dataset = write_dataset(tmp_path / "captions", items)
    assert dataset.captions() == texts
    assert [dataset[i].caption for i in range(3)] == dataset.captions()
    ids = dataset.ids()
    assert dataset.subset(ids[1:]).captions() == ["", "b"]
    assert set(LatentDataset(folder).captions()) == {""}
    record = {"id": "a", "latents": FIRST, "caption": 3}
    (folder / "manifest.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="jsonl:1: caption is 3, expected a string"):
        LatentDataset(folder)


@pytest.mark.parametrize("line", ['{"id": "a", "id": "b"}', '{"labels": {"q": 1, "q": 0}}'])
def test_a_key_that_repeats_is_refused(folder, line):
    (folder / "manifest.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="jsonl:1: key is '(id|q)', expected each key once"):
        LatentDataset(folder)


def test_deep_nesting_is_one_short_line(folder):
    (folder / "manifest.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"jsonl:1: not JSON \(nested too deeply\)$"):
        LatentDataset(folder)


def test_a_path_outside_the_folder_needs_the_flag(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    file = other / "x.safetensors"
    file.write_bytes((folder / FIRST).read_bytes())
    for path in (str(file), f"../{folder.name}/../{other.name}/x.safetensors"):
        record = {"id": "a", "latents": path}
        (folder / "manifest.jsonl").write_text(json.dumps(record) + "\n")
        with pytest.raises(ValueError, match=f"expected a path inside {folder}. .*allow_outside"):
            LatentDataset(folder)
    record["latents"] = str(file)
    (folder / "manifest.jsonl").write_text(json.dumps(record) + "\n")
    assert len(LatentDataset(folder, allow_outside=True)[0].latents) == 16
    for path in (str(folder / FIRST), f"samples/../{FIRST}"):
        (folder / "manifest.jsonl").write_text(json.dumps({"id": "a", "latents": path}) + "\n")
        assert len(LatentDataset(folder)) == 1


def test_a_seed_beyond_64_bits_is_one_of_its_own():
    orders = [epoch_order(64, seed, 0) for seed in (0, 1 << 64, 1 << 70)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert epoch_order(64, 1 << 70, 0) == orders[2]


def test_prompts_may_share_a_file_and_none_may_have_latents(tmp_path):
    write_prompts(tmp_path, 2)
    shared = [{"id": name, "latents": "0.safetensors"} for name in "abc"]
    (tmp_path / "manifest.jsonl").write_text("\n".join(map(json.dumps, shared)))
    dataset = LatentDataset(tmp_path)
    assert dataset.prompts_only and len(dataset) == 3 and dataset[2].latents.isnan().all()
    both = write_dataset(tmp_path / "both", samples(1)).folder
    save_tensors(load_tensors(tmp_path / "0.safetensors"), both / "p.safetensors", PROMPT)
    line = json.dumps({"id": "p", "latents": "p.safetensors"})
    manifest = both / "manifest.jsonl"
    manifest.write_text(manifest.read_text() + line)
    with pytest.raises(ValueError, match="files without latents is 1, expected none, or all"):
        LatentDataset(both)
