"""Lists in the form of HY-Video-PRFL, with files of random values."""

import json

import numpy as np
import torch

LATENTS, CLIP = (1, 16, 3, 4, 6), (1, 257, 10)
TEMPLATE = {
    "vae_latent_path": LATENTS,
    "f1_black_path": LATENTS,
    "imgclip_path": CLIP,
    "textshort_path": (1, 3, 20),
    "textlong_path": (1, 5, 20),
}
OTHER_NAMES = {
    "video_vae_latent_path": (1, 16, 2, 4, 4),
    "latents_condition_path": (1, 20, 2, 4, 4),
    "image_embeds": CLIP,
    "text_en_path": (1, 4, 20),
}


def write(root, *videos, name="x.list"):
    """Write a list of videos given as (shapes by key, other content); return list and arrays."""
    generator, arrays = np.random.default_rng(0), []
    (root / "data" / "meta").mkdir(parents=True, exist_ok=True)
    paths = []
    for i, (shapes, content) in enumerate(videos):
        found = {key: generator.standard_normal(s).astype("float32") for key, s in shapes.items()}
        content = {"long_caption": "…", "latent_shape": [1], **content}
        for key, array in found.items():
            content[key] = f"data/{i}_{key}.npy"
            np.save(root / content[key], array)
        paths.append(f"data/meta/{i}_meta_v1.json")
        (root / paths[-1]).write_text(json.dumps(content), encoding="utf-8")
        arrays.append({key: torch.from_numpy(array) for key, array in found.items()})
    (root / "data" / name).write_text("\n".join(paths) + "\n")
    return root / "data" / name, arrays
