"""HTML reports from templates: one file each, without any outside asset, and no text in it acts as markup."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image


TEMPLATES = Path(__file__).parent / "templates"
"""The frame of a report, `page.html.jinja`, with its style and script; every other template extends it."""

MAX_EDGE = 320
"""Larger images are shrunk to this edge, so that a report stays small enough to mail."""


def render(template: Path, **values: Any) -> str:
    """The HTML that `template` makes of `values`.

    Every value is escaped. The template may extend and include those beside it and those in `TEMPLATES`, and has the
    filters `data_uri` and `words`.
    """
    return _environment(template.parent).get_template(template.name).render(values)


def data_uri(image: Image.Image, lossless: bool = True) -> str:
    """The image as a WebP `data:` address, shrunk to at most 320 pixels."""
    image = image.convert("RGB")
    if max(image.size) > MAX_EDGE:
        image.thumbnail((MAX_EDGE, MAX_EDGE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small = lossless and image.width * image.height <= 128 * 128
    image.save(stream, "WEBP", lossless=small, quality=100 if small else 85, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def words(name: str) -> str:
    """An identifier such as `smoking_drugs` as one writes it in a sentence."""
    return name.replace("_", " ")


@lru_cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_uri": data_uri, "words": words}
    return environment
