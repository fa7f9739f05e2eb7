"""Rebuild the sticker atlas from the pinned npm packages of the picture sets.

``python -m t2i_spo_plugin.sticker.build.atlas`` fetches each package with ``npm pack``, checks its SHA-256, renders
every concept of ``concepts.tsv`` in every style that draws it, and writes one WebP sheet a style and ``atlas.json``.
Needs ``npm`` and ``resvg-py``; nothing else in the package does.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from t2i_spo_plugin.errors import SPOError, require_extra

from ..atlas import ATLAS_DIR, CELL, read_concepts


COLUMNS = 12

SOURCES = {
    "noto": (
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    "noto_v1": (
        "@iconify-json/noto-v1@1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
    ),
    "fxemoji": (
        "@iconify-json/fxemoji@1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
    ),
    "fluent": (
        "@iconify-json/fluent-emoji@1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
    ),
    "fluent_flat": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    "fluent_3d": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
    ),
    "twemoji": (
        "@iconify-json/twemoji@1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
}


def fetch(spec: str, sha256: str, folder: Path) -> dict[str, bytes]:
    """Download one npm package into ``folder`` (kept between runs), check its hash, return its files by name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = spec.rsplit("@", 1)[0].lstrip("@").replace("/", "-") + "-" + spec.rsplit("@", 1)[1] + ".tgz"
    path = folder / name
    if not path.is_file():
        subprocess.run(["npm", "pack", spec, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise SPOError(f"{spec}: SHA-256 is {found}, expected {sha256}; delete {path} and try again")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {
            member.name.removeprefix("package/"): tar.extractfile(member).read()  # type: ignore[union-attr]
            for member in tar.getmembers()
            if member.isfile()
        }


def square(image: Image.Image, size: int = CELL) -> Image.Image:
    """Crop a drawing to what is visible and centre it on a transparent square of ``size`` pixels."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise SPOError("a drawing is empty")
    image = image.crop(box)
    side = max(image.size)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    # Resample premultiplied, so that transparent pixels do not bleed their colour into the rim.
    premultiplied = canvas.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
    return premultiplied.convert("RGBA")


def drawings(style: str, files: dict[str, bytes], concepts: list[dict[str, str]], codes: dict[str, list[str]]) -> dict:
    """Every concept that ``style`` draws, as a :data:`CELL` px RGBA picture."""
    out: dict[str, Image.Image] = {}
    if style == "fluent_3d":
        for row in concepts:
            for code in codes.get(row["icon"], []):
                for name in (code, code + "-fe0f"):
                    data = files.get(f"assets/{name}.webp")
                    if data is not None and style not in row["skip"]:
                        out.setdefault(row["name"], square(Image.open(io.BytesIO(data))))
        return out
    resvg = require_extra("resvg_py", "dev")
    icons = json.loads(files["icons.json"])
    width, height = icons.get("width", 16), icons.get("height", 16)
    for row in concepts:
        icon = (row["fx"] or row["icon"].replace("-", "")) if style == "fxemoji" else row["icon"]
        if icon in icons.get("aliases", {}):
            icon = icons["aliases"][icon]["parent"]
        entry = icons["icons"].get(icon)
        if entry is None or style in row["skip"]:
            continue
        w, h = entry.get("width", width), entry.get("height", height)
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}">{entry["body"]}</svg>'
        png = bytes(resvg.svg_to_bytes(svg_string=svg, width=256, height=round(256 * h / w)))
        out[row["name"]] = square(Image.open(io.BytesIO(png)))
    return out


def build(cache: Path, out_dir: Path = ATLAS_DIR) -> None:
    """Write ``<style>.webp`` sheets and ``atlas.json`` into ``out_dir``."""
    concepts = read_concepts()
    packages = {style: fetch(spec, sha, cache) for style, (spec, sha, _) in SOURCES.items()}
    codes: dict[str, list[str]] = {}
    for code, name in json.loads(packages["noto"]["chars.json"]).items():
        codes.setdefault(name, []).append(code)
    index: dict = {"cell": CELL, "columns": COLUMNS, "styles": {}}
    for style, (spec, sha, licence) in SOURCES.items():
        pictures = drawings(style, packages[style], concepts, codes)
        names = [row["name"] for row in concepts if row["name"] in pictures]
        rows = -(-len(names) // COLUMNS)
        sheet = np.zeros((rows * CELL, COLUMNS * CELL, 4), np.uint8)
        for n, name in enumerate(names):
            y, x = n // COLUMNS * CELL, n % COLUMNS * CELL
            sheet[y : y + CELL, x : x + CELL] = np.asarray(pictures[name])
        Image.fromarray(sheet).save(out_dir / f"{style}.webp", lossless=True, quality=100, method=6)
        index["styles"][style] = {"source": spec, "sha256": sha, "licence": licence, "concepts": names}
        print(f"{style}: {len(names)} of {len(concepts)} concepts")
    (out_dir / "atlas.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("build/npm"), help="where downloaded packages are kept")
    build(parser.parse_args().cache)
