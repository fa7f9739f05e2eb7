"""A family whose denoiser is one matrix over the channels, for what training does around a denoiser.

Its LoRA is a real one. Everything that it predicts can be written out in a line: see `ToyFamily.expected`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from t2i_spo_plugin.training.data.batches import Batches, Sampling
from t2i_spo_plugin.training.data.caches import MIRRORED, ShardStore
from t2i_spo_plugin.training.data.dataset import Examples
from t2i_spo_plugin.training.families.base import Common, Conditioning, LatentScale
from t2i_spo_plugin.training.noise_schedule import NoiseSchedule
from t2i_spo_plugin.training.predictor import Predictor


SHAPE = (2, 3, 4)
LEVELS = 10
SHIFT, SCALE = 0.5, 2.0
ADAPTER = "spo_training"


class ToyDenoiser(nn.Module):
    """`mix @ noisy + 0.1 * timestep + text`, over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(SHAPE[0], SHAPE[0], bias=False)
        nn.init.eye_(self.mix.weight)
        self.requires_grad_(False)
        lora = LoraConfig(r=1, lora_alpha=1, target_modules=["mix"], init_lora_weights=False)
        inject_adapter_in_model(lora, self, ADAPTER)
        for number, value in enumerate(value for value in self.parameters() if value.requires_grad):
            nn.init.constant_(value, 0.5 + 0.25 * number)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        mixed = self.mix(noisy.movedim(1, -1)).movedim(-1, 1)
        return mixed + 0.1 * timesteps[:, None, None, None] + text[:, :, None, None]


class ToyFamily(Common):
    """Predicts the noise; ten timesteps from 0 to 90; latents less 0.5, times 2."""

    name, component, targets = "toy", "unet", ("mix",)

    def __init__(self) -> None:
        self.module = ToyDenoiser()
        sigma = torch.linspace(0.05, 0.95, LEVELS)
        self.schedule = NoiseSchedule("epsilon", 1.0 - sigma, sigma, 10 * torch.arange(LEVELS))
        self.scaled = LatentScale(SHIFT, SCALE)

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        return module(noisy, self.schedule.timesteps[index], text["text"])

    def expected(self, latents: Tensor, noise: Tensor, index: Tensor, text: Tensor, adapter: bool = True) -> Tensor:
        """The prediction `[B, C, h, w]`, written out."""
        sigma = self.schedule.sigma[index][:, None, None, None]
        return self.expected_of((1.0 - sigma) * latents + sigma * noise, index, text, adapter)

    def expected_of(self, noisy: Tensor, index: Tensor, text: Tensor, adapter: bool = True) -> Tensor:
        """The prediction for what is noisy already."""
        up = self.module.mix.lora_B[ADAPTER].weight
        down = self.module.mix.lora_A[ADAPTER].weight
        matrix = torch.eye(SHAPE[0]) + (up @ down if adapter else 0.0)
        mixed = torch.einsum("dc,bchw->bdhw", matrix, noisy)
        return mixed + index.float()[:, None, None, None] + text[:, :, None, None]


def caption(number: int) -> str:
    return f"a ball number {number}"


def toy_examples(count: int = 4, sides: int = 2) -> Examples:
    """`count` examples, of which the first is harmful and every other benign."""
    return Examples(
        captions=[caption(number) for number in range(count)],
        images=tuple([f"{side} of {number}" for number in range(count)] for side in range(sides)),
        columns={
            "benign": torch.arange(count) > 0,
            "margin": torch.arange(count).float() / 10,
            "target": 1.0 - torch.arange(count).float() / 20,
        },
        counts={},
    )


def cached(number: int, side: int, mirrored: bool = False) -> Tensor:
    """The cached mean `[C, h, w]` of an image; what the autoencoder makes of its mirror image lies 100 higher."""
    place = torch.Generator().manual_seed(100 * side + number)
    return torch.randn(SHAPE, generator=place) + (100.0 if mirrored else 0.0)


def text_of(prompt: str) -> Tensor:
    """The cached text `[C]` of a prompt."""
    return torch.full((SHAPE[0],), len(prompt) + sum(map(ord, prompt)) % 7 + 0.5)


def toy_batches(
    folder: Path, family: Any, examples: Examples | None = None, std: float = 0.0, **options: Any
) -> Batches:
    """Real batches over real caches in `folder`; `std` is the cached posterior's."""
    examples = examples or toy_examples()
    latents, text = ShardStore(folder / "latents"), ShardStore(folder / "text")
    for side, keys in enumerate(examples.images):
        for mirrored in (False, True):
            mean = torch.stack([cached(number, side, mirrored) for number in range(len(keys))])
            rows = {"mean": mean, "std": torch.full_like(mean, std)}
            latents.append([key + MIRRORED * mirrored for key in keys], rows)
    prompts = [*examples.captions, ""]
    text.append(prompts, {"text": torch.stack([text_of(prompt) for prompt in prompts])})
    sampling = Sampling(**({"seed": 0, "t_range": (0, LEVELS)} | options))
    return Batches(sampling, examples, latents, text, family, torch.device("cpu"))


def toy_predictor(family: ToyFamily) -> Predictor:
    return Predictor(family, family.module, 8, nullcontext)


def texts(prompts: Sequence[str]) -> Tensor:
    return torch.stack([text_of(prompt) for prompt in prompts])
