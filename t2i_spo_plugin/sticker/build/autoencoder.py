"""Train the bundled autoencoder: a norm-free `AutoencoderTiny`, factor 8, 8 latent channels: 128 px to 16 x 16.

`python -m t2i_spo_plugin.sticker.build.autoencoder`, then the same with `--stage decoder`, which sharpens the decoder
while the latents stay as they are (it may run while the generator trains). Stops and resumes anywhere.

Objects stand on a grid of 1/8 of the side, which is two latent cells, so one sticker has the same latents wherever it
stands. Most steps see crops of half the side: the network is convolutional, and a crop costs a quarter.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from ..world import GENERATOR_CONCEPTS, GENERATOR_STYLES, SIZE, Split, scene
from .loop import LoopConfig, Trainer
from .store import as_pixels, rendered


FACTOR = 8
CHANNELS = 8
WIDTH = 48


def model(seed: int = 0) -> AutoencoderTiny:
    """The untrained network."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 4,
        decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=(0, 1, 2, 3),
        num_decoder_blocks=(4, 3, 1, 0),
        latent_channels=CHANNELS,
        scaling_factor=1.0,
    )


def training_scene(seed: int) -> np.ndarray:
    """A training scene, six in seven of what the generator draws, as it draws it."""
    if seed % 7:
        return scene(seed, "train", concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES, aligned=True).image
    return scene(seed, "train", aligned=True).image


def scenes(first_seed: int, count: int, split: Split = "test", aligned: bool = True) -> Tensor:
    """Declared scenes of `split`: `[count, 3, SIZE, SIZE]` in [-1, 1]."""
    images = [
        scene(seed, split, concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES, aligned=aligned).image
        for seed in range(first_seed, first_seed + count)
    ]
    return as_pixels(torch.from_numpy(np.stack(images))) * 2 - 1


def crop(images: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """Crops `[B, side, side, C]` of `[B, H, W, C]` on the latents' grid: of two places the one with more on it."""
    last, count = (images.shape[1] - side) // FACTOR, len(images)
    places = (torch.randint(last + 1, (2, count, 2), generator=rng) * FACTOR).to(images.device)
    along = torch.arange(side, device=images.device)
    rows, columns = (places[..., n, None] + along for n in range(2))
    every = torch.arange(count, device=images.device)[None, :, None, None]
    parts = images[every, rows[..., None], columns[..., None, :]]
    detail = parts[:, :, ::4, ::4].float().flatten(2).var(2)
    return parts[detail.argmax(0), every[0, :, 0, 0]]


def image_loss(y: Tensor, x: Tensor, objects: float = 5.0) -> Tensor:
    """L1 and L2 on pixels, L1 on differences of neighbours and on the pooled image, for images in [-1, 1].

    Pixels that differ from the image's background (its median colour) weigh `1 + objects`: flat ground is easily
    learnt, and thin or pale things would otherwise vanish.
    """
    ground = x.flatten(2).median(-1).values[..., None, None]
    weight = 1 + objects * ((x - ground).abs().amax(1, keepdim=True) > 0.08).float()
    weight = weight / weight.mean()
    error = y.float() - x
    edges = sum((error.diff(dim=d).abs() * weight.narrow(d, 1, x.shape[d] - 1)).mean() for d in (-1, -2))
    pooled = F.avg_pool2d(error, FACTOR).abs().mean()
    return ((error.abs() + error.square()) * weight).mean() + edges + 0.5 * pooled


def loss_of(vae: AutoencoderTiny, x: Tensor) -> Tensor:
    """`image_loss` of the reconstruction and a small pull of the latents towards zero."""
    latents = vae.encoder(x)
    return image_loss(vae.decoder(latents), x) + 1e-4 * latents.float().square().mean()


def decoder_loss(vae: AutoencoderTiny, x: Tensor, rng: torch.Generator) -> Tensor:
    """The second stage's loss: the encoder is fixed and its latents are jittered as a generator's are.

    The jitter has a random strength of up to 0.35 of the latents' spread, so that the decoder learns to draw a sharp
    sticker from a latent that is only nearly right.
    """
    with torch.no_grad():
        latents = vae.encoder(x).float()
        strength = 0.35 * latents.std() * torch.rand(len(x), 1, 1, 1, generator=rng, device=x.device)
        latents = latents + strength * torch.randn(latents.shape, generator=rng, device=x.device)
    return image_loss(vae.decoder(latents), x)


SPREAD = 0.2
"""Standard deviation of every latent channel: small, for the decoder of `AutoencoderTiny` bends values beyond 1."""


@torch.no_grad()
def standardise(vae: AutoencoderTiny, images: Tensor) -> None:
    """Give every latent channel the mean 0 and the deviation `SPREAD` over `images` `[B, 3, H, W]`, in place.

    The encoder's last convolution takes the change, the decoder's first one takes it back. What a generator learns
    first is then no longer the channels' own means. Exact but for the border, where the padding of the decoder's
    convolution means another value now, and for how the decoder bends what is large.
    """
    latents = torch.cat([vae.encoder(part).float() for part in images.split(16)])
    mean, scale = latents.mean((0, 2, 3)), latents.std((0, 2, 3)) / SPREAD
    last, first = vae.encoder.layers[-1], vae.decoder.layers[0]
    last.weight.div_(scale[:, None, None, None])
    last.bias.sub_(mean).div_(scale)
    first.bias.add_(torch.einsum("oihw,i->o", first.weight, mean))
    first.weight.mul_(scale[None, :, None, None])


def gradient_energy(x: Tensor) -> float:
    """Mean square of the differences of neighbouring pixels: sharp images have more of it."""
    return float(x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean())


@torch.no_grad()
def measure(vae: AutoencoderTiny, x: Tensor) -> dict[str, float]:
    """PSNR in dB of reconstructions of `[B, 3, H, W]` in [-1, 1], and their gradient energy over the images' own."""
    vae.eval()
    device = next(vae.parameters()).device
    y = torch.cat([vae.decoder(vae.encoder(part.to(device))).clamp(-1, 1).float().cpu() for part in x.split(16)])
    error = ((y - x) / 2).square().mean((1, 2, 3))
    return {
        "psnr": float(-10 * torch.log10(error.mean())),
        "psnr_worst_tenth": float(-10 * torch.log10(error.quantile(0.9))),
        "sharpness": gradient_energy(y) / gradient_energy(x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("both", "decoder"), default="both")
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/autoencoder"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=12, help="crops in a step; of whole scenes a quarter as many")
    parser.add_argument("--whole", type=float, default=0.15, help="last share of the steps, on whole scenes")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--muon", type=float, default=0.005, help="rate of the convolutions")
    parser.add_argument("--decay", type=float, default=0.7)
    parser.add_argument("--scenes", type=int, default=20_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that render")
    args = parser.parse_args()
    images = rendered(args.work / "scenes.uint8", training_scene, 0, args.scenes, args.jobs)
    test = scenes(10_000_000, 64)

    def batch(n: int) -> Tensor:
        rng = torch.Generator().manual_seed(n)
        whole = n >= args.steps * (1 - args.whole)
        index = torch.randint(len(images), (args.batch // 4 if whole else args.batch,), generator=rng)
        chosen = images[index] if whole else crop(images[index], SIZE // 2, rng)
        return as_pixels(chosen, args.device) * 2 - 1

    config = LoopConfig(args.steps, args.learning_rate, warmup=100, decay=args.decay, ema=0.995, muon=args.muon)
    if args.stage == "both":
        vae = model().to(memory_format=torch.channels_last)
        trainer = Trainer(args.work, {"vae": vae}, config, args.device)
        step = lambda n: loss_of(vae, batch(n))  # noqa: E731
    else:
        vae = AutoencoderTiny.from_pretrained(args.work / "vae").to(args.device, memory_format=torch.channels_last)
        trainer = Trainer(args.work / "decoder", {"decoder": vae.decoder}, config, args.device)
        step = lambda n: decoder_loss(vae, batch(n), torch.Generator(args.device).manual_seed(n))  # noqa: E731

    def averaged() -> AutoencoderTiny:
        out = model()
        out.load_state_dict(vae.state_dict())
        if args.stage == "both":
            out.load_state_dict(trainer.averaged("vae"))
        else:
            out.decoder.load_state_dict(trainer.averaged("decoder"))
        return out.eval()

    def evaluate() -> dict[str, float]:
        shipped = averaged()
        shipped.save_pretrained(args.work / ("vae" if args.stage == "both" else "vae-decoder"))
        return measure(shipped.to(args.device), test)

    state = trainer.run(step, evaluate, evaluate_every=200, title=f"autoencoder, {args.stage}")
    if args.stage == "both":
        shipped = averaged()
        standardise(shipped, scenes(20_000_000, 512, "train"))
        shipped.save_pretrained(args.work / "vae")
        print(f"with latents of one spread: {measure(shipped, test)}")
    print(f"autoencoder, {args.stage}: {state.curve[-1]}, {state.seconds:.0f} s")


if __name__ == "__main__":
    main()
