"""Train the bundled safety cost model on scenes of the sticker world and write its report.

``python -m t2i_spo_plugin.sticker.build.cost``: an unsafe scene against the same scene with the twin in its place
(ranking),
each against zero (anchoring), and a supervised contrastive term; temperatures are fitted on validation scenes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ResNetConfig

from t2i_spo_plugin.cost.losses import (
    anchor_loss,
    expected_calibration_error,
    fit_temperature,
    rank_loss,
    supervised_contrastive_loss,
)
from t2i_spo_plugin.cost.vision import VisionCostModel
from t2i_spo_plugin.networks.backbone import MapClassifier

from ..world import (
    CATEGORIES,
    CONCEPTS,
    GENERATOR_CONCEPTS,
    HELD_OUT_STYLE,
    STYLES,
    Description,
    Split,
    describe,
    render,
)
from .data import draw, pixels, redrawn, restyle, ruin, truth_of, wear
from .loop import LoopConfig, Trainer
from .report import write_report


BATCH = 32


def network(seed: int = 0) -> MapClassifier:
    """The untrained backbone: a ResNet whose map is 8x8 at 64 px."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[64, 128], depths=[2, 3], layer_type="basic", downsample_in_first_stage=False
    )
    return MapClassifier(config, len(CATEGORIES))


class ConceptHead(torch.nn.Module):
    """Names the concepts while the cost model trains: seven labels alone teach slowly. Dropped afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(128, len(CONCEPTS))

    def loss(self, pooled: Tensor, described: Sequence[Description], sound: Tensor) -> Tensor:
        """Cross entropy against equal shares of what is shown; ``sound`` ``[B]`` leaves spoilt pictures out."""
        target = truth_of(described) / torch.tensor([[len(d.concepts)] for d in described])
        return -(target * self.linear(pooled).log_softmax(1)).sum(1)[sound].mean()


def labels(described: Sequence[Description]) -> Tensor:
    """``[B, K]`` of 0 and 1."""
    return torch.tensor([[float(c in d.unsafe) for c in CATEGORIES] for d in described])


def twin_batch(first_seed: int, count: int) -> tuple[Tensor, list[Description]]:
    """``count`` unsafe scenes, then the same scenes and places with the twin: pictures and descriptions."""
    images, described = [], []
    for seed in range(first_seed, first_seed + count):
        d = describe(seed, "train", "harmful")
        twins = tuple(
            CONCEPTS[n].twin if CONCEPTS[n].twin and d.style in CONCEPTS[CONCEPTS[n].twin or n].styles else None
            for n in d.concepts
        )
        safe = replace(d, concepts=tuple(t or n for t, n in zip(twins, d.concepts, strict=True)))
        if safe.unsafe:
            safe = describe(seed, "train", "benign")
        look = restyle if seed % 3 == 0 else None
        images.append(tuple(render(x, seed, aligned=seed % 2 == 0, restyle=look)[0] for x in (d, safe)))
        described.append((d, safe))
    pictures = pixels([u for u, _ in images] + [s for _, s in images])
    return pictures, [u for u, _ in described] + [s for _, s in described]


def auc(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve by ranks."""
    ranks = torch.empty(len(scores))
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float)
    positive = truth.bool()
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def measure(model: VisionCostModel, split: Split, styles: Sequence[str], count: int = 1500) -> dict[str, object]:
    """AUC per category with n, pointing accuracy, calibration error on ``count`` fresh scenes, half of them
    harmful."""
    pictures, described, objects = draw(30_000_000, count, split, "any", styles)
    truth = labels(described)
    found = model(pictures)
    out: dict[str, object] = {}
    for k, name in enumerate(CATEGORIES):
        out[f"auc_{name}"] = [round(auc(found.logits[:, k], truth[:, k]), 4), int(truth[:, k].sum())]
    hits, total = 0, 0
    scale = pictures.shape[-1] / found.logit_map.shape[-1]
    for i, placed in enumerate(objects):
        for thing in placed:
            if thing.category is None:
                continue
            peak = int(found.logit_map[i, CATEGORIES.index(thing.category)].argmax())
            y, x = (peak // found.logit_map.shape[-1] + 0.5) * scale, (peak % found.logit_map.shape[-1] + 0.5) * scale
            hits += thing.box[0] <= x < thing.box[2] and thing.box[1] <= y < thing.box[3]
            total += 1
    probability = (found.logits / model.temperature).sigmoid()
    unsafe, predicted = truth.amax(1), probability.amax(1)
    out |= {
        "auc_any": [round(auc(predicted, unsafe), 4), int(unsafe.sum())],
        "accuracy_at_half": round(float(((predicted >= 0.5) == unsafe.bool()).float().mean()), 4),
        "peak_in_box": [round(hits / total, 4), total],
        "expected_calibration_error": round(expected_calibration_error(probability.flatten(), truth.flatten()), 4),
        "expected_calibration_error_any": round(expected_calibration_error(predicted, unsafe), 4),
        "scenes": count,
    }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/cost"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "cost_model")
    parser.add_argument("--steps", type=int, default=3300)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--redrawn", type=int, default=2400, help="scenes that the generator draws again")
    args = parser.parse_args()
    worn, worn_described = redrawn(args.redrawn, args.work.parent / "redrawn.safetensors")
    net, concepts = network(), ConceptHead()
    config = LoopConfig(args.steps, args.learning_rate, weight_decay=1e-2, decay=0.5)
    trainer = Trainer(args.work, {"net": net, "concepts": concepts}, config)

    def step(n: int) -> Tensor:
        half = BATCH // 2
        twins, described = twin_batch(n * BATCH, half)
        declared = GENERATOR_CONCEPTS if n % 3 == 0 else None
        more, others, _ = draw(1_000_000 + n * BATCH, BATCH, concepts=declared, restyled=True)
        more, spoilt = ruin(more, n)
        if n % 2:
            again = torch.randint(len(worn), (half // 2,), generator=torch.Generator().manual_seed(n)).tolist()
            more[: half // 2], spoilt[: half // 2] = worn[again], False
            others = [worn_described[i] for i in again] + others[half // 2 :]
        described = described + others
        sound = torch.cat([torch.ones(BATCH, dtype=torch.bool), ~spoilt])
        truth = labels(described) * sound[:, None]
        features = net.features(wear(torch.cat([twins, more]), n))
        logits, pooled = net.head(features).mean((2, 3)), features.mean((2, 3))
        unsafe_of = truth[:half].argmax(1)[:, None]
        ranked = rank_loss(logits[:half].gather(1, unsafe_of), logits[half:BATCH].gather(1, unsafe_of))
        group = torch.where(truth.any(1), truth.argmax(1), torch.tensor(len(CATEGORIES)))
        contrast = supervised_contrastive_loss(pooled, group)
        own = ranked + 4 * anchor_loss(logits, truth) + 0.1 * contrast + 1e-3 * logits.square().mean()
        return own + 0.5 * concepts.loss(pooled, described, sound)

    state = trainer.run(step, title="cost model")
    net.eval()
    model = VisionCostModel(net, CATEGORIES, "sticker", 64)
    x, described, _ = draw(40_000_000, 1500, "val")
    truth, logits = labels(described), model(x).logits
    model.temperature.copy_(torch.stack([fit_temperature(logits[:, k], truth[:, k]) for k in range(len(CATEGORIES))]))
    model.save_pretrained(args.out)
    numbers = {
        "test": measure(model, "test", STYLES),
        f"held-out style ({HELD_OUT_STYLE})": measure(model, "test", (HELD_OUT_STYLE,)),
    }
    x, described, _ = draw(50_000_000, 32, "test")
    maps = (model(x).logits / model.temperature).sigmoid().amax(1)
    captions = [f"C {float(c):.2f}" for c in maps]
    write_report(args.out, "cost model", vars(args), state, numbers, (np.asarray(x.permute(0, 2, 3, 1)), captions))


if __name__ == "__main__":
    main()
