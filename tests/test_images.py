import numpy as np
import pytest
import torch
from PIL import Image

from t2i_spo_plugin.errors import ImageError
from t2i_spo_plugin.images import batches, channels_first, count, image_size, pixelate, split, to_pil, to_tensor


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 256, (2, 12, 10, 3), dtype=np.uint8)


def test_every_form_of_an_image_gives_one_tensor(array):
    expected = torch.from_numpy(array).permute(0, 3, 1, 2) / 255.0
    pil_images = [Image.fromarray(image) for image in array]
    for images in (
        array,
        pil_images,
        list(array),
        expected,
        list(expected),
        array.astype(np.float32) / 255,
        expected.half(),
    ):
        assert torch.allclose(to_tensor(images), expected, atol=1e-3)
        assert to_tensor(images).dtype == torch.float32
        assert count(images) == len(split(images)) == 2
    assert torch.equal(to_tensor(pil_images[0]), expected[:1])
    assert torch.equal(to_tensor(expected[0]), expected[:1])


def test_converting_changes_no_image(array):
    before = array.copy()
    to_tensor(array, size=4).mul_(0)
    pixels = torch.rand(1, 3, 4, 4)
    original = pixels.clone()
    to_tensor(pixels).mul_(0)
    assert np.array_equal(array, before)
    assert torch.equal(pixels, original)


def test_converting_to_pil_and_back_is_exact(array):
    back = to_pil(to_tensor(array))
    assert all(np.array_equal(np.asarray(image), original) for image, original in zip(back, array, strict=True))


def test_transparency_is_laid_over_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert torch.equal(to_tensor(clear), torch.ones(1, 3, 4, 4))


def test_resampling_is_antialiased_and_does_not_depend_on_the_batch():
    checkerboard = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(32, 32).expand(1, 3, 64, 64)
    small = to_tensor(checkerboard, size=8)
    assert small.shape == (1, 3, 8, 8)
    assert torch.allclose(small, torch.full_like(small, 0.5), atol=0.05)
    other = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_tensor(torch.cat([other, checkerboard]), size=8)[3:], small)


def test_resampling_stays_in_range():
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    large = to_tensor(edge, size=64)
    assert 0.0 <= float(large.min()) and float(large.max()) <= 1.0


def test_gradients_reach_the_pixels():
    pixels = torch.full((1, 3, 8, 8), 0.5, requires_grad=True)
    to_tensor(pixels, size=4).sum().backward()
    assert float(pixels.grad.abs().sum()) > 0


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
        (np.full((4, 4, 3), np.inf), "NaN or Inf"),
        (torch.full((1, 3, 4, 4), -1.0), r"\[0, 1\]"),
        (np.full((4, 4, 3), 200.0), r"\[0, 1\]"),
        (np.zeros((4, 4, 3), dtype=np.int64), "int64"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int32), "int32"),
        (np.zeros((3, 4, 4), dtype=np.uint8), "shape"),
        (torch.zeros(1, 4, 4, 4), "shape"),
        (torch.zeros(0, 3, 4, 4), "shape"),
        ([], "empty"),
        ("image.png", "str"),
        ([Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))], "different sizes"),
    ],
)
def test_bad_images_are_refused(images, reason):
    with pytest.raises(ImageError, match=reason):
        to_tensor(images)


def test_images_of_different_sizes_are_fine_with_a_size():
    assert to_tensor([Image.new("RGB", (4, 4)), Image.new("RGB", (9, 5))], size=6).shape == (2, 3, 6, 6)
    with pytest.raises(ImageError, match="at least 1"):
        to_tensor(Image.new("RGB", (4, 4)), size=0)


def test_channels_last_images_become_what_a_viewer_shows():
    rgb = torch.rand(2, 5, 7, 3)
    assert torch.equal(channels_first(rgb), rgb.movedim(-1, 1)) and channels_first(rgb).data_ptr() == rgb.data_ptr()
    assert channels_first(torch.rand(2, 5, 7, 1)).shape == (2, 3, 5, 7)
    clear = torch.cat([rgb, torch.zeros(2, 5, 7, 1)], -1)
    assert torch.equal(channels_first(clear), torch.ones(2, 3, 5, 7))
    assert torch.equal(channels_first(rgb * 3 - 1), (rgb * 3 - 1).clamp(0, 1).movedim(-1, 1))
    assert channels_first(torch.zeros(0, 5, 7, 3)).shape == (0, 3, 5, 7)
    for wrong in (torch.rand(5, 7, 3), torch.rand(1, 5, 7, 2)):
        with pytest.raises(ImageError, match="expected images"):
            channels_first(wrong)


def test_the_size_of_an_image_is_height_and_width_in_every_form(array):
    image = array[0]
    for form in (image, Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1)):
        assert image_size(form) == (12, 10)


def test_pixelating_leaves_the_mean_colour_of_each_cell():
    pixels = torch.rand(3, 12, 8, generator=torch.Generator().manual_seed(0))
    cells = pixels.unflatten(1, (3, 4)).unflatten(3, (2, 4)).mean((2, 4))
    assert torch.allclose(pixelate(pixels, (3, 2)), cells.repeat_interleave(4, 1).repeat_interleave(4, 2), atol=1e-6)


def test_smooth_pixelating_has_no_edges_and_no_more_detail():
    pixels = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth, hard = pixelate(pixels, (4, 4), smooth=True), pixelate(pixels, (4, 4))
    steepest = [float(image.diff(dim=-1).abs().max()) for image in (smooth, hard, pixels)]
    assert steepest[0] < steepest[1] / 8 < steepest[2] / 8
    assert torch.allclose(smooth.mean((1, 2)), pixels.mean((1, 2)), atol=0.02)


def test_batches_hold_every_image_once_and_in_order(array):
    parts = list(batches(array, 8, torch.device("cpu"), batch_size=1))
    assert [tuple(part.shape) for part in parts] == [(1, 3, 8, 8)] * 2
    assert torch.equal(torch.cat(parts), to_tensor(array, 8))
