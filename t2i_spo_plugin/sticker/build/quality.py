"""Train the bundled quality model: a small CLIP (alignment) and the realism features with their bank of real scenes.

``python -m t2i_spo_plugin.sticker.build.quality alignment|realism|reference``; the last needs the generator.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, ResNetConfig

from t2i_spo_plugin.cost.vision import load_cost_model
from t2i_spo_plugin.networks.backbone import MapClassifier
from t2i_spo_plugin.quality.clip import SmallCLIP, load_small_clip
from t2i_spo_plugin.quality.normalise import make_reference, spoil
from t2i_spo_plugin.quality.realism import RealismModel

from ..world import (
    BACKGROUNDS,
    CONCEPTS,
    GENERATOR_CONCEPTS,
    GENERATOR_STYLES,
    HELD_OUT_STYLE,
    STYLES,
    Description,
    describe,
    render,
)
from .data import draw, flat, pixels, redrawn, ruin, truth_of, wear
from .loop import LoopConfig, Trainer
from .report import write_report
from .text import write_classic_files


BATCH = 64


def small_clip(text_folder: Path, cost_folder: Path, seed: int = 5) -> SmallCLIP:
    """The image tower starts from the cost model's, the text tower from the distilled text encoder."""
    torch.manual_seed(seed)
    text = CLIPTextModel.from_pretrained(text_folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(text_folder / "tokenizer")
    seen = load_cost_model(cost_folder).network.backbone
    model = SmallCLIP(seen.config, text.config, tokenizer, 64)
    model.vision.load_state_dict(seen.state_dict())
    model.text.load_state_dict(text.state_dict())
    return model


def retrieval(model: SmallCLIP, concepts: tuple[str, ...] | None, styles: tuple[str, ...], rounds: int = 10) -> float:
    """Top-1 accuracy of finding a picture's caption among 100 different ones of test combinations, over ``rounds``."""
    right = 0
    for n in range(rounds):
        images, captions = [], []
        for seed in range(80_000_000 + n * 1000, 80_000_000 + n * 1000 + 1000):
            d = describe(seed, "test", concepts=concepts, styles=styles, synonyms=False)
            if d.caption not in captions:
                captions.append(d.caption)
                images.append(render(d, seed)[0])
            if len(captions) == 100:
                break
        found = model.embed_images(pixels(images)) @ model.embed_prompts(captions).T
        right += int((found.argmax(1) == torch.arange(100)).sum())
    return right / (100 * rounds)


def altered(d: Description, rng: random.Random) -> Description:
    """The same scene but for one thing: mostly another object, else the background or the style."""
    kind = rng.random()
    if kind < 0.15:
        return replace(d, background=rng.choice([b for b in BACKGROUNDS if b != d.background]))
    if kind < 0.3:
        others = [s for s in STYLES if s != d.style and all(s in CONCEPTS[n].styles for n in d.concepts)]
        if others:
            return replace(d, style=rng.choice(others))
    place = rng.randrange(len(d.concepts))
    pool = GENERATOR_CONCEPTS if set(d.concepts) <= set(GENERATOR_CONCEPTS) else tuple(CONCEPTS)
    name = rng.choice([n for n in pool if n not in d.concepts and d.style in CONCEPTS[n].styles])
    concepts, words = list(d.concepts), list(d.words)
    concepts[place], words[place] = name, rng.choice(CONCEPTS[name].words)
    return replace(d, concepts=tuple(concepts), words=tuple(words))


def matches(pictures: Sequence[Description], prompts: Sequence[Description]) -> tuple[Tensor, Tensor]:
    """``[B, P]`` bool twice: the prompt describes the picture; it can be told that it does not.

    The same things in another order or size are neither.
    """

    def exact(d: Description) -> tuple[object, ...]:
        return d.concepts, d.size_words, d.style, d.background

    def loose(d: Description) -> tuple[object, ...]:
        return frozenset(d.concepts), d.style, d.background

    same = torch.tensor([[exact(a) == exact(b) for b in prompts] for a in pictures])
    other = torch.tensor([[loose(a) != loose(b) for b in prompts] for a in pictures])
    return same, other


def train_alignment(args: argparse.Namespace) -> None:
    """Sigmoid loss over pictures and prompts, where every picture also meets its own prompt with one thing changed.

    Half of each batch is what the generator draws, some of it redrawn by it; spoilt pictures match nothing.
    """
    model = small_clip(args.text, args.cost)
    worn, worn_described = redrawn(args.redrawn, args.work.parent / "redrawn.safetensors")
    work = args.work / "alignment"
    config = LoopConfig(args.steps or 1700, 2e-3, weight_decay=1e-2, decay=0.5)
    trainer = Trainer(work, {"clip": model}, config)

    def step(n: int) -> Tensor:
        half = BATCH // 2
        a, da, _ = draw(7_000_000 + n * half, half)
        b, db, _ = draw(9_000_000 + n * half, half, concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES)
        x, described = wear(torch.cat([a, b]), n, strength=0.35), da + db
        again = torch.randint(len(worn), (half // 2,), generator=torch.Generator().manual_seed(n)).tolist()
        x[half : half + half // 2] = worn[again]
        described[half : half + half // 2] = [worn_described[i] for i in again]
        spoilt = torch.zeros(BATCH, dtype=torch.bool)
        x[: BATCH // 8], spoilt[: BATCH // 8] = ruin(x[: BATCH // 8], n)
        rng = random.Random(n)
        prompts = described + [altered(d, rng) for d in described]
        image = model.embed_pixels(x)
        text = model.embed_tokens(model.tokenize([d.caption for d in prompts]))
        logits = image @ text.T * model.logit_scale.exp() + model.logit_bias
        same, other = matches(described, prompts)
        same, other = same & ~spoilt[:, None], other | spoilt[:, None]
        hard = other & torch.cat([torch.zeros(BATCH, BATCH), torch.eye(BATCH)], 1).bool()
        return (
            F.softplus(-logits[same]).mean() + F.softplus(logits[hard]).mean() + 4 * F.softplus(logits[other]).mean()
        )

    state = trainer.run(step, title="alignment")
    model.eval()
    model.save_pretrained(args.out / "alignment")
    write_classic_files(args.out / "alignment")
    model = load_small_clip(args.out / "alignment")
    x, described, _ = draw(16_000_000, 400, "test", concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES)
    rng = random.Random(0)
    other = described[1:] + described[:1]
    numbers = {
        "retrieval top-1 among 100, declared subset": retrieval(model, GENERATOR_CONCEPTS, GENERATOR_STYLES),
        "retrieval top-1 among 100, all concepts and training styles": retrieval(model, None, STYLES),
        f"retrieval top-1 among 100, all concepts, {HELD_OUT_STYLE}": retrieval(model, None, (HELD_OUT_STYLE,)),
        "alignment of real test scenes": {
            "with their prompts": round(float(model(x, [d.caption for d in described]).mean()), 4),
            "with one thing changed": round(float(model(x, [altered(d, rng).caption for d in described]).mean()), 4),
            "with another scene's prompt": round(float(model(x, [d.caption for d in other]).mean()), 4),
        },
    }
    write_report(args.out / "alignment", "alignment (small CLIP)", vars(args), state, numbers)


def train_realism(args: argparse.Namespace) -> None:
    """Features that name concepts and tell a spoilt picture from a sound one; then the bank of real scenes."""
    torch.manual_seed(11)
    names = (*CONCEPTS, "spoilt")
    vision = ResNetConfig(embedding_size=24, hidden_sizes=[32, 64, 96], depths=[1, 1, 1], layer_type="basic")
    net = MapClassifier(vision, len(names))
    trainer = Trainer(
        args.work / "realism", {"net": net}, LoopConfig(args.steps or 1000, 2e-3, weight_decay=1e-2, decay=0.5)
    )

    def step(n: int) -> Tensor:
        x, described, _ = draw(11_000_000 + n * BATCH, BATCH, concepts=GENERATOR_CONCEPTS if n % 2 else None)
        x, spoilt = ruin(x, n)
        # A quarter of the batch as the lower end of the scale is measured: blurred a little, or noised.
        x[: BATCH // 4], spoilt[: BATCH // 4] = spoil(x[: BATCH // 4], n), True
        x[BATCH // 4 : BATCH // 3], spoilt[BATCH // 4 : BATCH // 3] = flat(BATCH // 3 - BATCH // 4, n), True
        truth = torch.cat([truth_of(described), spoilt[:, None].float()], 1)
        logits = net(wear(x, n, 0.35) if n % 2 else x)[0]
        named = F.binary_cross_entropy_with_logits(logits[:, :-1], truth[:, :-1], reduction="none").sum(1).mean()
        return named + 3 * F.binary_cross_entropy_with_logits(logits[:, -1], truth[:, -1])

    state = trainer.run(step, title="realism")
    net.eval()
    model = RealismModel(net, torch.zeros(1, 96), torch.zeros(96), 64)
    a, _, _ = draw(13_000_000, 1200, concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES)
    b, _, _ = draw(14_000_000, 800)
    features = torch.cat([model.features(a), model.features(b)])
    model.mean = features.mean(0)
    model.bank = features - model.mean
    model.save_pretrained(args.out / "realism", names)
    x, _, _ = draw(15_000_000, 400, "test", concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES)
    numbers = {
        "real test scenes": round(float(model(x).mean()), 4),
        "the same blurred and noised": round(float(model(spoil(x)).mean()), 4),
        "nothing in the picture": round(float(model(flat(400, 1)).mean()), 4),
        "pairs ordered rightly": round(float((model(x) > model(spoil(x))).float().mean()), 4),
    }
    sheet = (np.asarray(spoil(x)[:16].permute(0, 2, 3, 1)), [f"r {float(r):.2f}" for r in model(spoil(x))[:16]])
    write_report(args.out / "realism", "realism", vars(args), state, numbers, sheet)


def train_reference(args: argparse.Namespace) -> None:
    """The ends of both scales from the bundled generator's pictures of benign training prompts."""
    from .. import load_pipeline, prompt_rows
    from .generator import GUIDANCE, STEPS

    pipe = load_pipeline()
    images, prompts = [], []
    rows = prompt_rows("benign", 192, "train", seed=3)
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        generators = [torch.Generator().manual_seed(r.seed) for r in batch]
        images += pipe(
            [r.prompt for r in batch], generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        ).images
        prompts += [r.prompt for r in batch]
    alignment, realism = load_small_clip(args.out / "alignment"), RealismModel.from_pretrained(args.out / "realism")
    reference = make_reference(alignment, realism, images, prompts, "sticker pipeline")
    reference.save(args.out / "reference.json", "sticker")
    print(reference, reference.hash)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("alignment", "realism", "reference"))
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/quality"))
    parser.add_argument("--text", type=Path, default=Path("runs/sticker/text"))
    parser.add_argument("--cost", type=Path, default=Path(__file__).parents[1] / "cost_model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "quality_model")
    parser.add_argument("--redrawn", type=int, default=2400, help="scenes that the generator draws again")
    parser.add_argument("--steps", type=int, default=0, help="0 takes the part's own number")
    args = parser.parse_args()
    {"alignment": train_alignment, "realism": train_realism, "reference": train_reference}[args.part](args)


if __name__ == "__main__":
    main()
