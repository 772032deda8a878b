"""Autoencoders of other families than Wan: their latents, and tiles within a budget."""

import pytest
import torch
from family_pipelines import PIPELINES, make_family_pipeline

from prfl_fast.data.family_codec import FamilyCodec
from prfl_fast.memory.ledger import Ledger

FAMILIES = tuple(f if f == "ltx" else pytest.param(f, marks=pytest.mark.slow) for f in PIPELINES)


def codec_of(family, **options):
    codec = FamilyCodec(make_family_pipeline(family).vae, **options)
    time, side, _ = codec.strides
    return codec, (2 * time + 1, 6 * side, 8 * side)


def peak_of(codec, latents):
    """Return the peak of live bytes while latents are decoded, without workspaces."""
    with Ledger() as ledger:
        codec.decode(latents)
    return ledger.peak


@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_is_encoded_and_decoded_as_by_the_autoencoder(family):
    codec, size = codec_of(family)
    video = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (1, *codec.latent_shape(*size))
    with torch.no_grad():
        mode = codec.vae.encode(video).latent_dist.mode()
        times = [torch.zeros(1)] * bool(codec.vae.config.get("timestep_conditioning"))
        expected = codec.vae.decode(mode, *times).sample.clamp(-1, 1)
    assert torch.allclose(codec.decode(latents), expected, atol=1e-5)
    scale = codec.vae.config.scaling_factor
    if family in ("hunyuan", "hunyuan15", "cogvideox"):
        assert torch.equal(latents, mode / (1 / torch.tensor(scale)))


# Videos of LTX's tiny autoencoders need more bytes than all its activations.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["hunyuan", "hunyuan15", "mochi", "cogvideox"])
def test_a_budget_bounds_memory(family):
    codec, size = codec_of(family)
    shape = codec.latent_shape(*size)
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    whole = codec.decode(latents)
    codec.budget = 1 << 40
    assert torch.equal(codec.decode(latents), whole)
    (peak,) = codec._peaks.values()
    assert peak_of(codec, latents) <= peak
    codec.budget = peak * 3 // 4
    tiled = codec.decode(latents)
    assert codec.vae.use_tiling and tiled.shape == whole.shape
    assert 0 < (tiled - whole).abs().mean() < whole.std()
    assert peak_of(codec, latents) <= codec.budget
    codec.budget = 1000
    with pytest.raises(ValueError, match=r"weights is '.* GiB', expected at least .* in tiles"):
        codec.decode(latents)
    with pytest.raises(ValueError, match="in tiles"):
        codec.set_encoder_tiles((1, 3, *size))


def test_sizes_that_do_not_fit_are_named():
    codec, _ = codec_of("ltx")
    with pytest.raises(ValueError, match=r"frames is 5, expected 8n \+ 1, such as 81"):
        codec.latent_shape(5, 64, 64)
    with pytest.raises(ValueError, match="width is 48, expected a multiple of 32"):
        codec.latent_shape(9, 64, 48)
    pairs = FamilyCodec(codec.vae, (2, 1, 1))
    with pytest.raises(ValueError, match=r"frames is 17, expected 16n \+ 9"):
        pairs.latent_shape(17, 64, 64)
    assert pairs.latent_shape(25, 64, 64) == (8, 4, 2, 2)
    with pytest.raises(ValueError, match="expected AutoencoderKLWan"):
        codec.image_condition(torch.zeros(3, 64, 64), 9)
