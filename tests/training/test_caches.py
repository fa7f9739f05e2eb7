"""Caches: what they hold, that they go on where they were, and that nothing stale can be read from them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from support.pairs import png
from support.pipelines import SIZE, tiny_pipeline

from t2i_spo_plugin.errors import ImageError
from t2i_spo_plugin.training.data import caches


def _image(seed: int) -> tuple[str, bytes]:
    data = png(seed)
    return caches.content_key(data), data


@pytest.fixture(scope="module")
def vae():
    return tiny_pipeline("sd1").vae


def test_cached_posterior_samples_what_encoding_every_step_would(vae, tmp_path):
    key, data = _image(0)
    store = caches.ShardStore(tmp_path)
    caches.build_latents(store, [(key, data)], vae, SIZE, progress=False)
    pixels = caches.decode_square(data, SIZE) * 2.0 - 1.0
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(7))
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    assert torch.equal(caches.posterior_sample(store.get([key]), noise), expected)


def test_an_autoencoder_without_posterior_keeps_plain_latents(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=3,
    )
    key, data = _image(0)
    store = caches.ShardStore(tmp_path)
    caches.build_latents(store, [(key, data)], vae, SIZE, progress=False)
    rows = store.get([key])
    assert list(rows) == ["mean"]
    with torch.no_grad():
        expected = vae.encode(caches.decode_square(data, SIZE) * 2.0 - 1.0).latents
    assert torch.equal(caches.posterior_sample(rows, torch.full_like(expected, 100.0)), expected)


def test_mirrored_images_go_through_the_encoder(vae, tmp_path):
    key, data = _image(0)
    store = caches.ShardStore(tmp_path)
    caches.build_latents(store, [(key, data)], vae, SIZE, progress=False)
    caches.build_latents(store, [(key, data)], vae, SIZE, mirrored=True, progress=False)
    expected = caches.encode_latents(vae, caches.decode_square(data, SIZE).flip(-1))["mean"]
    assert torch.equal(store.get([key + caches.MIRRORED])["mean"], expected)


def test_a_build_goes_on_where_it_was(vae, tmp_path):
    images = [_image(seed) for seed in range(5)]
    caches.build_latents(caches.ShardStore(tmp_path), images[:2], vae, SIZE, progress=False)
    encoded = []

    def counting(module, args):
        encoded.append(len(args[0]))

    handle = vae.encoder.register_forward_pre_hook(counting)
    store = caches.ShardStore(tmp_path)
    caches.build_latents(store, [*images, *images], vae, SIZE, progress=False)
    caches.build_latents(store, images, vae, SIZE, progress=False)
    handle.remove()
    assert sum(encoded) == 3
    assert not store.missing([key for key, _ in images])
    assert not list(tmp_path.glob("*.part*"))


def test_ranks_share_the_work(vae, tmp_path):
    images = [_image(seed) for seed in range(8)]
    for rank in range(2):
        caches.build_latents(
            caches.ShardStore(tmp_path / str(rank)), images, vae, SIZE, shard=(rank, 2), progress=False
        )
    held = [{key for key, _ in images if key in caches.ShardStore(tmp_path / str(rank))} for rank in range(2)]
    assert held[0] and held[1] and not held[0] & held[1] and len(held[0] | held[1]) == 8


@pytest.mark.parametrize("in_memory", [0, 2**20])
def test_rows_come_back_in_the_order_asked(tmp_path, in_memory):
    store = caches.ShardStore(tmp_path, in_memory)
    store.append(["a", "b"], {"mean": torch.tensor([[1.0], [2.0]])})
    store.append(["c"], {"mean": torch.tensor([[3.0]])})
    for read in (store, caches.ShardStore(tmp_path, in_memory)):
        assert read.get(["c", "a", "b", "a"])["mean"][:, 0].tolist() == [3.0, 1.0, 2.0, 1.0]
        assert "d" not in read and len(read) == 3
        with pytest.raises(KeyError):
            read.get(["d"])


def test_text_is_encoded_once(tmp_path):
    asked = []

    def encode(prompts):
        asked.extend(prompts)
        return {"text": torch.tensor([[float(len(prompt))] for prompt in prompts])}

    store = caches.ShardStore(tmp_path)
    caches.build_text(store, ["", "ab", "ab", "abc"], encode, progress=False)
    caches.build_text(store, ["abc", "abcd"], encode, progress=False)
    assert asked == ["", "ab", "abc", "abcd"]
    assert store.get(["abc", ""])["text"].tolist() == [[3.0], [0.0]]


def test_fingerprint_follows_weights_and_settings(vae):
    first, same, other = (tiny_pipeline("sd1", seed=seed).vae for seed in (0, 0, 1))
    assert caches.fingerprint(first) == caches.fingerprint(same) != caches.fingerprint(other)
    before = caches.fingerprint(first)
    next(first.parameters()).data.view(-1)[0] += 1e-3
    assert caches.fingerprint(first) != before


def test_images_are_cropped_to_the_central_square():
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert torch.equal(caches.decode_square(buffer.getvalue(), 8), torch.ones(1, 3, 8, 8))
    with pytest.raises(ImageError, match="decoded"):
        caches.decode_square(b"no image", 8)
