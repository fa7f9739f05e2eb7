"""Train the referee: a RegNet that names all concepts, on clean, disguised and spoilt scenes and on what the
autoencoder makes of them.

`python -m t2i_spo_plugin.sticker.build.referee`. Nothing that it says trains or chooses anything: its scenes, seed and
architecture are its own.
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
from transformers import RegNetConfig

from t2i_spo_plugin.networks.backbone import MapClassifier, save_network

from ..disguises import DISGUISES, SPOILINGS, STATED, Layers, disguises_for
from ..referee import StickerReferee
from ..world import GENERATOR_CONCEPTS, GENERATOR_STYLES, HELD_OUT_STYLE, SIZE, STYLES
from .data import NAMES, Judged, JudgedScenes, draw, through_autoencoder, truth_of, twins_of
from .loop import LoopConfig, Trainer
from .report import write_report
from .store import prefetched


BATCH = 48
FIRST_SEED = 200_000_000
"""Of its training scenes, so that it shares none with the cost model."""


def network(seed: int = 77) -> MapClassifier:
    """The untrained network; its family, seed and training differ from every reward's."""
    torch.manual_seed(seed)
    config = RegNetConfig(
        embedding_size=32, hidden_sizes=[64, 128, 256], depths=[2, 3, 2], groups_width=32, layer_type="y"
    )
    net = MapClassifier(config, len(NAMES), "peak")
    torch.nn.init.constant_(net.head.get_parameter("bias"), -4.0)  # an image shows one or two concepts of many
    return net


def loss_of(logits: Tensor, batch: Judged) -> Tensor:
    """Each concept against zero, and all against each other: the second term teaches what the first one calibrates.

    What is spoilt or blank shows none.
    """
    logits, readable = logits.float(), batch.readable
    weight = torch.tensor(2.0, device=logits.device)
    apart = F.binary_cross_entropy_with_logits(logits, batch.truth, pos_weight=weight, reduction="none").sum(1)
    share = batch.truth / batch.truth.sum(1, keepdim=True).clamp(min=1)
    together = -(share * logits.log_softmax(1)).sum(1)
    return apart.mean() + together[readable].sum() / len(logits)


def measure(referee: StickerReferee, styles: Sequence[str], concepts: Sequence[str] | None, count: int) -> dict:
    """Recall of objects, false objects, false unsafe on benign test scenes: looked at once, and in views."""
    out: dict[str, object] = {}
    for kind in ("any", "benign"):
        x, described, _ = draw(60_000_000, count, "test", kind, styles, concepts, None if concepts is None else True)
        truth = truth_of(described).bool()
        once = referee.probabilities(x) >= 0.5
        if kind == "any":
            missed = (truth & ~once).sum(0)
            worst = {
                NAMES[i]: f"{int(missed[i])}/{int(truth[:, i].sum())}"
                for i in missed.argsort(descending=True)[:6].tolist()
                if missed[i]
            }
            out |= {
                "recall": [round(float((once & truth).sum() / truth.sum()), 4), int(truth.sum())],
                "precision": round(float((once & truth).sum() / once.sum().clamp(min=1)), 4),
                "most_missed": worst,
            }
        else:
            seen = referee.probabilities(x, in_views=True) >= 0.5
            false = [shown[:, referee.unsafe_index].any(1) for shown in (once, seen)]
            out["false_unsafe: once, in views"] = [*(round(float(f.float().mean()), 4) for f in false), count]
    return out


def measure_disguised(referee: StickerReferee, count: int) -> dict[str, list[float]]:
    """By disguise: share of unsafe test scenes whose unsafe object is recognised, looked at once and in views; by
    spoiling, the share that is called unreadable."""
    out: dict[str, list[float]] = {}
    harmful, described, _ = draw(61_000_000, count, "test", "harmful", concepts=GENERATOR_CONCEPTS, aligned=True)
    covers = twins_of(described)
    for name, change in DISGUISES.items():
        images = torch.stack(
            [
                change(Layers(x, x[:1] * 0, cover), torch.Generator().manual_seed(n))[0]
                for n, (x, cover, d) in enumerate(zip(harmful, covers, described, strict=True))
                if name in disguises_for(d.concepts)
            ]
        )
        shares = [
            float((referee.probabilities(images, in_views)[:, referee.unsafe_index] >= 0.5).any(1).float().mean())
            for in_views in (False, True)
        ]
        out[name + (" (stated)" if name in STATED else "")] = [round(share, 4) for share in shares]
    for name, spoil in SPOILINGS.items():
        images = torch.stack([spoil(x, torch.Generator().manual_seed(n)) for n, x in enumerate(harmful)])
        out[f"{name}: unreadable"] = [round(float(referee.unreadable(images).float().mean()), 4)]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/referee"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "referee")
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/sticker/autoencoder/vae"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=16_000)
    parser.add_argument("--count", type=int, default=1000, help="scenes that the report is measured on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that render")
    args = parser.parse_args()
    scenes = JudgedScenes(args.work.parent / "refereed.uint8", args.scenes, FIRST_SEED, args.jobs)
    net = network()
    config = LoopConfig(args.steps, args.learning_rate, weight_decay=2e-2, decay=0.5)
    trainer = Trainer(args.work, {"net": net}, config, args.device)
    vae = (
        AutoencoderTiny.from_pretrained(args.autoencoder).eval().to(args.device) if args.autoencoder.is_dir() else None
    )
    facts = {"kind": "referee", "outputs": list(NAMES), "size": SIZE, "pooling": net.pooling}

    batches = prefetched(lambda n: scenes.batch(n, BATCH, 1), trainer.state.step, args.steps, args.jobs)

    def step(n: int) -> Tensor:
        batch = batches(n).to(args.device)
        images = batch.images.contiguous(memory_format=torch.channels_last)
        if vae is not None and n % 3 == 0:
            images[: BATCH // 3] = through_autoencoder(vae, images[: BATCH // 3], n)
        return loss_of(net(images)[0], batch)

    def evaluate() -> dict[str, float]:
        net.eval()
        referee = StickerReferee(net, NAMES, SIZE)
        x, described, _ = draw(63_000_000, 200, "val", "any", GENERATOR_STYLES, GENERATOR_CONCEPTS, True)
        shown, truth = referee.probabilities(x) >= 0.5, truth_of(described).bool()
        return {
            "recall": float((shown & truth).sum() / truth.sum()),
            "precision": float((shown & truth).sum() / shown.sum().clamp(min=1)),
        }

    state = trainer.run(step, evaluate, evaluate_every=500, title="referee")
    net.to("cpu").eval()
    save_network(net, net.backbone.config, facts, args.out)
    referee = StickerReferee.from_pretrained(args.out)
    numbers = {
        "declared subset, training styles of the generator": measure(
            referee, GENERATOR_STYLES, GENERATOR_CONCEPTS, args.count
        ),
        f"declared subset, held-out style ({HELD_OUT_STYLE})": measure(
            referee, (HELD_OUT_STYLE,), GENERATOR_CONCEPTS, args.count
        ),
        "all concepts, all training styles": measure(referee, STYLES, None, args.count),
        "unsafe scenes in disguise: once, in views": measure_disguised(referee, min(100, args.count)),
    }
    x, _, _ = draw(70_000_000, 32, "test", "any", (*GENERATOR_STYLES, HELD_OUT_STYLE), GENERATOR_CONCEPTS)
    seen = [", ".join(NAMES[k] for k in row.nonzero().flatten().tolist()) for row in referee.probabilities(x) >= 0.5]
    write_report(args.out, "referee", vars(args), state, numbers, (np.asarray(x.permute(0, 2, 3, 1)), seen))


if __name__ == "__main__":
    main()
