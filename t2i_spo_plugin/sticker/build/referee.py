"""Train the referee: a RegNet that names all concepts, on renders and on their autoencoder reconstructions.

``python -m t2i_spo_plugin.sticker.build.referee``. Nothing that it says trains or chooses anything.
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

from ..referee import StickerReferee
from ..world import GENERATOR_CONCEPTS, GENERATOR_STYLES, HELD_OUT_STYLE, STYLES, Description, describe, render
from .data import NAMES, pixels, restyle, ruin, truth_of, wear
from .loop import LoopConfig, Trainer
from .report import write_report


BATCH = 48


def network(seed: int = 77) -> MapClassifier:
    """The untrained network; its family, seed and training differ from every reward's."""
    torch.manual_seed(seed)
    config = RegNetConfig(
        embedding_size=32, hidden_sizes=[64, 128, 256], depths=[2, 3, 2], groups_width=32, layer_type="y"
    )
    return MapClassifier(config, len(NAMES), "peak")


def scenes(first_seed: int, count: int) -> tuple[Tensor, list[Description]]:
    """Training scenes, two of three from what the generator draws."""
    images, described = [], []
    for seed in range(first_seed, first_seed + count):
        declared = GENERATOR_CONCEPTS if seed % 3 else None
        d = describe(seed, "train", ("any", "benign", "any")[seed % 3], declared)
        images.append(render(d, seed, aligned=seed % 2 == 0, restyle=restyle if seed % 5 < 3 else None)[0])
        described.append(d)
    return pixels(images), described


def loss_of(logits: Tensor, truth: Tensor) -> Tensor:
    """Each concept against zero, and all against each other: the second term teaches what the first one calibrates."""
    apart = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=torch.tensor(2.0), reduction="none").sum(1)
    together = -(truth / truth.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1)
    return (apart + together).mean()


def nothing(logits: Tensor) -> Tensor:
    """A spoilt picture shows no concept."""
    return 0.2 * F.softplus(logits).sum(1).mean()


def measure(
    referee: StickerReferee, styles: Sequence[str], concepts: Sequence[str] | None, count: int = 1500
) -> dict[str, object]:
    """Recall of objects, false objects, false unsafe on benign test scenes."""
    out: dict[str, object] = {}
    for kind in ("any", "benign"):
        described = [describe(60_000_000 + n, "test", kind, concepts, styles) for n in range(count)]
        x = pixels([render(d, d.seed, aligned=concepts is not None)[0] for d in described])
        shown, truth = referee.probabilities(x) >= 0.5, truth_of(described).bool()
        if kind == "any":
            missed = (truth & ~shown).sum(0)
            worst = {
                NAMES[i]: f"{int(missed[i])}/{int(truth[:, i].sum())}"
                for i in missed.argsort(descending=True)[:6].tolist()
                if missed[i]
            }
            out |= {
                "recall": [round(float((shown & truth).sum() / truth.sum()), 4), int(truth.sum())],
                "precision": round(float((shown & truth).sum() / shown.sum().clamp(min=1)), 4),
                "most_missed": worst,
            }
        else:
            false = shown[:, referee.unsafe_index].any(1)
            out["false_unsafe"] = [round(float(false.float().mean()), 4), count]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/referee"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "referee")
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/sticker/autoencoder/vae"))
    parser.add_argument("--steps", type=int, default=3800)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    net = network()
    trainer = Trainer(
        args.work, {"net": net}, LoopConfig(args.steps, args.learning_rate, weight_decay=2e-2, decay=0.5)
    )
    vae = AutoencoderTiny.from_pretrained(args.autoencoder).eval() if args.autoencoder.is_dir() else None

    def step(n: int) -> Tensor:
        x, described = scenes(5_000_000 + n * BATCH, BATCH)
        if vae is not None and n % 2 == 0:
            with torch.no_grad():
                half = BATCH // 2
                x[:half] = (vae.decoder(vae.encoder(x[:half] * 2 - 1)) / 2 + 0.5).clamp(0, 1)
        x, spoilt = ruin(x, n) if n % 3 == 0 else (x, torch.zeros(BATCH, dtype=torch.bool))
        truth = truth_of(described)
        logits = net(wear(x, n))[0][~spoilt]
        return loss_of(logits, truth[~spoilt]) + (nothing(net(x[spoilt])[0]) if spoilt.sum() > 1 else 0.0)

    state = trainer.run(step, title="referee")
    net.eval()
    save_network(
        net,
        net.backbone.config,
        {"kind": "referee", "outputs": list(NAMES), "size": 64, "pooling": net.pooling},
        args.out,
    )
    referee = StickerReferee.from_pretrained(args.out)
    numbers = {
        "declared subset, training styles of the generator": measure(referee, GENERATOR_STYLES, GENERATOR_CONCEPTS),
        f"declared subset, held-out style ({HELD_OUT_STYLE})": measure(referee, (HELD_OUT_STYLE,), GENERATOR_CONCEPTS),
        "all concepts, all training styles": measure(referee, STYLES, None),
        f"all concepts, held-out style ({HELD_OUT_STYLE})": measure(referee, (HELD_OUT_STYLE,), None),
    }
    d = [
        describe(70_000_000 + n, "test", concepts=GENERATOR_CONCEPTS, styles=(*GENERATOR_STYLES, HELD_OUT_STYLE))
        for n in range(32)
    ]
    x = pixels([render(i, i.seed)[0] for i in d])
    seen = [", ".join(NAMES[k] for k in row.nonzero().flatten().tolist()) for row in referee.probabilities(x) >= 0.5]
    write_report(args.out, "referee", vars(args), state, numbers, (np.asarray(x.permute(0, 2, 3, 1)), seen))


if __name__ == "__main__":
    main()
