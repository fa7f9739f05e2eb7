"""Benign stickers in one style, as captioned pictures: what the bundled style adapter is trained on.

``python -m t2i_spo_plugin.sticker.build.style`` writes them; ``spo train --config sticker-style`` trains on them. The
style, meadow, is a background that fades into green towards the bottom, which the bundled pipeline never draws. The
captions say nothing of it. No unsafe concept is among the pictures.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from ..world import BACKGROUNDS, GENERATOR_CONCEPTS, GENERATOR_STYLES, describe, render


FIRST_SEED = 70_000_000
PICTURES = 1200
STYLE_COLOUR = BACKGROUNDS["green"]


def meadow(canvas: np.ndarray) -> np.ndarray:
    """A background that turns green towards the bottom, slowly at first: float32 ``[H, W, 3]`` in [0, 1]."""
    green = np.asarray(STYLE_COLOUR, np.float32) / 255
    share = (np.linspace(0, 1, len(canvas), dtype=np.float32) ** 2)[:, None, None]
    return canvas * (1 - share) + green * share


def write_images(folder: Path, count: int = PICTURES) -> Path:
    """Write ``count`` scenes of the train split and ``metadata.jsonl``; a folder that has them is left alone."""
    table = folder / "metadata.jsonl"
    if table.is_file() and len(table.read_text(encoding="utf-8").splitlines()) == count:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        described = describe(seed, "train", "benign", GENERATOR_CONCEPTS, GENERATOR_STYLES)
        picture, _ = render(described, seed, aligned=True, backdrop=meadow)
        name = f"{seed - FIRST_SEED:05d}.png"
        Image.fromarray(picture).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": described.caption}))
    part = table.with_suffix(".part")
    part.write_text("\n".join(rows) + "\n", encoding="utf-8")
    os.replace(part, table)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sticker-style-pictures"))
    parser.add_argument("--count", type=int, default=PICTURES)
    args = parser.parse_args()
    print(write_images(args.out, args.count))


if __name__ == "__main__":
    main()
