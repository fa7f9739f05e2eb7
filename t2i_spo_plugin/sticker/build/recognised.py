"""Report of the bundled generator: what the referee recognises in its images by wording class, and their sharpness.

`python -m t2i_spo_plugin.sticker.build.recognised`, once the pipeline and the referee lie in the package. Numbers that
choose nothing: the prompts are the test's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from .. import load_pipeline
from ..referee import StickerReferee
from ..wording import Prompt, Wording, prompts
from ..world import CONCEPTS, GENERATOR_CONCEPTS, GENERATOR_STYLES, render
from .autoencoder import gradient_energy
from .data import pixels
from .generator import GUIDANCE, STEPS
from .loop import LoopState
from .report import write_report


def draw_prompts(pipe: StableDiffusionPipeline, asked: list[Prompt], title: str, batch: int) -> list[np.ndarray]:
    """One image of each prompt, uint8 `[H, W, 3]`; the scene's seed is the image's."""
    images: list[np.ndarray] = []
    for start in tqdm(range(0, len(asked), batch), desc=title, mininterval=10):
        part = asked[start : start + batch]
        generators = [torch.Generator().manual_seed(p.description.seed) for p in part]
        drawn = pipe(
            [p.text for p in part], generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        ).images
        images += [np.asarray(image) for image in drawn]
    return images


def judge(referee: StickerReferee, asked: list[Prompt], images: list[np.ndarray]) -> dict[str, object]:
    """Shares of images that show all, and none, of what is asked; what is negated; the least recognised concepts."""
    rows = referee.probabilities(pixels(images)) >= 0.5
    every, none, negated, hits, total = 0, 0, 0, Counter[str](), Counter[str]()
    for p, row in zip(asked, rows, strict=True):
        shown = {referee.concepts[k] for k in row.nonzero().flatten().tolist()}
        wanted = set(p.description.concepts)
        every, none = every + (wanted <= shown), none + (not wanted & shown)
        negated += bool(shown & set(p.negated))
        total.update(wanted)
        hits.update(wanted & shown)
    least = sorted(total, key=lambda name: hits[name] / total[name])[:8]
    unsafe = [name for name in total if CONCEPTS[name].category]
    out: dict[str, object] = {
        "all objects recognised": [round(every / len(asked), 4), len(asked)],
        "none recognised": round(none / len(asked), 4),
        "objects recognised": round(hits.total() / total.total(), 4),
        "unsafe objects recognised": round(sum(hits[n] for n in unsafe) / max(1, sum(total[n] for n in unsafe)), 4),
        "least recognised": {name: f"{hits[name]}/{total[name]}" for name in least},
    }
    if any(p.negated for p in asked):
        out["negated object drawn"] = round(negated / len(asked), 4)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = Path(__file__).parents[1]
    parser.add_argument("--pipeline", type=Path, default=package / "pipeline")
    parser.add_argument("--referee", type=Path, default=package / "referee")
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/generator"))
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind and wording class")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline).to(args.device)
    referee = StickerReferee.from_pretrained(args.referee)
    numbers: dict[str, object] = {
        "declared concepts": len(GENERATOR_CONCEPTS),
        "declared styles": list(GENERATOR_STYLES),
        "parameters of the UNet": sum(p.numel() for p in pipe.unet.parameters()),
    }
    sheet: list[tuple[np.ndarray, str]] = []
    for title, objects in (("single objects", 1), ("pairs", 2)):
        asked = prompts(Wording.GRAMMAR, args.count, n_objects=objects)
        images = draw_prompts(pipe, asked, title, args.batch)
        real = [render(p.description, p.description.seed, aligned=True)[0] for p in asked]
        sharpness = gradient_energy(pixels(images) * 2 - 1) / gradient_energy(pixels(real) * 2 - 1)
        numbers[title] = judge(referee, asked, images) | {"sharpness over real scenes'": round(sharpness, 3)}
        sheet += [(i / 255, " + ".join(p.description.concepts)) for i, p in zip(images[:32], asked[:32], strict=True)]
    for wording in Wording:
        asked = prompts(wording, args.count, seed=1)
        numbers[wording.value] = judge(referee, asked, draw_prompts(pipe, asked, wording.value, args.batch))
    started = time.monotonic()
    for _ in range(3):
        pipe("a noto sticker of a cat on a blue background", num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    numbers["seconds an image, alone"] = round((time.monotonic() - started) / 3, 3)
    curve = args.work / "state.json"
    state = LoopState(**json.loads(curve.read_text())) if curve.is_file() else LoopState()
    pictures = np.stack([image for image, _ in sheet]), [caption for _, caption in sheet]
    write_report(args.pipeline, "generator", {"seed": 0}, state, numbers, pictures)


if __name__ == "__main__":
    main()
