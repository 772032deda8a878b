"""Write a tiny random Wan pipeline in the folders of diffusers, and three clips with captions.

They stand in for a checkpoint and a user's videos, so that every command runs on any machine:

    python docs/tiny_pipeline.py world/pipeline --kind i2v --clips world/clips

The strides of the autoencoder, its channels and the names of all parts are those of Wan; widths and
numbers of layers are small. Its latents_mean and latents_std are measured on moving shapes.
"""

import argparse
import csv
import math
from pathlib import Path

import torch

from prfl_fast.data.video import write_video
from prfl_fast.utils.quiet import quiet_libraries

quiet_libraries()

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

KINDS = ("t2v", "i2v", "ti2v")
TEXT_WIDTH, IMAGE_WIDTH, HEADS, HEAD_WIDTH = 32, 20, 2, 24


def moving_shape(kind: str, frames: int, size: tuple[int, int], jerk: float = 0.0) -> torch.Tensor:
    """Return a clip of a disc, square or ring that moves, ``[3, F, H, W]`` in [-1, 1].

    ``jerk`` moves it back and forth by this share of the height from frame to frame.
    """
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    images = []
    for i in range(frames):
        angle = 2 * math.pi * i / max(frames, 8)
        step = jerk * height * (-1) ** i
        dy, dx = (
            y - height * (0.5 + 0.25 * math.sin(angle)) - step,
            x - width * (0.2 + 0.6 * i / frames),
        )
        far = torch.maximum(dx.abs(), dy.abs()) if kind == "square" else (dx**2 + dy**2).sqrt()
        inside = (far / (0.2 * height)).sub(0.6 if kind == "ring" else 0)
        inside = torch.sigmoid(8 * (0.4 - inside.abs() if kind == "ring" else 1 - inside))
        ground = torch.stack([y / height, x / width, 1 - y / height]) * 0.6 - 0.8
        color = {"disc": (1.0, -0.6, -0.8), "square": (-0.7, 0.9, -0.5), "ring": (0.2, 0.4, 1.0)}
        images.append(
            ground.lerp(torch.tensor(color[kind])[:, None, None].expand_as(ground), inside)
        )
    return torch.stack(images, 1)


def make_clips(folder: Path) -> None:
    """Write three clips and ``clips.csv`` with captions and labels of motion quality."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind, size, jerk in (
        ("disc", (96, 128), 0),
        ("square", (128, 96), 0),
        ("ring", (96, 96), 0.1),
    ):
        write_video(folder / f"{kind}.mp4", moving_shape(kind, 24, size, jerk), fps=16)
        how = "jerks across the picture" if jerk else "glides smoothly across the picture"
        caption = f"A {kind} on a plain ground that fades from dark to light {how} in a wave."
        short = f"A {kind} {how.split()[0]}."
        rows.append((f"{kind}.mp4", caption, short, int(not jerk)))
    with open(folder / "clips.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("video_path", "long_caption", "short_caption", "motion_quality"))
        writer.writerows(rows)


def make_vae(kind: str) -> AutoencoderKLWan:
    """Return an autoencoder with Wan2.1's strides 4x8x8, or Wan2.2's 4x16x16 for ``ti2v``."""
    channels, options = 16, {}
    if kind == "ti2v":
        channels = 48
        options = dict(is_residual=True, patch_size=2, in_channels=12, out_channels=12)
        options |= dict(scale_factor_spatial=16, decoder_base_dim=8)
    options |= dict(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    vae = AutoencoderKLWan(base_dim=8, z_dim=channels, num_res_blocks=1, **options).eval()
    shapes = [moving_shape(s, 9, (64, 64)) for s in ("disc", "square", "ring")]
    with torch.no_grad():
        latents = vae.encode(torch.stack(shapes)).latent_dist.mode()
    # A random encoder's channels hardly vary: without this, all latents would look alike.
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(),
        latents_std=latents.std((0, 2, 3, 4)).tolist(),
    )
    return vae


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with umT5's special tokens, which ends a text by ``</s>``."""
    special = ["<pad>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_pipeline(kind: str = "t2v", seed: int = 0) -> WanPipeline | WanImageToVideoPipeline:
    """Return a tiny random pipeline: text to video, image to video (Wan2.1), or TI2V (Wan2.2)."""
    torch.manual_seed(seed)
    vae = make_vae(kind)
    width, channels = HEADS * HEAD_WIDTH, vae.config.z_dim
    options = dict(in_channels=channels, out_channels=channels)
    if kind == "i2v":
        options |= dict(
            in_channels=2 * channels + 4, image_dim=IMAGE_WIDTH, added_kv_proj_dim=width
        )
    tokenizer = make_tokenizer()
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=TEXT_WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    parts = dict(
        vae=vae,
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text).eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=WanTransformer3DModel(
            num_attention_heads=HEADS, attention_head_dim=HEAD_WIDTH, num_layers=2, ffn_dim=96,
            text_dim=TEXT_WIDTH, freq_dim=32, rope_max_seq_len=128, **options,
        ).eval(),
    )  # fmt: skip
    if kind != "i2v":
        return WanPipeline(**parts, expand_timesteps=kind == "ti2v")
    vision = CLIPVisionConfig(
        hidden_size=IMAGE_WIDTH, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14, projection_dim=16, hidden_act="gelu",
    )  # fmt: skip
    size = {"height": 28, "width": 28}
    return WanImageToVideoPipeline(
        **parts,
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(size=size, do_center_crop=False),
    )


def main() -> None:
    """Write the pipeline, and the clips if they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the pipeline")
    parser.add_argument("--kind", choices=KINDS, default="t2v")
    parser.add_argument("--clips", type=Path, help="folder of three clips and clips.csv")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_pipeline(options.kind, options.seed).save_pretrained(options.out)
    if options.clips is not None:
        make_clips(options.clips)


if __name__ == "__main__":
    main()
