"""Train the bundled autoencoder: a norm-free ``AutoencoderTiny``, factor 8, 8 latent channels, on scenes of 64 px.

``python -m t2i_spo_plugin.sticker.build.autoencoder``: about 20 minutes on two cores; stops and resumes anywhere.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from ..world import GENERATOR_CONCEPTS, GENERATOR_STYLES, Split, scene
from .loop import LoopConfig, Trainer


BATCH = 24


def model(seed: int = 0) -> AutoencoderTiny:
    """The untrained network."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=8,
        scaling_factor=1.0,
    )


def pictures(first_seed: int, count: int, split: Split = "train", declared: float = 0.85) -> torch.Tensor:
    """Scenes as ``[count, 3, 64, 64]`` in [-1, 1]; a share ``declared`` of them from what the generator draws."""
    images = []
    for seed in range(first_seed, first_seed + count):
        if seed % 100 < declared * 100:
            images.append(scene(seed, split, concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES, aligned=True).image)
        else:
            images.append(scene(seed, split).image)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def loss_of(vae: AutoencoderTiny, x: torch.Tensor) -> torch.Tensor:
    """L1 on pixels, on differences of neighbours and on the 8x8-pooled picture, and a small pull of the latents."""
    latents = vae.encoder(x)
    y = vae.decoder(latents)
    edges = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean() + (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
    pooled = (F.avg_pool2d(y, 8) - F.avg_pool2d(x, 8)).abs().mean()
    return (y - x).abs().mean() + (y - x).square().mean() + 0.5 * edges + 0.5 * pooled + 1e-4 * latents.square().mean()


@torch.no_grad()
def psnr(vae: AutoencoderTiny, split: Split = "test", count: int = 96) -> float:
    """Peak signal-to-noise ratio in dB of declared scenes of ``split``."""
    vae.eval()
    x = pictures(10_000_000, count, split, declared=1.0)
    y = vae.decoder(vae.encoder(x)).clamp(-1, 1)
    return float(-10 * torch.log10(((y - x) / 2).square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/autoencoder"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    vae = model().to(memory_format=torch.channels_last)
    trainer = Trainer(args.work, {"vae": vae}, LoopConfig(args.steps, args.learning_rate, warmup=150, decay=0.4))

    def step(n: int) -> torch.Tensor:
        return loss_of(vae, pictures(n * BATCH, BATCH).contiguous(memory_format=torch.channels_last))

    trainer.run(step, lambda: {"psnr": psnr(vae)}, evaluate_every=100, title="autoencoder")
    vae.save_pretrained(args.work / "vae")
    print(f"autoencoder: {psnr(vae):.2f} dB on test combinations")


if __name__ == "__main__":
    main()
