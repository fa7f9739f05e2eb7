import io
import os
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.images import grey_png, huge_png

from t2i_spo_plugin.errors import ImageError
from t2i_spo_plugin.images import (
    batches,
    channels_first,
    count,
    image_files,
    image_size,
    open_image,
    split,
    to_pil,
    to_tensor,
    views,
)


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
    assert open_image(clear, "RGBA").tobytes() == clear.tobytes()


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


GREYS = np.arange(30, 222, dtype=np.uint8).reshape(12, 16)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREYS),
        Image.fromarray(GREYS.astype(np.uint16) * 257),
        Image.fromarray(GREYS.astype(np.int32)),
        Image.fromarray(GREYS.astype(np.int32) * 257),
        Image.fromarray(GREYS.astype(np.float32) / 255),
        Image.fromarray(GREYS.astype(np.float32)),
        Image.fromarray(GREYS.astype(np.float32) * 257),
        Image.fromarray(GREYS).convert("P"),
        Image.fromarray(GREYS).convert("CMYK"),
        Image.fromarray(GREYS).convert("LA"),
    ],
    ids=["8", "16", "int of bytes", "int of 16", "float", "float of bytes", "float of 16", "palette", "cmyk", "alpha"],
)
def test_every_depth_of_grey_gives_the_same_image(image):
    assert np.abs(np.asarray(open_image(image)).astype(int) - GREYS[..., None]).max() <= 1


@pytest.mark.parametrize(("form", "bits"), [("PNG", 16), ("TIFF", 16), ("PPM", 16), ("TIFF", 12)])
def test_files_are_scaled_by_their_depth(form, bits, tmp_path):
    # A dark image: its own brightest value says nothing of the depth.
    dark = GREYS // 8
    deep = (dark.astype(np.uint16) * 257) >> (16 - bits)
    if bits == 12:
        packed = np.repeat(deep[..., None], 1, -1).reshape(-1, 2).astype(np.uint32)
        pairs = np.stack([packed[:, 0] >> 4, (packed[:, 0] & 15) << 4 | packed[:, 1] >> 8, packed[:, 1] & 255], -1)
        data = tiff(16, 12, 12, pairs.astype(np.uint8).tobytes())
    else:
        data = encoded(Image.fromarray(deep.astype(np.int32) if form == "PPM" else deep), form)
    assert np.abs(np.asarray(open_image(data)).astype(int) - dark[..., None]).max() <= 1


def tiff(width, height, bits, pixels):
    """A little-endian TIFF of one strip of grey samples."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(pixels)}
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()
    )
    header = b"II*\0" + struct.pack("<I", 8 + len(pixels))
    return header + pixels + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0"


def test_light_beyond_white_is_not_taken_for_bytes():
    bright = np.linspace(0.0, 4.0, 192, dtype=np.float32).reshape(12, 16)
    assert np.asarray(open_image(Image.fromarray(bright))).mean() == pytest.approx(127.5, abs=2)
    with pytest.raises(ImageError, match="NaN"):
        open_image(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def test_one_bit_and_transparent_colours_are_read():
    assert open_image(encoded(Image.new("1", (4, 4), 1))).getpixel((0, 0)) == (255, 255, 255)
    seen = open_image(grey_png(2, 1, 16, b"\0" + struct.pack(">HH", 0, 65535), transparent=0), "RGBA")
    assert [seen.getpixel((x, 0))[3] for x in (0, 1)] == [0, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    seen = open_image(encoded(palette, transparency=0))
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_are_upright_by_their_exif(orientation, form, tmp_path):
    image = Image.fromarray(np.linspace(0, 255, 3 * 16 * 24).astype(np.uint8).reshape(16, 24, 3))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, form, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")
    upright = open_image(data)
    assert upright.tobytes() == expected.tobytes() and upright.size == expected.size
    # Opened once, it is never turned again.
    assert open_image(upright).tobytes() == upright.tobytes() and image_size(upright) == upright.size[::-1]
    path = tmp_path / "image"
    path.write_bytes(data)
    with Image.open(path) as opened:
        assert image_size(opened) == upright.size[::-1]
        assert torch.equal(to_tensor(opened), to_tensor(upright))


def test_exif_that_cannot_be_read_turns_nothing():
    data = encoded(Image.new("RGB", (4, 8)), "JPEG", exif=b"Exif\0\0no exif at all")
    assert open_image(data).size == (4, 8)


def test_what_cannot_be_opened_is_one_error_that_names_the_file(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files = {
        "text.png": (b"no image", "it is no image"),
        "empty.png": (b"", "it is no image"),
        "cut.png": (encoded(noise)[:3000], "it cannot be decoded"),
        "cut.jpg": (encoded(noise, "JPEG")[:900], "it cannot be decoded"),
        "huge.png": (huge_png(30_000), "more pixels than the 178,956,970 that are read"),
    }
    for name, (data, reason) in files.items():
        (tmp_path / name).write_bytes(data)
        for source in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(ImageError, match=f"^{re.escape(str(source))}: .*{reason}"):
                open_image(source)
        with pytest.raises(ImageError, match=f"^it .*{reason.removeprefix('it ')}"):
            list(views(data))
    with pytest.raises(ImageError, match=r"none.png: it cannot be read: No such file"):
        open_image(tmp_path / "none.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "."):
        with pytest.raises(ImageError, match="it is no file"):
            open_image(tmp_path / name)


def test_opening_changes_no_image():
    image = Image.new("RGBA", (4, 8), (1, 2, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    before = image.tobytes(), image.size, image.mode, dict(image.info)
    open_image(image), list(views(image)), image_size(image)
    assert (image.tobytes(), image.size, image.mode, dict(image.info)) == before


def test_image_files_leave_out_what_begins_with_a_dot(tmp_path):
    for name in ("b.PNG", "a.gif", ".hidden.png", ".cache/c.png", "deep/.x/d.png", "deep/e.jpeg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)]
    assert found == ["a.gif", "b.PNG", "deep/e.jpeg"]


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
    assert not channels_first(clear, "black").any()
    assert torch.equal(channels_first(clear, None), clear.movedim(-1, 1))
    assert torch.equal(channels_first(rgb * 3 - 1), (rgb * 3 - 1).clamp(0, 1).movedim(-1, 1))
    assert channels_first(torch.zeros(0, 5, 7, 3)).shape == (0, 3, 5, 7)
    for wrong in (torch.rand(5, 7, 3), torch.rand(1, 5, 7, 2)):
        with pytest.raises(ImageError, match="expected images"):
            channels_first(wrong)


def test_the_size_of_an_image_is_height_and_width_in_every_form(array):
    image = array[0]
    for form in (image, Image.fromarray(image), torch.from_numpy(image).permute(2, 0, 1)):
        assert image_size(form) == (12, 10)


def test_batches_hold_every_image_once_and_in_order(array):
    parts = list(batches(array, 8, torch.device("cpu"), batch_size=1))
    assert [tuple(part.shape) for part in parts] == [(1, 3, 8, 8)] * 2
    assert torch.equal(torch.cat(parts), to_tensor(array, 8))
