"""What differs between model families when one is trained: the protocol, and parts that several families share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..noise_schedule import NoiseSchedule
from ..sampling import uniform_index


Conditioning = dict[str, Tensor]
"""What a prompt becomes and what is cached of it, by name, `[B, ...]`: `text [B, L, D]` in every family, and
`mask [B, L]` where prompts have lengths of their own, false where there is no text."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Names that the projections of attention end with in diffusers' denoisers: the usual targets of a LoRA."""
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The same of denoisers in which image and text have projections of their own."""


@dataclass(frozen=True)
class LatentScale:
    """How the autoencoder's latents become what the denoiser sees: `(latents - shift) * scale`."""

    shift: float = 0.0
    scale: float = 1.0

    @classmethod
    def of(cls, vae: Any) -> LatentScale:
        """As the autoencoder's configuration states it."""
        shift = getattr(vae.config, "shift_factor", None)
        scale = getattr(vae.config, "scaling_factor", None)
        return cls(shift or 0.0, 1.0 if scale is None else scale)

    def __call__(self, latents: Tensor) -> Tensor:
        return (latents - self.shift) * self.scale

    def inverse(self, latents: Tensor) -> Tensor:
        """Back to the autoencoder's own latents."""
        return latents / self.scale + self.shift


class Scale(Protocol):
    """How the autoencoder's latents become what the denoiser sees, and back."""

    def __call__(self, latents: Tensor) -> Tensor:
        """`[B, C, h, w]` as the denoiser sees it."""

    def inverse(self, latents: Tensor) -> Tensor:
        """Back to the autoencoder's own latents."""


class Common:
    """What most families share; a family overrides what differs."""

    scaled: Scale
    patch: ClassVar[int] = 1

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """See `Family`."""
        return decoded(vae, self.scaled.inverse(latents))

    def mirrored(self, latents: Tensor) -> Tensor:
        """See `Family`."""
        return latents.flip(-1)

    def sample_index(self, low: int, high: int, generator: torch.Generator) -> int:
        """See `Family`; each index equally often."""
        return uniform_index(low, high, generator)


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` in [0, 1] of an autoencoder's own latents, with gradients; what is outside is cut."""
    latents = latents.to(next(vae.parameters()).dtype)
    if is_temporal(vae):
        pixels = vae.decode(latents.unsqueeze(2), return_dict=False)[0].squeeze(2)
    else:
        pixels = vae.decode(latents, return_dict=False)[0]
    return (pixels.float() / 2.0 + 0.5).clamp(0.0, 1.0)


def is_temporal(vae: Any) -> bool:
    """Whether an autoencoder is one of videos, for which an image is `[B, 3, 1, H, W]`."""
    return getattr(vae.config, "temperal_downsample", None) is not None


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Texts `[L, ...]` of several lengths as `[B, longest, ...]`, zeros (false in a mask) behind the shorter ones."""
    if len({part.shape for part in parts}) == 1:
        return torch.stack(list(parts))
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Batches `[B, L, ...]` of texts of several lengths as one; see `padded`."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    return padded([row for part in parts for row in part])


def trimmed(text: Conditioning) -> tuple[Tensor, Tensor]:
    """`text` and its mask without the columns in which no prompt of the batch has any."""
    mask = text["mask"].bool()
    length = int(mask.sum(1).max())
    return text["text"][:, :length], mask[:, :length]


def packed(latents: Tensor) -> Tensor:
    """`[B, C, h, w]` -> `[B, h / 2 * w / 2, 4 C]`: squares of 2 x 2 as one token, as in FLUX.1 and Qwen-Image."""
    batch, channels, height, width = latents.shape
    squares = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(batch, height // 2 * width // 2, channels * 4)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Back to `[B, C, height, width]`."""
    batch, _, channels = tokens.shape
    squares = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(batch, channels // 4, height, width)


def grid(height: int, width: int, device: torch.device) -> Tensor:
    """Places of image tokens `[height * width, 3]`, as FLUX.1 numbers them: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3).float().to(device)


class Family(Protocol):
    """A denoiser and how its family is trained. One file a family, one row in `FAMILIES`."""

    @property
    def name(self) -> str:
        """As in the table."""

    @property
    def component(self) -> str:
        """The denoiser's name in the pipeline: `unet` or `transformer`."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names that the modules with a LoRA end with, unless the configuration states others."""

    @property
    def module(self) -> nn.Module:
        """The denoiser."""

    @property
    def schedule(self) -> NoiseSchedule:
        """Noise levels, the timestep that the denoiser is given at each, and the target with its sign."""

    @classmethod
    def of(cls, pipe: Any) -> Family | None:
        """The family with the denoiser of `pipe`, or None if the pipeline is of another family."""

    @property
    def patch(self) -> int:
        """Edge, in latents, of the squares that are one token: a resolution must be divisible by it."""

    def scaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's latents as the denoiser sees them (shift, scale, patches)."""

    def mirrored(self, latents: Tensor) -> Tensor:
        """What is of the shape of latents as the denoiser sees them, mirrored left to right."""

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] of latents as the denoiser sees them, with gradients."""

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """What `encode_prompts` runs; not needed once the text is cached."""

    def encode_prompts(self, pipe: Any, prompts: list[str], device: torch.device | str) -> Conditioning:
        """Text embeddings as the pipeline itself makes them: what is cached."""

    def sample_index(self, low: int, high: int, generator: torch.Generator) -> int:
        """An index into `schedule` from [low, high), by the distribution that the family is trained with."""

    def predict(self, module: nn.Module, noisy: Tensor, index: Tensor, text: Conditioning, resolution: int) -> Tensor:
        """Prediction `[B, C, h, w]` in the sign of `schedule.target`.

        Args:
            module: the denoiser, or a wrapper of it (data-parallel, compiled).
            noisy: `[B, C, h, w]`.
            index: `[B]`, into `schedule`.
            text: as `encode_prompts` gives it.
            resolution: edge of the image in pixels.
        """


def present(pipe: Any, *names: str) -> list[nn.Module]:
    """The components of `pipe` with these names, in order, without those that it lacks."""
    return [module for name in names if (module := getattr(pipe, name, None)) is not None]
