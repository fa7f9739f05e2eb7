"""The autoencoder of the ComfyUI pack computes what diffusers' does, without diffusers."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny


@pytest.fixture(scope="module")
def tiny():
    """The file alone: its package needs ComfyUI."""
    path = Path(__file__).parents[2] / "comfy_nodes" / "tiny_autoencoder.py"
    spec = importlib.util.spec_from_file_location("tiny_autoencoder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[((0, 1, 1, 3, 3), (4, 4, 3, 1, 0), 16), ((0, 2), (1, 1), 4)])
def vae(request):
    """Autoencoders of the sticker world's kind and of another size."""
    encoder, decoder, channels = request.param
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * len(encoder),
        decoder_block_out_channels=(8,) * len(decoder),
        num_encoder_blocks=encoder,
        num_decoder_blocks=decoder,
        latent_channels=channels,
    ).eval()


@torch.no_grad()
def test_encoder_and_decoder_agree_with_diffusers(tiny, vae):
    encoder, decoder = tiny.tiny_autoencoder(vae.config, vae.state_dict())
    x = torch.rand(2, 3, 32, 48)
    latents = vae.encoder(x * 2 - 1)
    assert torch.allclose(encoder(x), latents, atol=1e-5)
    assert torch.allclose(decoder(latents * 4), vae.decoder(latents * 4) / 2 + 0.5, atol=1e-5)
    assert x.shape[-1] // latents.shape[-1] == tiny.factor(vae.config)


def test_weights_of_another_size_are_refused(tiny, vae):
    weights = vae.state_dict()
    weights.pop("decoder.layers.0.bias")
    with pytest.raises(RuntimeError, match="bias"):
        tiny.tiny_autoencoder(vae.config, weights)
