"""What is hidden cannot be recovered from what is shown, and nothing else changes."""

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards.hiding import CELLS_ACROSS, block_image, hide, pixelate
from t2i_spo_plugin.images import to_tensor


def noise(height, width, seed=0):
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def region(height, width, box):
    inside = torch.zeros(height, width, dtype=torch.bool)
    x0, y0, x1, y1 = box
    inside[y0:y1, x0:x1] = True
    return inside


def shuffled_cells(image, cell, seed=1):
    """The image with the pixels of each cell in another order: other detail, the same mean colours."""
    channels, height, width = image.shape
    cells = image.unflatten(2, (-1, cell)).unflatten(1, (-1, cell)).permute(0, 1, 3, 2, 4).flatten(3)
    order = torch.randperm(cell * cell, generator=torch.Generator().manual_seed(seed))
    cells = cells[..., order].unflatten(3, (cell, cell)).permute(0, 1, 3, 2, 4)
    return cells.reshape(channels, height, width)


@pytest.mark.parametrize("how", ["blur", "pixelate"])
@pytest.mark.parametrize(("height", "width", "box"), [(64, 64, (10, 20, 30, 50)), (101, 67, (0, 0, 20, 9))])
def test_hiding_leaves_no_detail_in_the_region_and_all_of_it_elsewhere(how, height, width, box):
    image, where = noise(height, width), region(height, width, box)
    before = image.clone()
    hidden = hide(image, where, how)
    assert torch.equal(image, before)
    x0, y0, x1, y1 = box
    inside = hidden[:, y0:y1, x0:x1]
    # Another image with the same averages would give the same: fine detail is gone.
    assert float(inside.std()) < 0.5 * float(image[:, y0:y1, x0:x1].std())
    margin = 3 * -(-max(x1 - x0, y1 - y0) // CELLS_ACROSS)
    far = ~region(height, width, (max(0, x0 - margin), max(0, y0 - margin), x1 + margin, y1 + margin))
    assert bool(far.any()) and torch.equal(hidden[:, far], image[:, far])


def test_a_large_object_is_hidden_as_well_as_a_small_one():
    """A checkerboard of six fields is lost at either size."""
    for size in (24, 240):
        board = ((torch.arange(size)[:, None] * 12 // size + torch.arange(size)[None] * 12 // size) % 2).float()
        image = board.expand(3, size, size)
        hidden = hide(image, torch.ones(size, size, dtype=torch.bool), "pixelate")
        assert len(hidden[0].unique()) <= CELLS_ACROSS**2
        assert float(hidden.std()) < 0.1


@pytest.mark.parametrize("channels", [1, 4])
def test_hiding_takes_any_channels_and_types(channels):
    image = torch.rand(channels, 20, 20).half()
    hidden = hide(image, region(20, 20, (0, 0, 9, 9)))
    assert hidden.shape == image.shape and hidden.dtype == image.dtype
    assert hide(image, torch.zeros(20, 20, dtype=torch.bool)) is image


def test_hiding_refuses_other_ways_and_regions_of_another_size():
    with pytest.raises(ConfigError, match="blur or pixelate"):
        hide(noise(8, 8), torch.ones(8, 8, dtype=torch.bool), "smear")
    with pytest.raises(ConfigError, match=r"region \[8, 8\], got \[4, 8\]"):
        hide(noise(8, 8), torch.ones(4, 8, dtype=torch.bool))


@pytest.mark.parametrize("how", ["blur", "pixelate"])
def test_hidden_pixels_depend_on_the_mean_colours_of_cells_alone(how):
    """Two images that differ in all but those means give one result, so neither can be recovered from it.

    That includes half a cell around the region, for what is to be hidden may be a little larger than the region.
    """
    image, where = noise(48, 48), region(48, 48, (8, 16, 32, 40))
    other = torch.where(region(48, 48, (4, 12, 36, 44)), shuffled_cells(image, cell=4), image)
    compared = region(48, 48, (6, 14, 34, 42))
    assert float((other - image)[:, compared].abs().mean()) > 0.2
    first, second = hide(image, where, how), hide(other, where, how)
    assert torch.allclose(first[:, compared], second[:, compared], atol=1e-5)


@pytest.mark.parametrize("form", ["pil", "uint8", "float", "tensor"])
@pytest.mark.parametrize("block", ["blur", "black"])
def test_a_blocked_image_keeps_its_form_and_no_more_than_the_means_of_its_cells(form, block):
    image = (noise(48, 36) * 255).round() / 255
    # Six cells along the longer side: cells of 8 pixels, and of 36 / 5 along the shorter one.
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    single = {
        "pil": Image.fromarray(array),
        "uint8": array,
        "float": array.astype(np.float32) / 255,
        "tensor": image.half(),
    }[form]
    blocked = block_image(single, block)
    assert type(blocked) is type(single) and getattr(blocked, "dtype", None) == getattr(single, "dtype", None)
    expected = pixelate(image, (6, 5), smooth=True) if block == "blur" else torch.zeros(3, 48, 36)
    assert torch.allclose(to_tensor(blocked)[0], expected, atol=2 / 255)


def test_a_blocked_image_is_the_same_as_one_that_is_hidden_whole():
    image = noise(37, 53)
    assert torch.equal(block_image(image, "blur"), hide(image, torch.ones(37, 53, dtype=torch.bool)))


def test_an_image_that_cannot_be_read_is_blocked_as_black():
    assert not block_image(torch.full((3, 8, 8), float("nan")), "blur").any()
    assert not block_image(np.full((8, 8, 3), np.inf, dtype=np.float32), "blur").any()


def test_an_image_that_is_not_blocked_is_the_same_object():
    image = noise(8, 8)
    assert block_image(image, "none") is image


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


def test_pixelating_replaces_whole_cells_in_the_region_and_one_around_it():
    image = noise(60, 48)
    # Twelve pixels across are six cells of two.
    hidden = hide(image, region(60, 48, (14, 20, 22, 32)), "pixelate")
    cells = image.unflatten(1, (30, 2)).unflatten(3, (24, 2)).mean((2, 4))
    cells = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)
    expected = image.clone()
    expected[:, 18:34, 12:24] = cells[:, 18:34, 12:24]
    torch.testing.assert_close(hidden, expected)


def test_cells_are_rounded_up_and_follow_the_longest_of_several_parts():
    image = noise(60, 60)
    both = region(60, 60, (0, 0, 13, 2)) | region(60, 60, (30, 30, 33, 34))
    hidden = hide(image, both, "pixelate")  # thirteen pixels: cells of three
    cells = image.unflatten(1, (20, 3)).unflatten(3, (20, 3)).mean((2, 4))
    cells = cells.repeat_interleave(3, 1).repeat_interleave(3, 2)
    expected = image.clone()
    for rows, columns in ((slice(0, 6), slice(0, 18)), (slice(27, 39), slice(27, 36))):
        expected[:, rows, columns] = cells[:, rows, columns]
    torch.testing.assert_close(hidden, expected)


def test_blurring_replaces_the_region_wholly_and_fades_out_around_it():
    image = torch.zeros(3, 60, 60)
    image[:, :, ::2] = 1.0
    where = region(60, 60, (24, 24, 36, 36))
    hidden = hide(image, where)
    smooth = pixelate(image, (30, 30), smooth=True)
    torch.testing.assert_close(hidden[:, where], smooth[:, where])
    share = ((hidden - image) / (smooth - image)).mean(0)[30]
    assert share[24:36].tolist() == pytest.approx([1.0] * 12, abs=1e-5)
    outside = share[36:42].tolist()
    assert outside == sorted(outside, reverse=True) and outside[0] > 0.5 and outside[-1] == 0.0
    assert torch.equal(hidden[:, :, 42:], image[:, :, 42:]) and torch.equal(hidden[:, 42:], image[:, 42:])


@pytest.mark.parametrize("block", ["black", "blur"])
@pytest.mark.parametrize("form", ["pil", "uint8", "float", "tensor", "bytes in a tensor"])
def test_an_image_with_transparency_is_blocked_as_one_without_any(block, form):
    image = torch.cat([noise(12, 9), torch.full((1, 12, 9), 0.25)])
    pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8)
    single = {
        "pil": Image.fromarray(pixels.numpy(), "RGBA"),
        "uint8": pixels.numpy(),
        "float": image.permute(1, 2, 0).numpy(),
        "tensor": image,
        "bytes in a tensor": pixels.permute(2, 0, 1),
    }[form]
    blocked = block_image(single, block)
    if form == "pil":
        assert blocked.size == (9, 12) and np.asarray(blocked).any() == (block == "blur")
        return
    seen = blocked.float() if isinstance(blocked, torch.Tensor) else torch.from_numpy(blocked).float()
    seen = seen if "tensor" in form else seen.permute(2, 0, 1)
    whole = 1.0 if form in ("float", "tensor") else 255.0
    assert seen.shape == (4, 12, 9) and torch.equal(seen[3], torch.full((12, 9), whole))
    assert bool(seen[:3].any()) == (block == "blur") and float(seen[:3].max()) <= whole


def test_a_file_is_blocked_as_an_image_of_its_size(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray((noise(12, 9).permute(1, 2, 0) * 255).to(torch.uint8).numpy()).save(path)
    black = block_image(path, "black")
    assert isinstance(black, Image.Image) and black.size == (9, 12) and not np.asarray(black).any()
    assert np.asarray(block_image(path.read_bytes(), "blur")).any() and block_image(path, "none") is path
