"""Train the bundled quality model: a small CLIP (alignment) and the realism features with their bank of real scenes.

`python -m t2i_spo_plugin.sticker.build.quality alignment|realism|reference`; the last needs the generator. Both learn
from malformed images too (doubled, half drawn, warped, blotted): a blob is a good image of nothing.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, ResNetConfig

from t2i_spo_plugin.cost.vision import load_cost_model
from t2i_spo_plugin.networks.backbone import MapClassifier
from t2i_spo_plugin.quality.clip import SmallCLIP, load_small_clip
from t2i_spo_plugin.quality.normalise import make_reference, spoil
from t2i_spo_plugin.quality.realism import RealismModel

from ..disguises import MALFORMATIONS, Layers, blank
from ..wording import Wording, prompts, training_caption
from ..world import (
    BACKGROUNDS,
    CONCEPTS,
    GENERATOR_CONCEPTS,
    GENERATOR_STYLES,
    HELD_OUT_STYLE,
    SIZE,
    STYLES,
    Description,
    describe,
    render,
)
from .data import Judged, JudgedScenes, draw, pixels, through_autoencoder
from .loop import LoopConfig, Trainer
from .report import write_report
from .store import prefetched


BATCH = 64


def small_clip(text_folder: Path, cost_folder: Path, seed: int = 5) -> SmallCLIP:
    """The image tower starts from the cost model's; the text tower is the pipeline's text encoder, as it is."""
    torch.manual_seed(seed)
    text = CLIPTextModel.from_pretrained(text_folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(text_folder / "tokenizer")
    seen = load_cost_model(cost_folder).network.backbone
    model = SmallCLIP(seen.config, text.config, tokenizer, SIZE)
    model.vision.load_state_dict(seen.state_dict())
    model.text.load_state_dict(text.state_dict())
    model.text.requires_grad_(False)
    return model


def retrieval(model: SmallCLIP, concepts: tuple[str, ...] | None, styles: tuple[str, ...], rounds: int = 10) -> float:
    """Top-1 accuracy of finding a picture's caption among 100 different ones of test combinations, over `rounds`."""
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
    """`[B, P]` bool twice: the prompt describes the picture; it can be told that it does not.

    The same things in another order or size are neither.
    """

    def exact(d: Description) -> tuple[object, ...]:
        return d.concepts, d.size_words, d.style, d.background

    def loose(d: Description) -> tuple[object, ...]:
        return frozenset(d.concepts), d.style, d.background

    same = torch.tensor([[exact(a) == exact(b) for b in prompts] for a in pictures])
    other = torch.tensor([[loose(a) != loose(b) for b in prompts] for a in pictures])
    return same, other


def malformed(count: int, first_seed: int) -> Tensor:
    """`count` declared test scenes, each malformed in one of the ways of a poor generator; as they are drawn."""
    x, _, objects = draw(first_seed, count, "test", concepts=GENERATOR_CONCEPTS)
    covers, _, _ = draw(first_seed + count, count, "test", "benign", concepts=GENERATOR_CONCEPTS)
    out = []
    for n, (image, cover, placed) in enumerate(zip(x, covers, objects, strict=True)):
        masks = torch.from_numpy(np.stack([thing.mask for thing in placed])).float()
        change = list(MALFORMATIONS.values())[n % len(MALFORMATIONS)]
        out.append(change(Layers(image, masks, cover), torch.Generator().manual_seed(n)))
    return torch.stack(out)


def flawed(vae: AutoencoderTiny, batch: Judged, number: int) -> Judged:
    """The batch, a quarter of its images as a generator draws them: half of these with small flaws, half melted."""
    eighth = len(batch.images) // 8
    few, many = slice(0, eighth), slice(eighth, 2 * eighth)
    batch.images[few] = through_autoencoder(vae, batch.images[few], number)
    batch.images[many] = through_autoencoder(vae, batch.images[many], number + 1, 1.2, 2.0)
    batch.readable[many] = False
    batch.truth[many] = 0
    return batch


def train_alignment(args: argparse.Namespace) -> None:
    """Sigmoid loss over images and prompts, where every image also meets its own prompt with one thing changed.

    Every second image meets its caption of the grammar, which names all that can differ; the others a caption of any
    wording, of which only other things make a mismatch. What is malformed, spoilt or blank matches nothing.
    """
    model = small_clip(args.text, args.cost)
    scenes = JudgedScenes(
        args.work.parent / "judged.uint8", args.scenes, jobs=args.jobs, disguised=0.05, spoilt=0.08, malformed=0.2
    )
    config = LoopConfig(args.steps or 4000, 2e-3, weight_decay=1e-2, decay=0.5)
    trainer = Trainer(args.work / "alignment", {"clip": model}, config, args.device)

    batches = prefetched(
        lambda n: scenes.batch(50_000_000 + n, BATCH, 1, worn=0.35), trainer.state.step, config.steps, args.jobs
    )

    def step(n: int) -> Tensor:
        batch, rng = batches(n).to(args.device), random.Random(n)
        batch = flawed(vae, batch, n) if n % 2 else batch
        captions = [d.caption if i % 2 else training_caption(d, rng) for i, d in enumerate(batch.described)]
        others = [altered(d, rng) for d in batch.described]
        image = model.embed_pixels(batch.images.contiguous(memory_format=torch.channels_last))
        text = model.embed_tokens(model.tokenize(captions + [d.caption for d in others]))
        logits = (image @ text.T * model.logit_scale.exp() + model.logit_bias).float()
        same, other = matches(batch.described, batch.described + others)
        free = torch.arange(BATCH) % 2 == 0
        shown = [frozenset(d.concepts) for d in batch.described]
        apart = torch.tensor([[a != b for b in shown] for a in shown])
        # A free caption may leave out style and background, so that it fits more images than its own.
        other[:, :BATCH] = torch.where(free, apart, other[:, :BATCH])
        same[:, :BATCH] = torch.where(free, torch.eye(BATCH, dtype=torch.bool), same[:, :BATCH])
        sound = batch.readable.cpu()
        same, other = same & sound[:, None], other | ~sound[:, None]
        hard = other & torch.cat([torch.diag(~sound), torch.eye(BATCH, dtype=torch.bool)], 1)
        same, other, hard = (mask.to(logits.device) for mask in (same, other, hard))
        return (
            F.softplus(-logits[same]).mean() + F.softplus(logits[hard]).mean() + 4 * F.softplus(logits[other]).mean()
        )

    vae = AutoencoderTiny.from_pretrained(args.autoencoder).eval().to(args.device)
    state = trainer.run(step, title="alignment")
    model.to("cpu").eval()
    model.save_pretrained(
        args.out / "alignment", text_encoder=os.path.relpath(args.pipeline / "text_encoder", args.out / "alignment")
    )
    model = load_small_clip(args.out / "alignment")
    x, described, _ = draw(16_000_000, 400, "test", concepts=GENERATOR_CONCEPTS)
    rng = random.Random(0)
    own, other = [d.caption for d in described], [d.caption for d in described[1:] + described[:1]]
    bad = malformed(400, 17_000_000)
    bad_captions = [
        describe(seed, "test", "any", GENERATOR_CONCEPTS, GENERATOR_STYLES).caption
        for seed in range(17_000_000, 17_000_400)
    ]
    by_wording = {}
    for wording in Wording:
        asked = prompts(wording, 200)
        shown = pixels([render(p.description, n)[0] for n, p in enumerate(asked)])
        by_wording[wording.value] = round(float(model(shown, [p.text for p in asked]).mean()), 4)
    numbers = {
        "retrieval top-1 among 100, declared subset": retrieval(model, GENERATOR_CONCEPTS, GENERATOR_STYLES),
        "retrieval top-1 among 100, all concepts and training styles": retrieval(model, None, STYLES),
        f"retrieval top-1 among 100, all concepts, {HELD_OUT_STYLE}": retrieval(model, None, (HELD_OUT_STYLE,)),
        "alignment of real test scenes": {
            "with their prompts": round(float(model(x, own).mean()), 4),
            "with one thing changed": round(float(model(x, [altered(d, rng).caption for d in described]).mean()), 4),
            "with another scene's prompt": round(float(model(x, other).mean()), 4),
            "malformed, with their prompts": round(float(model(bad, bad_captions).mean()), 4),
            "by wording class": by_wording,
        },
    }
    write_report(args.out / "alignment", "alignment (small CLIP)", vars(args), state, numbers)


def train_realism(args: argparse.Namespace) -> None:
    """Features that name concepts and tell a poor image from a sound one; then the bank of real scenes."""
    torch.manual_seed(11)
    names = (*CONCEPTS, "poor")
    vision = ResNetConfig(embedding_size=24, hidden_sizes=[32, 64, 96], depths=[1, 1, 1], layer_type="basic")
    net = MapClassifier(vision, len(names))
    scenes = JudgedScenes(
        args.work.parent / "judged.uint8", args.scenes, jobs=args.jobs, disguised=0, spoilt=0.1, malformed=0.3
    )
    config = LoopConfig(args.steps or 2500, 2e-3, weight_decay=1e-2, decay=0.5)
    trainer = Trainer(args.work / "realism", {"net": net}, config, args.device)

    batches = prefetched(
        lambda n: scenes.batch(60_000_000 + n, BATCH, 1, worn=0.2), trainer.state.step, config.steps, args.jobs
    )

    def step(n: int) -> Tensor:
        batch = flawed(vae, batches(n).to(args.device), n) if n % 2 else batches(n).to(args.device)
        x, poor, truth = batch.images, ~batch.readable, batch.truth
        # A part of the batch as the lower end of the scale is measured: blurred a little, or noised.
        x[-BATCH // 5 :], poor[-BATCH // 5 :] = spoil(x[-BATCH // 5 :].cpu(), n).to(args.device), True
        target = torch.cat([truth, poor[:, None].float()], 1)
        logits = net(x.contiguous(memory_format=torch.channels_last))[0].float()
        named = F.binary_cross_entropy_with_logits(logits[:, :-1], target[:, :-1], reduction="none").sum(1).mean()
        return named + 3 * F.binary_cross_entropy_with_logits(logits[:, -1], target[:, -1])

    vae = AutoencoderTiny.from_pretrained(args.autoencoder).eval().to(args.device)
    state = trainer.run(step, title="realism")
    net.to("cpu").eval()
    width = vision.hidden_sizes[-1]
    model = RealismModel(net, torch.zeros(1, width), torch.zeros(width), SIZE)
    a, _, _ = draw(13_000_000, 1200, "train", concepts=GENERATOR_CONCEPTS)
    b, _, _ = draw(14_000_000, 800, "train", styles=STYLES)
    features = torch.cat([model.features(a), model.features(b)])
    model.mean = features.mean(0)
    model.bank = features - model.mean
    model.save_pretrained(args.out / "realism", names)
    x, _, _ = draw(15_000_000, 400, "test", concepts=GENERATOR_CONCEPTS)
    bad, empty = (
        malformed(400, 15_000_000),
        torch.stack([blank(SIZE, torch.Generator().manual_seed(n)) for n in range(200)]),
    )
    numbers = {
        "real test scenes": round(float(model(x).mean()), 4),
        "the same blurred and noised": round(float(model(spoil(x)).mean()), 4),
        "the same malformed": round(float(model(bad).mean()), 4),
        "nothing in the image": round(float(model(empty).mean()), 4),
        "blurred or noised below the original": round(float((model(x) > model(spoil(x))).float().mean()), 4),
        "malformed below the original": round(float((model(x) > model(bad)).float().mean()), 4),
    }
    sheet = (np.asarray(bad[:16].permute(0, 2, 3, 1)), [f"r {float(r):.2f}" for r in model(bad[:16])])
    write_report(args.out / "realism", "realism", vars(args), state, numbers, sheet)


def train_reference(args: argparse.Namespace) -> None:
    """The ends of both scales from the bundled generator's images of benign training prompts."""
    from .. import load_pipeline, prompt_rows
    from .generator import GUIDANCE, STEPS

    pipe = load_pipeline(args.pipeline).to(args.device)
    images, asked = [], []
    rows = prompt_rows("benign", args.prompts, "train", seed=3)
    for start in range(0, len(rows), 32):
        batch = rows[start : start + 32]
        generators = [torch.Generator().manual_seed(r.seed) for r in batch]
        images += pipe(
            [r.prompt for r in batch], generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        ).images
        asked += [r.prompt for r in batch]
    alignment, realism = load_small_clip(args.out / "alignment"), RealismModel.from_pretrained(args.out / "realism")
    reference = make_reference(alignment, realism, images, asked, "sticker pipeline")
    reference.save(args.out / "reference.json", "sticker")
    print(reference, reference.hash)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("alignment", "realism", "reference"))
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/quality"))
    parser.add_argument("--text", type=Path, default=Path("runs/sticker/text"))
    parser.add_argument("--cost", type=Path, default=Path(__file__).parents[1] / "cost_model")
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/sticker/autoencoder/vae"))
    parser.add_argument("--pipeline", type=Path, default=Path(__file__).parents[1] / "pipeline")
    parser.add_argument("--prompts", type=int, default=192, help="benign prompts of the reference")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "quality_model")
    parser.add_argument("--scenes", type=int, default=16_000)
    parser.add_argument("--steps", type=int, default=0, help="0 takes the part's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that render")
    args = parser.parse_args()
    {"alignment": train_alignment, "realism": train_realism, "reference": train_reference}[args.part](args)


if __name__ == "__main__":
    main()
