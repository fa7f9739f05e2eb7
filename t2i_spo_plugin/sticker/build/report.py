"""The report beside each bundled model: configuration, curve, measured numbers, and a sheet of pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .loop import LoopState


def picture_grid(images: np.ndarray, captions: list[str], columns: int = 8, zoom: int = 2) -> Image.Image:
    """Pictures ``[N, H, W, 3]`` in [0, 1] with a line under each."""
    n, h, w, _ = images.shape
    rows, line = -(-n // columns), 14
    sheet = Image.new("RGB", (columns * w * zoom, rows * (h * zoom + line)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (picture, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = i % columns * w * zoom, i // columns * (h * zoom + line)
        array = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
        sheet.paste(Image.fromarray(array).resize((w * zoom, h * zoom), Image.Resampling.LANCZOS), (x, y))
        pen.text((x + 2, y + h * zoom), caption[: w * zoom // 5], fill="black", font=font)
    return sheet


def write_report(
    folder: Path,
    title: str,
    config: dict[str, Any],
    state: LoopState,
    numbers: dict[str, Any],
    sheet: tuple[np.ndarray, list[str]] | None = None,
) -> None:
    """Write ``report.json`` (and ``sheet.webp``) into ``folder`` and print the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    # Paths belong to the machine that trained, not to the model.
    settings = {k: v for k, v in config.items() if not isinstance(v, Path)}
    report = {
        "model": title,
        "config": settings,
        "steps": state.step,
        "minutes": round(state.seconds / 60, 1),
        "curve": state.curve[:: max(1, len(state.curve) // 60)],
        "measured": numbers,
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if sheet is not None:
        picture_grid(*sheet).save(folder / "sheet.webp", quality=80)
    print(json.dumps({"model": title, "measured": numbers}, indent=1))
