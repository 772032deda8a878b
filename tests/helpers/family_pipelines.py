"""Tiny random pipelines of other families than Wan, with the parts and classes of the real ones."""

import re

import pytest
import torch
from tiny_pipeline import tiny

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WIDTH = 20  # of the text states
_FLOW = diffusers.FlowMatchEulerDiscreteScheduler
_JOINT = {
    "num_attention_heads": 2, "attention_head_dim": 24, "mlp_ratio": 2.0,
    "rope_axes_dim": (4, 8, 12), "num_refiner_layers": 1, "text_embed_dim": WIDTH,
}  # fmt: skip
# Family → class of its pipeline.
PIPELINES = {
    "hunyuan": "HunyuanVideoPipeline",
    "hunyuan15": "HunyuanVideo15Pipeline",
    "ltx": "LTXPipeline",
    "ltx2": "LTX2Pipeline",
    "mochi": "MochiPipeline",
    "cogvideox": "CogVideoXPipeline",
}


def tokenizer(words=""):
    """Return a tokenizer of bytes that knows ``words`` as a token each."""
    found = tiny.make_tokenizer()
    found.add_tokens(sorted(set(re.findall(r"\S+", words))))
    return found


def _t5(size, width=WIDTH):
    config = transformers.T5Config(
        vocab_size=size, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def _hunyuan():
    module = __import__("diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video", fromlist=["x"])
    template = module.DEFAULT_PROMPT_TEMPLATE["template"].replace("{}", " ")
    words = tokenizer(template)
    llama = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    letters = tokenizer()
    letters.model_max_length = 77
    clip = transformers.CLIPTextConfig(
        vocab_size=len(letters), hidden_size=12, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=16, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    return dict(
        text_encoder=transformers.LlamaModel(llama).eval(),
        tokenizer=words,
        text_encoder_2=transformers.CLIPTextModel(clip).eval(),
        tokenizer_2=letters,
        vae=vae,
        scheduler=_FLOW(shift=7.0),
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            **_JOINT, num_layers=2, num_single_layers=2, pooled_projection_dim=12
        ),
    )


def _hunyuan15():
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    qwen = transformers.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048,
        rope_scaling={"type": "default", "mrope_section": [1, 2, 2], "rope_type": "default"},
        pad_token_id=0,
    )  # fmt: skip
    model = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLTextModel(qwen)
    byt5 = transformers.T5Config(
        vocab_size=384, d_model=12, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=32, block_out_channels=(32, 32, 32, 32, 64), layers_per_block=1
    )
    guider = diffusers.guiders.ClassifierFreeGuidance(guidance_scale=6.0)
    return dict(
        text_encoder=model.eval(),
        tokenizer=words,
        text_encoder_2=transformers.T5EncoderModel(byt5).eval(),
        tokenizer_2=transformers.ByT5Tokenizer(),
        vae=vae,
        scheduler=_FLOW(shift=5.0),
        guider=guider,
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            **_JOINT, num_layers=2, text_embed_2_dim=12, image_embed_dim=16
        ),
    )


def _ltx():
    words = tokenizer()
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    return dict(
        text_encoder=_t5(len(words)),
        tokenizer=words,
        vae=vae,
        scheduler=_FLOW(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
            cross_attention_dim=32, num_layers=2, caption_channels=WIDTH,
        ),
    )  # fmt: skip


def _ltx2():
    words = tokenizer()
    words.model_max_length = 64
    text = transformers.Gemma3TextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=14, patch_size=14,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=3
    )
    module = __import__("diffusers.pipelines.ltx2", fromlist=["x"])
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32, temporal_compression_ratio=8,
    )  # fmt: skip
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    audio = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1, 1), num_res_blocks=1, latent_channels=2, mel_bins=8,
        attn_resolutions=None, resolution=16,
    )  # fmt: skip
    vocoder = module.LTX2Vocoder(
        in_channels=16, hidden_channels=8, out_channels=2, upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
    )  # fmt: skip
    connectors = module.LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=10, video_connector_num_layers=1,
        video_connector_num_learnable_registers=8, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=10, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=8, connector_rope_base_seq_len=32,
        rope_theta=10000.0, rope_double_precision=False, causal_temporal_positioning=False,
    )  # fmt: skip
    return dict(
        text_encoder=transformers.Gemma3ForConditionalGeneration(config).eval(),
        tokenizer=words,
        connectors=connectors,
        vae=vae,
        audio_vae=audio,
        vocoder=vocoder,
        scheduler=_FLOW(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
            cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4,
            audio_num_attention_heads=2, audio_attention_head_dim=8,
            audio_cross_attention_dim=16, num_layers=2, caption_channels=WIDTH,
            rope_type="split",
        ),
    )  # fmt: skip


def _mochi():
    words = tokenizer()
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
        decoder_block_out_channels=(32, 32, 32, 32), scaling_factor=1.25,
    )  # fmt: skip
    return dict(
        text_encoder=_t5(len(words), 24),
        tokenizer=words,
        vae=vae,
        scheduler=_FLOW(invert_sigmas=True),
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, num_layers=2, in_channels=12,
            pooled_projection_dim=20, text_embed_dim=24, time_embed_dim=16,
        ),
    )  # fmt: skip


def _cogvideox():
    words = tokenizer()
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    return dict(
        text_encoder=_t5(len(words)),
        tokenizer=words,
        vae=vae,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
            time_embed_dim=16, text_embed_dim=WIDTH, num_layers=2, sample_width=6, sample_height=4,
            sample_frames=9, use_rotary_positional_embeddings=True,
        ),
    )  # fmt: skip


class Solver:
    """Put a solver of ours into a pipeline; Mochi's has inverted times and the other sign."""

    order, config = 1, {}

    def __init__(self, inner, inverted=False):
        self.inner, self.inverted = inner, inverted

    def set_timesteps(self, num=None, device=None, sigmas=None, **kwargs):
        self.inner.set_timesteps(len(sigmas) if num is None else num)
        times = self.inner.timesteps
        self.timesteps = 1000 - times if self.inverted else times
        self.sigmas, self.number = self.inner.sigmas, 0

    def set_begin_index(self, index):
        assert index == 0

    def step(self, output, timestep, sample, return_dict=False):
        time = self.inner.timesteps[self.number]
        self.number += 1
        return self.inner.step(-output if self.inverted else output, time, sample)


def make_family_pipeline(family, seed=0):
    """Return a pipeline of a family; skip the test if this diffusers lacks it."""
    name = PIPELINES[family]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    torch.manual_seed(seed)
    parts = globals()[f"_{family}"]()
    pipeline = getattr(diffusers, name)(**parts)
    for part in (pipeline.vae, pipeline.transformer):
        part.eval()
    return pipeline
