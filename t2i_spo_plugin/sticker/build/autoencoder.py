"""Train the bundled autoencoder: a norm-free ``AutoencoderTiny``, factor 8, 8 latent channels, on scenes of 64 px.

``python -m t2i_spo_plugin.sticker.build.autoencoder``, then the same with ``--stage decoder``, which sharpens the
decoder while the latents stay as they are (it may run while the generator trains). Stops and resumes anywhere.
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
    """L1 and L2 on pixels, L1 on differences of neighbours and on the 8x8-pooled picture, a small pull of the latents.

    Pixels that differ from the picture's background (its median colour) weigh ``1 + objects``: flat ground is easily
    learnt, and thin or pale things would otherwise vanish.
    """
    latents = vae.encoder(x)
    return picture_loss(vae.decoder(latents), x) + 1e-4 * latents.square().mean()


def picture_loss(y: torch.Tensor, x: torch.Tensor, objects: float = 5.0) -> torch.Tensor:
    """L1 and L2 on pixels, L1 on differences of neighbours and on the 8x8-pooled picture; see :func:`loss_of`."""
    ground = x.flatten(2).median(-1).values[..., None, None]
    weight = 1 + objects * ((x - ground).abs().amax(1, keepdim=True) > 0.08).float()
    weight = weight / weight.mean()
    error = y - x
    edges = sum((error.diff(dim=d).abs() * weight.narrow(d, 1, x.shape[d] - 1)).mean() for d in (-1, -2))
    pooled = F.avg_pool2d(error, 8).abs().mean()
    return ((error.abs() + error.square()) * weight).mean() + edges + 0.5 * pooled


@torch.no_grad()
def psnr(vae: AutoencoderTiny, split: Split = "test", count: int = 96) -> float:
    """Peak signal-to-noise ratio in dB of declared scenes of ``split``."""
    vae.eval()
    x = pictures(10_000_000, count, split, declared=1.0)
    y = vae.decoder(vae.encoder(x)).clamp(-1, 1)
    return float(-10 * torch.log10(((y - x) / 2).square().mean()))


def decoder_loss(vae: AutoencoderTiny, x: torch.Tensor, seed: int) -> torch.Tensor:
    """The second stage's loss: the encoder is fixed and its latents are jittered as a generator's are.

    The jitter has a random strength of up to 0.35 of the latents' spread, so that the decoder learns to draw a sharp
    sticker from a latent that is only nearly right.
    """
    with torch.no_grad():
        latents = vae.encoder(x)
        rng = torch.Generator().manual_seed(seed)
        strength = 0.35 * latents.std() * torch.rand(len(x), 1, 1, 1, generator=rng)
        latents = latents + strength * torch.randn(latents.shape, generator=rng)
    return picture_loss(vae.decoder(latents), x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("both", "decoder"), default="both")
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/autoencoder"))
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    last = torch.channels_last

    def batch(n: int) -> torch.Tensor:
        return pictures(n * BATCH, BATCH).contiguous(memory_format=last)

    if args.stage == "both":
        vae = model().to(memory_format=last)
        trainer = Trainer(args.work, {"vae": vae}, LoopConfig(args.steps, args.learning_rate, warmup=150, decay=0.4))
        step = lambda n: loss_of(vae, batch(n))  # noqa: E731
    else:
        vae = AutoencoderTiny.from_pretrained(args.work / "vae").to(memory_format=last)
        config = LoopConfig(args.steps, args.learning_rate, warmup=50, decay=0.5)
        trainer = Trainer(args.work / "decoder", {"decoder": vae.decoder}, config)
        step = lambda n: decoder_loss(vae, batch(1_000_000 + n), n)  # noqa: E731
    state = trainer.run(step, lambda: {"psnr": psnr(vae)}, evaluate_every=100, title=f"autoencoder, {args.stage}")
    vae.save_pretrained(args.work / ("vae" if args.stage == "both" else "vae-decoder"))
    numbers = {"psnr of declared test scenes, dB": round(psnr(vae), 2), "seconds": round(state.seconds)}
    print(f"autoencoder, {args.stage}: {numbers}")


if __name__ == "__main__":
    main()
