"""The autoencoder of the sticker world in plain torch: diffusers' AutoencoderTiny, of which ComfyUI knows one size.

Modules have the names that diffusers gives to the weights. They work on images in [0, 1], as ComfyUI's TAESD does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TinyBlock(nn.Module):
    """Three convolutions beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` -> the same shape."""
        return torch.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Images `[B, 3, H, W]` in [0, 1] -> latents, one halving a level after the first."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths, blocks = config["encoder_block_out_channels"], config["num_encoder_blocks"]
        layers: list[nn.Module] = []
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            if level == 0:
                layers.append(nn.Conv2d(config["in_channels"], width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            layers += [TinyBlock(width) for _ in range(count)]
        layers.append(nn.Conv2d(widths[-1], config["latent_channels"], 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, 3, H, W]` -> `[B, C, h, w]`."""
        return self.layers(x)


class TinyDecoder(nn.Module):
    """Latents -> images `[B, 3, H, W]` in [0, 1], one doubling a level before the last."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths, blocks = config["decoder_block_out_channels"], config["num_decoder_blocks"]
        layers: list[nn.Module] = [nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1), nn.ReLU()]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            layers += [TinyBlock(width) for _ in range(count)]
            if level < len(blocks) - 1:
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
            else:
                layers.append(nn.Conv2d(width, config["out_channels"], 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, h, w]` -> `[B, 3, H, W]`."""
        return self.layers(torch.tanh(x / 3) * 3)


def tiny_autoencoder(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[TinyEncoder, TinyDecoder]:
    """Encoder and decoder of a diffusers AutoencoderTiny by its configuration and weights; strict about both."""
    sides: tuple[TinyEncoder, TinyDecoder] = TinyEncoder(config), TinyDecoder(config)
    for name, side in zip(("encoder.", "decoder."), sides, strict=True):
        side.load_state_dict({k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)})
    return sides


def factor(config: Mapping[str, Any]) -> int:
    """How many pixels of a side are one cell of the latent."""
    return 2 ** (len(config["num_decoder_blocks"]) - 1)
