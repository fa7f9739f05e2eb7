"""The sticker world in ComfyUI, drawn as diffusers draws it, and what an adapter gate sees of any model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import comfy.sample
import comfy.samplers
import torch

import t2i_spo_plugin.sticker as sticker
from t2i_spo_plugin import read_adapter
from t2i_spo_plugin.comfy_nodes.patching import Stack
from t2i_spo_plugin.comfy_nodes.steering import steer
from t2i_spo_plugin.gating import FULL_WINDOW, AdapterGate, norm_score


SPO = "sticker demo: spo (bundled)"
HARMFUL = sticker.prompt_rows("harmful", 1)[0].prompt
BENIGN = sticker.prompt_rows("benign", 1)[0].prompt
STEPS = 5
LOOK = 0.04
"""One step of 25, and of the five drawn here."""


def hooked(model: Any) -> list[torch.nn.Module]:
    return [module for module in model.model.modules() if module._forward_hooks or module._forward_pre_hooks]


def encode(clip: Any, prompts: Iterable[str]) -> torch.Tensor:
    return torch.cat([clip.encode_from_tokens(clip.tokenize(prompt)) for prompt in prompts])


def start_noise(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(5))


def spo_stack(strength: float = 1.0) -> Stack:
    return [(read_adapter(sticker.adapter_path("spo")), strength)]


def sample(
    model: Any,
    clip: Any,
    prompts: Sequence[str],
    cfg: float = sticker.GUIDANCE,
    callback: Callable[[int], None] | None = None,
    steps: Iterable[int] = range(999, 0, -1000 // STEPS),
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Latents after Euler steps, which are DDIM without noise, and what every step denoised to; as diffusers steps.

    One prompt may be for several rows of `noise`.
    """
    sampling = model.get_model_object("model_sampling")
    sigmas = torch.cat([sampling.sigma(torch.tensor(list(steps))), torch.zeros(1)])
    noise = start_noise(len(prompts)) if noise is None else noise
    seen = []

    def note(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        seen.append(denoised.clone())
        if callback is not None:
            callback(step)

    latents = comfy.sample.sample_custom(
        model,
        noise,
        cfg,
        comfy.samplers.sampler_object("euler"),
        sigmas,
        [[encode(clip, prompts), {}]],
        [[encode(clip, [""] * len(prompts)), {}]],
        torch.zeros_like(noise),
        callback=note,
        disable_pbar=True,
        seed=0,
    )
    return latents, seen


def text_to_image(model: Any, clip: Any, vae: Any, size: int = 64) -> dict[str, Any]:
    """The stock nodes behind a loader, four steps; node 14 gives the images."""
    settings = {"seed": 1, "steps": 4, "cfg": 3.0, "sampler_name": "euler", "scheduler": "sgm_uniform", "denoise": 1.0}
    links = {"model": model, "positive": ["10", 0], "negative": ["11", 0], "latent_image": ["12", 0]}
    return {
        "10": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": HARMFUL}},
        "11": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": ""}},
        "12": {"class_type": "EmptyLatentImage", "inputs": {"width": size, "height": size, "batch_size": 2}},
        "13": {"class_type": "KSampler", "inputs": links | settings},
        "14": {"class_type": "VAEDecode", "inputs": {"samples": ["13", 0], "vae": vae}},
    }


class RecordedNorms:
    """Stands where a gate network stands: scores the norm of the change, and records it."""

    def __init__(self) -> None:
        self.norms: list[torch.Tensor] = []

    def score(self, without: torch.Tensor, with_adapter: torch.Tensor) -> torch.Tensor:
        self.norms.append(norm_score(without, with_adapter))
        return self.norms[-1]


def norms(model: Any, stack: Stack, draw: Callable[[Any], Any]) -> torch.Tensor:
    """The norm of the change of each row of the first call of the model in `draw`, before anything is steered."""
    recorded = RecordedNorms()
    draw(steer(model, stack, FULL_WINDOW, AdapterGate(1e6, LOOK, recorded))[0])
    return recorded.norms[1]  # The first is of the check before the run.
