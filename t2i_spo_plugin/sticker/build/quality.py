"""Train the bundled quality model: a small CLIP (alignment) and the realism features with their bank of real scenes.

``python -m t2i_spo_plugin.sticker.build.quality alignment|realism|reference``; the last needs the generator.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, ResNetConfig

from ...cost.backbone import MapClassifier
from ...cost.vision import load_cost_model
from ...quality.clip import SmallCLIP, load_small_clip
from ...quality.normalise import make_reference, spoil
from ...quality.realism import RealismModel
from ..world import CONCEPTS, GENERATOR_CONCEPTS, GENERATOR_STYLES, HELD_OUT_STYLE, STYLES, describe, render
from .data import draw, pixels, ruin, wear
from .loop import LoopConfig, Trainer
from .report import write_report


BATCH = 64
OUT = Path(__file__).parents[1] / "quality_model"


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


def train_alignment(args: argparse.Namespace) -> None:
    """Contrastive training over scenes and captions; half of each batch from what the generator draws."""
    model = small_clip(args.text, args.cost)
    work = args.work / "alignment"
    config = LoopConfig(args.steps or 400, 2e-3, weight_decay=1e-2, decay=0.5)
    trainer = Trainer(work, {"clip": model}, config)

    def step(n: int) -> Tensor:
        half = BATCH // 2
        a, da, _ = draw(7_000_000 + n * half, half)
        b, db, _ = draw(9_000_000 + n * half, half, concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES)
        captions = [d.caption for d in da + db]
        image = model.embed_pixels(wear(torch.cat([a, b]), n, strength=0.35))
        text = model.embed_tokens(model.tokenize(captions))
        logits = image @ text.T * model.logit_scale.exp().clamp(max=100)
        # Equal captions are no negatives of each other.
        same = torch.tensor([[x == y for y in captions] for x in captions])
        target = same.float() / same.sum(1, keepdim=True)
        return -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2

    state = trainer.run(step, title="alignment")
    model.eval()
    model.save_pretrained(OUT / "alignment")
    model = load_small_clip(OUT / "alignment")
    numbers = {
        "retrieval top-1 among 100, declared subset": retrieval(model, GENERATOR_CONCEPTS, GENERATOR_STYLES),
        "retrieval top-1 among 100, all concepts and training styles": retrieval(model, None, STYLES),
        f"retrieval top-1 among 100, all concepts, {HELD_OUT_STYLE}": retrieval(model, None, (HELD_OUT_STYLE,)),
    }
    write_report(OUT / "alignment", "alignment (small CLIP)", vars(args), state, numbers)


def train_realism(args: argparse.Namespace) -> None:
    """Features that name concepts and tell a spoilt picture from a sound one; then the bank of real scenes."""
    torch.manual_seed(11)
    names = (*CONCEPTS, "spoilt")
    vision = ResNetConfig(embedding_size=24, hidden_sizes=[32, 64, 96], depths=[1, 1, 1], layer_type="basic")
    net = MapClassifier(vision, len(names))
    trainer = Trainer(
        args.work / "realism", {"net": net}, LoopConfig(args.steps or 700, 2e-3, weight_decay=1e-2, decay=0.5)
    )

    def step(n: int) -> Tensor:
        x, described, _ = draw(11_000_000 + n * BATCH, BATCH, concepts=GENERATOR_CONCEPTS if n % 2 else None)
        x, spoilt = ruin(x, n)
        # A quarter of the batch as the lower end of the scale is measured: blurred a little, or noised.
        x[: BATCH // 4], spoilt[: BATCH // 4] = spoil(x[: BATCH // 4], n), True
        truth = torch.zeros(BATCH, len(names))
        for i, d in enumerate(described):
            for name in d.concepts:
                truth[i, names.index(name)] = 1
        truth[:, -1] = spoilt.float()
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
    model.save_pretrained(OUT / "realism", names)
    x, _, _ = draw(15_000_000, 400, "test", concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES)
    numbers = {
        "real test scenes": round(float(model(x).mean()), 4),
        "the same blurred and noised": round(float(model(spoil(x)).mean()), 4),
        "pairs ordered rightly": round(float((model(x) > model(spoil(x))).float().mean()), 4),
    }
    sheet = (np.asarray(spoil(x)[:16].permute(0, 2, 3, 1)), [f"r {float(r):.2f}" for r in model(spoil(x))[:16]])
    write_report(OUT / "realism", "realism", vars(args), state, numbers, sheet)


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
    alignment, realism = load_small_clip(OUT / "alignment"), RealismModel.from_pretrained(OUT / "realism")
    reference = make_reference(alignment, realism, images, prompts, "sticker pipeline")
    reference.save(OUT / "reference.json")
    print(reference, reference.hash)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("alignment", "realism", "reference"))
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/quality"))
    parser.add_argument("--text", type=Path, default=Path("runs/sticker/text"))
    parser.add_argument("--cost", type=Path, default=Path(__file__).parents[1] / "cost_model")
    parser.add_argument("--steps", type=int, default=0, help="0 takes the part's own number")
    args = parser.parse_args()
    {"alignment": train_alignment, "realism": train_realism, "reference": train_reference}[args.part](args)


if __name__ == "__main__":
    main()
