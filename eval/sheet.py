"""A sheet of images as one PNG: rows and titled columns, each image with a caption one can read."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards import wrap_text
from t2i_spo_plugin.images import open_image


BACKGROUND, INK, SOFT = (250, 249, 247), (29, 31, 35), (92, 98, 107)
FONT_SIZE = 13
GAP = 10


def image_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    column_titles: Sequence[str] = (),
    captions: Sequence[Sequence[str]] | None = None,
    scale: int = 2,
    row_titles: Sequence[str] | None = None,
    font_size: int = FONT_SIZE,
) -> Image.Image:
    """Images side by side.

    Args:
        rows: images, all of one size; None leaves a place empty. Rows may be shorter than the widest.
        column_titles: one a column, or none.
        captions: below each image, wrapped to its width; the shape of `rows`.
        scale: whole-number enlargement of the images.
        row_titles: above each row, over its whole width, such as the prompt.

    Raises:
        ConfigError: no image at all, sizes that differ, or titles and captions of another shape.
    """
    sizes = {image.size for row in rows for image in row if image is not None}
    if len(sizes) != 1:
        raise ConfigError(f"a sheet needs images of one size, got {sorted(sizes) or 'none'}")
    columns = max(len(row) for row in rows)
    if column_titles and len(column_titles) != columns:
        raise ConfigError(f"expected {columns} column titles, got {len(column_titles)}")
    if captions is not None and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ConfigError("captions must have the shape of the rows")
    if row_titles is not None and len(row_titles) != len(rows):
        raise ConfigError(f"expected {len(rows)} row titles, got {len(row_titles)}")
    if scale < 1:
        raise ConfigError(f"scale must be at least 1, got {scale}")

    font = ImageFont.load_default(size=font_size)
    width, height = (edge * scale for edge in sizes.pop())
    line = round(font_size * 1.3)
    total_width = GAP + columns * (width + GAP)
    titles = [wrap_text(title, width, font) for title in column_titles]
    wrapped = [[wrap_text(text, width, font) for text in row] for row in captions] if captions else None
    row_lines = (
        [wrap_text(title, total_width - 2 * GAP, font) for title in row_titles] if row_titles else [[] for _ in rows]
    )
    below = [max((len(text) for text in row), default=0) * line for row in wrapped] if wrapped else [0] * len(rows)
    heights = [len(row_lines[i]) * line + height + below[i] + GAP + GAP // 2 for i in range(len(rows))]
    top = max((len(title) for title in titles), default=0) * line
    sheet = Image.new("RGB", (total_width, GAP + top + sum(heights) + (GAP // 2 if top else 0)), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        _write(pen, GAP + column * (width + GAP), GAP // 2, title, font, INK, line)
    y = GAP + top
    for number, row in enumerate(rows):
        _write(pen, GAP, y, row_lines[number], font, INK, line)
        image_y = y + len(row_lines[number]) * line
        for column, image in enumerate(row):
            x = GAP + column * (width + GAP)
            if image is not None:
                sheet.paste(open_image(image).resize((width, height), Image.Resampling.BICUBIC), (x, image_y))
            if wrapped:
                _write(pen, x, image_y + height + 2, wrapped[number][column], font, SOFT, line)
        y += heights[number]
    return sheet


def _write(
    pen: ImageDraw.ImageDraw,
    x: int,
    y: int,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: tuple[int, int, int],
    line: int,
) -> None:
    for number, text in enumerate(lines):
        pen.text((x, y + number * line), text, fill=colour, font=font)
