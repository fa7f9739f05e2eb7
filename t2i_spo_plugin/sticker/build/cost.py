"""Train the bundled safety cost model on scenes of the sticker world and write its report.

`python -m t2i_spo_plugin.sticker.build.cost`: clean, disguised and spoilt scenes with their true labels; an unsafe
scene against the same scene with the twin in its place (ranking), each against zero (anchoring), and the exact masks
of what is unsafe (map). One more output says whether anything is recognised at all. Temperatures are fitted on
validation scenes, seen in the views of the reports.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor
from transformers import ResNetConfig

from t2i_spo_plugin.cost.base import RECOGNISED
from t2i_spo_plugin.cost.losses import anchor_loss, expected_calibration_error, fit_temperature, rank_loss
from t2i_spo_plugin.cost.views import fixed_views
from t2i_spo_plugin.cost.vision import VisionCostModel
from t2i_spo_plugin.networks.backbone import MapClassifier

from ..disguises import DISGUISES, SPOILINGS, STATED, Layers, disguises_for
from ..world import (
    CATEGORIES,
    CONCEPTS,
    GENERATOR_CONCEPTS,
    GENERATOR_STYLES,
    HELD_OUT_STYLE,
    SIZE,
    STYLES,
    Description,
    Kind,
    PlacedObject,
    Split,
)
from .data import NAMES, Judged, JudgedScenes, draw, through_autoencoder, twins_of
from .loop import LoopConfig, Trainer
from .report import write_report
from .store import prefetched


BATCH = 48
CELLS = SIZE // 4
"""Cells across the map."""
CATEGORY_OF = torch.tensor([[float(CONCEPTS[n].category == c) for c in CATEGORIES] for n in NAMES])
"""`[N, K]`: which category a concept belongs to."""


def network(seed: int = 0) -> MapClassifier:
    """The untrained backbone, a ResNet with a top-down path: the map is 32 x 32 at 128 px."""
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[48, 96, 160], depths=[1, 2, 2], layer_type="basic")
    net = MapClassifier(config, len(CATEGORIES) + 1, "peak", fine=64)
    torch.nn.init.constant_(net.head.get_parameter("bias"), -3.0)  # most of an image shows nothing unsafe
    return net


class ConceptHead(torch.nn.Module):
    """Names the concepts of each cell while the cost model trains: seven labels alone teach slowly. Dropped later."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(64, len(NAMES), 1)
        torch.nn.init.constant_(self.convolution.get_parameter("bias"), -4.0)

    def loss(self, features: Tensor, batch: Judged) -> Tensor:
        """Cross entropy of cells that a concept covers, and of what the image shows at all."""
        maps = self.convolution(features).float()
        covered, concept = batch.masks.max(1)
        cells = F.cross_entropy(maps, concept, reduction="none")
        inside = (covered > 0.5).float()
        logits = maps.flatten(2).logsumexp(2) - np.log(CELLS**2)
        shown = F.binary_cross_entropy_with_logits(logits, batch.truth, reduction="none").sum(1).mean()
        return (cells * inside).sum() / inside.sum().clamp(min=1) + 0.3 * shown


def labels(described: Sequence[Description]) -> Tensor:
    """`[B, K]` of 0 and 1."""
    return torch.tensor([[float(c in d.unsafe) for c in CATEGORIES] for d in described])


def mask_loss(maps: Tensor, target: Tensor) -> Tensor:
    """Cross entropy per cell and the soft Dice loss of the maps that have something to show; `[B, K, h, w]` twice."""
    cells = F.binary_cross_entropy_with_logits(maps, target, pos_weight=torch.tensor(3.0, device=maps.device))
    shown = target.amax((2, 3)) > 0.5
    p, t = maps.sigmoid()[shown], target[shown]
    dice = 1 - (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)
    return 5 * cells + dice.mean() if len(dice) else 5 * cells


def loss_of(net: MapClassifier, concepts: ConceptHead, batch: Judged) -> Tensor:
    """Anchoring, ranking of an unsafe scene above its twin's, masks, and the names of the concepts."""
    features = net.features(batch.images.contiguous(memory_format=torch.channels_last))
    maps = net.head(features).float()
    logits = maps.flatten(2).logsumexp(2) - np.log(CELLS**2)
    category = CATEGORY_OF.to(maps.device)
    truth = torch.cat([(batch.truth @ category).clamp(max=1), batch.readable[:, None].float()], 1)
    masks = torch.einsum("bnhw,nk->bkhw", batch.masks, category).clamp(max=1)
    masks = torch.cat([masks, batch.masks.amax(1, keepdim=True)], 1)
    # Every third image shows the cover of the one before it.
    scene, cover = logits[1::3, :-1], logits[2::3, :-1]
    paired = (truth[1::3, :-1][: len(cover)] > 0) & (truth[2::3, :-1].sum(1, keepdim=True) == 0)
    ranked = rank_loss(scene[: len(cover)][paired], cover[paired]) if paired.any() else logits.sum() * 0
    return 4 * anchor_loss(logits, truth) + 0.5 * ranked + mask_loss(maps, masks) + concepts.loss(features, batch)


def auc(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve by ranks."""
    ranks = torch.empty(len(scores))
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float)
    positive = truth.bool()
    n, m = int(positive.sum()), int((~positive).sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def in_views(model: VisionCostModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[B, K]`, the largest over the views, and bool `[B]`: some view shows something known."""
    logits, readable = [], []
    for part in pixels.split(32):
        seen = [model(view) for view in fixed_views(part)]
        logits.append(torch.stack([one.logits for one in seen]).amax(0))
        readable.append(torch.stack([one.readable for one in seen if one.readable is not None]).amax(0) >= RECOGNISED)
    return torch.cat(logits), torch.cat(readable)


def regions(model: VisionCostModel, pixels: Tensor, objects: Sequence[tuple[PlacedObject, ...]]) -> dict[str, float]:
    """How the map of a category fits the mask of what is unsafe: IoU, area, and whether the peak lies inside."""
    overlap, area, peak = [], [], []
    maps = torch.cat([(model(part).logit_map / model.temperature[:, None, None]).cpu() for part in pixels.split(64)])
    enlarged = F.interpolate(maps, SIZE, mode="bilinear", align_corners=False)
    for i, placed in enumerate(objects):
        for category in {thing.category for thing in placed if thing.category}:
            own = [thing.mask for thing in placed if thing.category == category]
            mask = torch.from_numpy(np.logical_or.reduce(own))
            found = enlarged[i, CATEGORIES.index(category)]
            region = found > 0
            overlap.append(float((region & mask).sum() / (region | mask).sum()))
            area.append(float(region.sum() / mask.sum()))
            peak.append(bool(mask.flatten()[int(found.argmax())]))
    boxes = torch.tensor(overlap)
    return {
        "mean_iou": round(float(boxes.mean()), 4),
        "iou_at_least_half": round(float((boxes >= 0.5).float().mean()), 4),
        "median_area_ratio": round(float(torch.tensor(area).median()), 4),
        "peak_inside": round(float(np.mean(peak)), 4),
        "regions": len(boxes),
    }


def measure(model: VisionCostModel, styles: Sequence[str], concepts: Sequence[str] | None, count: int) -> dict:
    """AUC per category with n, regions against masks, calibration error on `count` fresh test scenes."""
    pixels, described, objects = draw(30_000_000, count, "test", "any", styles, concepts)
    truth = labels(described)
    logits = torch.cat([model(part).logits for part in pixels.split(64)])
    out: dict[str, object] = {}
    for k, name in enumerate(CATEGORIES):
        out[f"auc_{name}"] = [round(auc(logits[:, k], truth[:, k]), 4), int(truth[:, k].sum())]
    probability = (logits / model.temperature).sigmoid()
    unsafe, predicted = truth.amax(1), probability.amax(1)
    return out | {
        "auc_any": [round(auc(predicted, unsafe), 4), int(unsafe.sum())],
        "accuracy_at_half": round(float(((predicted >= 0.5) == unsafe.bool()).float().mean()), 4),
        "expected_calibration_error_any": round(expected_calibration_error(predicted, unsafe), 4),
        "regions": regions(model, pixels, objects),
        "scenes": count,
    }


def measure_disguised(model: VisionCostModel, count: int = 40) -> dict[str, list[float]]:
    """By disguise: share of unsafe test scenes that are called unsafe, looked at once and in views; by spoiling, the
    shares that are called unreadable."""
    out: dict[str, list[float]] = {}
    harmful, described, _ = draw(31_000_000, count, "test", "harmful", concepts=GENERATOR_CONCEPTS, aligned=True)
    covers = twins_of(described)
    temperature = model.temperature
    for name, change in DISGUISES.items():
        images = torch.stack(
            [
                change(Layers(x, x[:1] * 0, cover), torch.Generator().manual_seed(n))[0]
                for n, (x, cover, d) in enumerate(zip(harmful, covers, described, strict=True))
                if name in disguises_for(d.concepts)
            ]
        )
        once = (model(images).logits / temperature).amax(1) >= 0
        seen = (in_views(model, images)[0] / temperature).amax(1) >= 0
        star = " (stated)" if name in STATED else ""
        out[name + star] = [round(float(x.float().mean()), 4) for x in (once, seen)]
    for name, spoil in SPOILINGS.items():
        images = torch.stack([spoil(x, torch.Generator().manual_seed(n)) for n, x in enumerate(harmful)])
        seen, readable = in_views(model, images)
        out[f"{name}: unreadable, unsafe in views"] = [
            round(float((~readable).float().mean()), 4),
            round(float(((seen / temperature).amax(1) >= 0).float().mean()), 4),
        ]
    return out


def false_unsafe(
    model: VisionCostModel, kind: Kind = "benign", count: int = 300, split: Split = "test"
) -> list[float]:
    """Share of safe scenes of what the generator draws that are called unsafe: looked at once, and in views."""
    pixels, _, _ = draw(33_000_000, count, split, kind, concepts=GENERATOR_CONCEPTS, aligned=True)
    once = torch.cat([model(part).logits for part in pixels.split(64)])
    return [
        round(float(((x / model.temperature).amax(1) >= 0).float().mean()), 4)
        for x in (once, in_views(model, pixels)[0])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/cost"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "cost_model")
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/sticker/autoencoder/vae"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=16_000)
    parser.add_argument("--count", type=int, default=1000, help="scenes that the report is measured on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that render")
    args = parser.parse_args()
    scenes = JudgedScenes(args.work.parent / "judged.uint8", args.scenes, jobs=args.jobs)
    net, concepts = network(), ConceptHead()
    config = LoopConfig(args.steps, args.learning_rate, weight_decay=1e-2, decay=0.5)
    trainer = Trainer(args.work, {"net": net, "concepts": concepts}, config, args.device)

    batch = prefetched(lambda n: scenes.batch(n, BATCH, CELLS), trainer.state.step, args.steps, args.jobs)

    vae = AutoencoderTiny.from_pretrained(args.autoencoder).eval().to(args.device)

    def step(n: int) -> Tensor:
        made = batch(n).to(args.device)
        if n % 3 == 0:
            made.images[: BATCH // 3] = through_autoencoder(vae, made.images[: BATCH // 3], n)
        return loss_of(net, concepts, made)

    def evaluate() -> dict[str, float]:
        net.eval()
        model = VisionCostModel(net, CATEGORIES, "sticker", SIZE, torch.ones(len(CATEGORIES), device=args.device))
        x, described, objects = draw(41_000_000, 200, "val", "harmful", concepts=GENERATOR_CONCEPTS)
        logits = model(x).logits
        found = regions(model, x, objects)
        return {"recall": float((logits.amax(1) >= 0).float().mean()), **{k: float(v) for k, v in found.items()}}

    state = trainer.run(step, evaluate, evaluate_every=500, title="cost model")
    net.to("cpu").eval()
    model = VisionCostModel(net, CATEGORIES, "sticker", SIZE)
    x, described, _ = draw(40_000_000, args.count, "val", styles=STYLES)
    truth, (logits, _) = labels(described), in_views(model, x)
    model.temperature.copy_(torch.stack([fit_temperature(logits[:, k], truth[:, k]) for k in range(len(CATEGORIES))]))
    model.save_pretrained(args.out)
    numbers = {
        "test, declared subset": measure(model, GENERATOR_STYLES, GENERATOR_CONCEPTS, args.count),
        "test, all concepts and styles": measure(model, STYLES, None, args.count),
        f"held-out style ({HELD_OUT_STYLE}), declared subset": measure(
            model, (HELD_OUT_STYLE,), GENERATOR_CONCEPTS, args.count
        ),
        "false unsafe on benign test scenes: once, in views": false_unsafe(model, count=min(300, args.count)),
        "unsafe scenes in disguise: once, in views": measure_disguised(model, min(100, args.count)),
    }
    x, _, _ = draw(50_000_000, 32, "test")
    maps = (model(x).logits / model.temperature).sigmoid().amax(1)
    captions = [f"C {float(c):.2f}" for c in maps]
    write_report(args.out, "cost model", vars(args), state, numbers, (np.asarray(x.permute(0, 2, 3, 1)), captions))


if __name__ == "__main__":
    main()
