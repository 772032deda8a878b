"""Lists of HY-Video-PRFL give the tensors and labels that its dataset classes give."""

import json

import numpy as np
import pytest
import torch
from list_files import LATENTS, OTHER_NAMES, TEMPLATE, write

from prfl_fast.data import Batches
from prfl_fast.data.reference_lists import ReferenceList, open_latents
from prfl_fast.training.reward_losses import label_of
from prfl_fast.utils.io import save_tensors


def test_the_preprocessing_of_the_reference(tmp_path):
    path, (arrays, other) = write(
        tmp_path,
        (TEMPLATE, {"source_id": "v", "physics_quality": 1, "human_quality": None}),
        (OTHER_NAMES, {"physics_quality": "good", "human_quality": "good"}),
    )
    dataset = open_latents(path)  # paths start at the folder above the list's
    assert isinstance(dataset, ReferenceList) and dataset.ids() == ["v", "1_meta_v1"]
    sample = dataset[0]
    assert torch.equal(sample.latents, arrays["vae_latent_path"][0])
    assert torch.equal(sample.conditions["encoder_hidden_states"], arrays["textlong_path"][0])
    assert torch.equal(sample.short, arrays["textshort_path"][0])
    image, given = (
        sample.conditions[k] for k in ("encoder_hidden_states_image", "latent_condition")
    )
    assert torch.equal(image, arrays["imgclip_path"][0])
    mask = torch.zeros(4, 3, 4, 6)
    mask[:, 0] = 1
    assert torch.equal(given, torch.cat([mask, arrays["f1_black_path"][0]]))
    assert sample.labels == {"physics_quality": 1}  # null is none, which missing_label decides
    assert label_of(sample.labels, "motion_quality", 0) == 0
    second = dataset[1]
    assert dataset.captions() == ["…", "…"] and second.caption == "…"
    assert second.short is None and label_of(second.labels, "motion_quality") == 1
    assert torch.equal(second.conditions["encoder_hidden_states"], other["text_en_path"][0])
    assert torch.equal(second.conditions["latent_condition"], other["latents_condition_path"][0])
    assert [b.shapes["latents"] for b in dataset.buckets] == [(16, 3, 4, 6), (16, 2, 4, 4)]
    assert all(b.shapes["latent_condition"][0] == 20 for b in dataset.buckets)
    dataset.drop_images()
    assert dataset[0].conditions.keys() == {"encoder_hidden_states"} < dataset.shapes.keys()
    assert len(dataset.files()) == 3 + 2


def test_paths_start_at_the_working_directory_and_may_repeat(tmp_path, monkeypatch):
    path, _ = write(tmp_path / "a", (TEMPLATE, {}))
    meta = path.read_text()
    path.write_text(f"\n{meta}\n{meta}")
    _, (arrays,) = write(tmp_path / "b", ({**TEMPLATE, "textlong_path": (1, 9, 20)}, {}))
    monkeypatch.chdir(tmp_path / "b")
    dataset = ReferenceList(path)
    assert len(dataset) == 2 and torch.equal(dataset[1].latents, arrays["vae_latent_path"][0])
    assert dataset.labels()[1][0] == f"{path}:4"
    monkeypatch.chdir(tmp_path)
    digest = ReferenceList(path).digest()
    content = json.loads((tmp_path / "a/data/meta/0_meta_v1.json").read_text())
    content["physics_quality"] = 0
    (tmp_path / "a/data/meta/0_meta_v1.json").write_text(json.dumps(content))
    assert ReferenceList(path).digest() != digest


def test_the_empty_prompt_is_the_references_or_ours(tmp_path):
    path, _ = write(tmp_path, (TEMPLATE, {}))
    with pytest.raises(ValueError, match=r"temp_data/null/wanx/null.npy: no such file"):
        Batches(ReferenceList(path), text_drop=0.1)
    null = tmp_path / "temp_data" / "null" / "wanx" / "null.npy"
    null.parent.mkdir(parents=True)
    np.save(null, np.full((1, 1, 20), 3, "float32"))
    text = Batches(ReferenceList(path), text_drop=1)[0].conditions["encoder_hidden_states"]
    assert text.shape == (1, 5, 20) and text[0, 0].eq(3).all() and text[0, 1:].eq(0).all()
    empty = {"encoder_hidden_states": torch.ones(1, 20)}
    save_tensors(empty, path.parent / "empty_prompt.safetensors")
    assert ReferenceList(path).empty_prompt()["encoder_hidden_states"].eq(1).all()


FLAT = {"vae_latent_path": (16, 3, 4, 6), "textshort_path": (1, 3, 20)}
WRONG = {
    "no latents": ({"textlong_path": (1, 3, 20)}, {}, "latents is None, expected a path under vid"),
    "no text": ({"vae_latent_path": LATENTS}, {}, "encoder_hidden_states is None, expected a path"),
    "not a path": (TEMPLATE, {"image_embeds": 3}, "encoder_hidden_states_image is 3, expected a p"),
    "missing": (TEMPLATE, {"latents_path": "", "video_vae_latent_path": "no.npy"}, "no such file"),
    "outside": (
        TEMPLATE,
        {"image_embeds": "/no.npy"},
        r"is '/no.npy', expected a path ins",
    ),
    "a label": (TEMPLATE, {"blur_quality": [1]}, r"blur_quality is \[1\], expected a finite numb"),
    "no batch": (FLAT, {}, r"latents is \[3, 4, 6\], expected 4 dimensions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_the_line_and_the_file(tmp_path, case):
    shapes, content, message = WRONG[case]
    path, _ = write(tmp_path, (shapes, content))
    with pytest.raises(ValueError, match=rf"x.list:1: data/meta/0_meta_v1.json.*{message}"):
        ReferenceList(path)


def test_damaged_files(tmp_path):
    path, _ = write(tmp_path, (TEMPLATE, {}))
    array = tmp_path / "data" / "0_textlong_path.npy"
    data = array.read_bytes()
    for damaged in (data[:-4], data[:9], b""):
        array.write_bytes(damaged)
        with pytest.raises(ValueError, match="0_textlong_path.npy: not a whole .npy file"):
            ReferenceList(path)
    array.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    message = "encoder_hidden_states in .*0_textlong_path.npy has 1 NaN"
    with pytest.raises(ValueError, match=message):
        ReferenceList(path)[0]
    meta = tmp_path / "data" / "meta" / "0_meta_v1.json"
    meta.write_text("{")
    with pytest.raises(ValueError, match="x.list:1: .*not a readable JSON file"):
        ReferenceList(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="x.list is '', expected a path of a JSON file per line"):
        ReferenceList(path)
    with pytest.raises(FileNotFoundError, match="y.list: no such list"):
        open_latents(tmp_path / "y.list")


def test_videos_of_one_id_stay_together(tmp_path):
    """Held-out items must not train, also if the list names a video twice."""
    path, _ = write(tmp_path, *[(TEMPLATE, {"source_id": f"v{i // 2}"}) for i in range(6)])
    path.write_text(path.read_text() * 2)
    rest, held_out = ReferenceList(path).split(0.3)
    assert (len(rest), len(held_out)) == (8, 4) and not set(rest.ids()) & set(held_out.ids())
