"""Caches: what they hold, that they go on where they were, and that nothing stale can be read from them."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file
from support.pairs import pair_row, png
from support.pipelines import SIZE, tiny_pipeline

from t2i_spo_plugin.data import PAIR_COLUMNS, write_table
from t2i_spo_plugin.errors import ImageError, SPOError, UnreadableFileError
from t2i_spo_plugin.training.data import caches
from t2i_spo_plugin.training.data.dataset import images


def _image(seed: int) -> caches.SourceImage:
    data = png(seed)
    return caches.SourceImage(caches.content_key(data), data, f"{seed}.png")


@pytest.fixture(scope="module")
def vae():
    return tiny_pipeline("sd1").vae


def test_cached_posterior_samples_what_encoding_every_step_would(vae, tmp_path):
    image = _image(0)
    key, data, _ = image
    store = caches.ShardStore(tmp_path)
    caches.build_latents(store, [image], vae, SIZE, progress=False)
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
    image = _image(0)
    key, data, _ = image
    store = caches.ShardStore(tmp_path)
    caches.build_latents(store, [image], vae, SIZE, progress=False)
    rows = store.get([key])
    assert list(rows) == ["mean"]
    with torch.no_grad():
        expected = vae.encode(caches.decode_square(data, SIZE) * 2.0 - 1.0).latents
    assert torch.equal(caches.posterior_sample(rows, torch.full_like(expected, 100.0)), expected)


def test_mirrored_images_go_through_the_encoder(vae, tmp_path):
    image = _image(0)
    key, data, _ = image
    store = caches.ShardStore(tmp_path)
    caches.build_latents(store, [image], vae, SIZE, progress=False)
    caches.build_latents(store, [image], vae, SIZE, mirrored=True, progress=False)
    expected = caches.encode_latents(vae, caches.decode_square(data, SIZE).flip(-1))["mean"]
    assert torch.equal(store.get([key + caches.MIRRORED])["mean"], expected)


def test_a_build_goes_on_where_it_was(vae, tmp_path):
    several = [_image(seed) for seed in range(5)]
    caches.build_latents(caches.ShardStore(tmp_path), several[:2], vae, SIZE, progress=False)
    encoded = []

    def counting(module, args):
        encoded.append(len(args[0]))

    handle = vae.encoder.register_forward_pre_hook(counting)
    store = caches.ShardStore(tmp_path)
    caches.build_latents(store, [*several, *several], vae, SIZE, progress=False)
    caches.build_latents(store, several, vae, SIZE, progress=False)
    handle.remove()
    assert sum(encoded) == 3
    assert not store.missing([key for key, _, _ in several])
    assert not list(tmp_path.glob("*.part*"))


def test_ranks_share_the_work(vae, tmp_path):
    several = [_image(seed) for seed in range(8)]
    for rank in range(2):
        caches.build_latents(
            caches.ShardStore(tmp_path / str(rank)), several, vae, SIZE, shard=(rank, 2), progress=False
        )
    held = [{key for key, _, _ in several if key in caches.ShardStore(tmp_path / str(rank))} for rank in range(2)]
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


def test_an_image_of_a_table_that_is_broken_is_named(vae, tmp_path):
    rows = [pair_row(number) for number in range(3)]
    rows[1]["jpg_1"] = rows[1]["jpg_1"][:200]
    table = write_table(rows, tmp_path / "pairs.parquet", PAIR_COLUMNS)
    with pytest.raises(ImageError, match=r"row 1, jpg_1 of .*pairs.parquet: it cannot be decoded"):
        caches.build_latents(caches.ShardStore(tmp_path / "cache"), images(table), vae, SIZE, progress=False)


def _lengths(prompts):
    return {"text": torch.tensor([[float(len(prompt))] for prompt in prompts])}


def test_ranks_share_the_text_whoever_is_quicker(tmp_path):
    prompts = [f"{'a' * number}" for number in range(9)]
    late = caches.ShardStore(tmp_path)
    caches.build_text(caches.ShardStore(tmp_path), prompts, _lengths, shard=(0, 2), progress=False)
    late.refresh()
    caches.build_text(late, prompts, _lengths, shard=(1, 2), progress=False)
    assert not caches.ShardStore(tmp_path).missing(prompts)


@pytest.mark.parametrize("kept", [0, 7, 0.5, -1])
def test_a_shard_that_is_cut_is_named_and_made_again(tmp_path, kept):
    store = caches.ShardStore(tmp_path)
    caches.build_text(store, ["a", "ab"], _lengths, progress=False)
    caches.build_text(store, ["abc"], _lengths, progress=False)
    shard = next(file for file in store._files if store._where["ab"][0] == store._files.index(file))
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * kept) if 0 < kept < 1 else kept])
    with pytest.warns(UserWarning, match=f"{shard.name} is cut or damaged"):
        again = caches.ShardStore(tmp_path)
    assert again.missing(["a", "ab", "abc"]) == ["a", "ab"]
    caches.build_text(again, ["a", "ab", "abc"], _lengths, progress=False)
    assert caches.ShardStore(tmp_path).get(["ab", "abc", "a"])["text"].tolist() == [[2.0], [3.0], [1.0]]
    assert shard.read_bytes() == content


def test_a_file_that_is_no_shard_is_refused_and_stays(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter.safetensors")
    with pytest.raises(UnreadableFileError, match=r"adapter\.safetensors is no shard of a cache"):
        caches.ShardStore(tmp_path)
    assert (tmp_path / "adapter.safetensors").is_file()


def test_latents_that_are_not_finite_are_refused_and_the_autoencoder_is_named(tmp_path):
    vae = copy.deepcopy(tiny_pipeline("sd1").vae)
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] = float("nan")
    store = caches.ShardStore(tmp_path)
    with pytest.raises(
        SPOError, match=r"autoencoder \(AutoencoderKL, torch.float32\) gives NaN or Inf as mean of 2 of 2"
    ):
        caches.build_latents(store, [_image(0), _image(1)], vae, SIZE, progress=False)
    assert not list(tmp_path.iterdir())


def test_images_are_cropped_to_the_central_square():
    pixels = np.zeros((8, 24, 3), dtype=np.uint8)
    pixels[:, 8:16] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert torch.equal(caches.decode_square(buffer.getvalue(), 8), torch.ones(1, 3, 8, 8))
    with pytest.raises(ImageError, match="decoded"):
        caches.decode_square(b"no image", 8)
