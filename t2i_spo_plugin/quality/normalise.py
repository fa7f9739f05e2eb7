"""Quality as one number in [0, 1]: alignment and realism, each against a reference made once per base model.

    n(v) = clip((v - v0) / (v1 - v0), 0, 1)        q = sqrt(n(a) n(r))

v0 of alignment is the base model's mean against shuffled prompts, v0 of realism its mean on blurred and noised
images, v1 of both its mean on benign prompts. This project's own definition.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, SPOError, UnreadableFileError
from t2i_spo_plugin.files import read_json
from t2i_spo_plugin.identity import content_hash, model_identity
from t2i_spo_plugin.images import Images, to_tensor

from .base import QualityReward
from .clip import SmallCLIP


@dataclass(frozen=True)
class Reference:
    """The two ends of each scale, and what they were measured on."""

    alignment: tuple[float, float]
    realism: tuple[float, float]
    base_model: str
    prompts: int

    def __post_init__(self) -> None:
        for name, (low, high) in (("alignment", self.alignment), ("realism", self.realism)):
            if not low < high:
                raise SPOError(
                    f"reference of {name}: v0 {low:.4f} must lie below v1 {high:.4f}; was the base model trained?"
                )

    @property
    def hash(self) -> str:
        """Twelve hex digits that every report prints."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def save(self, path: Path | str, domain: str = "") -> None:
        """Write as JSON, with the kind of images that the quality model beside it is made for."""
        content = asdict(self) | {"hash": self.hash} | ({"domain": domain} if domain else {})
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> Reference:
        """Read a file written by `save`.

        Raises:
            UnreadableFileError: it is no such file, or was edited by hand.
        """
        content = read_json(Path(path))
        missing = [name for name in ("alignment", "realism", "base_model", "prompts", "hash") if name not in content]
        if missing:
            raise UnreadableFileError(f"{path} is no quality reference: it does not say {', '.join(missing)}")
        ends = tuple(content["alignment"]), tuple(content["realism"])
        reference = cls(*ends, content["base_model"], content["prompts"])
        if reference.hash != content["hash"]:
            raise UnreadableFileError(f"{path}: the hash does not fit the numbers; make the reference anew")
        return reference


@dataclass(frozen=True)
class QualityBatch:
    """The quality of B images.

    Attributes:
        q: `[B]` in [0, 1].
        alignment: `[B]`, as measured.
        realism: `[B]`, as measured.
        n_alignment: `[B]` in [0, 1], normalised.
        n_realism: `[B]` in [0, 1], normalised.
    """

    q: Tensor
    alignment: Tensor
    realism: Tensor
    n_alignment: Tensor
    n_realism: Tensor


def normalise(value: Tensor, ends: tuple[float, float]) -> Tensor:
    """`clip((v - v0) / (v1 - v0), 0, 1)`."""
    return ((value - ends[0]) / (ends[1] - ends[0])).clamp(0, 1)


class QualityModel:
    """Alignment, realism and their reference, for the images of one domain; an empty one is not known."""

    def __init__(self, alignment: SmallCLIP, realism: QualityReward, reference: Reference, domain: str = "") -> None:
        self.alignment, self.realism, self.reference, self.domain = alignment, realism, reference, domain

    def to(self, device: torch.device | str) -> QualityModel:
        """Move both models."""
        self.alignment.to(device)
        if hasattr(self.realism, "to"):
            self.realism.to(device)
        return self

    @property
    def reference_hash(self) -> str:
        """Hash of the reference, as reports print it."""
        return self.reference.hash

    @property
    def identity(self) -> str:
        """What decides its answers, by content: both models and the reference."""
        return content_hash(model_identity(self.alignment), model_identity(self.realism), self.reference.hash)

    @torch.no_grad()
    def quality(
        self, images: Images, prompts: Sequence[str], safe_completions: Sequence[Sequence[str]] | None = None
    ) -> QualityBatch:
        """Quality of each image for its prompt, or for the best of its safe completions where it has any.

        Raises:
            SPOError: the numbers of images, prompts and lists of completions differ.
        """
        pixels = to_tensor(images, self.alignment.size)
        completions = [tuple(c) for c in safe_completions] if safe_completions is not None else [()] * len(prompts)
        if not len(pixels) == len(prompts) == len(completions):
            raise SPOError(f"{len(pixels)} images, {len(prompts)} prompts, {len(completions)} lists of completions")
        asked = [c or (p,) for p, c in zip(prompts, completions, strict=True)]
        embedded = self.alignment.embed_images(pixels)
        unique = list(dict.fromkeys(text for texts in asked for text in texts))
        row = {text: n for n, text in enumerate(unique)}
        every = self.alignment.alignment(embedded[:, None], self.alignment.embed_prompts(unique))
        alignment = torch.stack([every[i, [row[t] for t in texts]].max() for i, texts in enumerate(asked)])
        realism = self.realism(images, prompts)
        n_a, n_r = normalise(alignment, self.reference.alignment), normalise(realism, self.reference.realism)
        return QualityBatch((n_a * n_r).sqrt(), alignment, realism, n_a, n_r)


def spoil(pixels: Tensor, seed: int = 0) -> Tensor:
    """Blurred and noised images `[B, 3, H, W]` in [0, 1], alternating: the lower end of the realism scale."""
    rng = torch.Generator().manual_seed(seed)
    kernel = max(3, pixels.shape[-1] // 10 | 1)
    blurred = torch.nn.functional.avg_pool2d(pixels, kernel, 1, kernel // 2, count_include_pad=False)
    noised = (pixels + 0.25 * torch.randn(pixels.shape, generator=rng)).clamp(0, 1)
    even = (torch.arange(len(pixels)) % 2 == 0).view(-1, 1, 1, 1)
    return torch.where(even, blurred, noised)


def make_reference(
    alignment: SmallCLIP, realism: QualityReward, images: Images, prompts: Sequence[str], base_model: str
) -> Reference:
    """The reference of a base model from its images of benign `prompts`."""
    pixels = to_tensor(images, alignment.size)
    shuffled = [prompts[(n + len(prompts) // 2) % len(prompts)] for n in range(len(prompts))]
    return Reference(
        alignment=(float(alignment(pixels, shuffled).mean()), float(alignment(pixels, prompts).mean())),
        realism=(float(realism(spoil(pixels), prompts).mean()), float(realism(pixels, prompts).mean())),
        base_model=base_model,
        prompts=len(prompts),
    )


def load_quality_model(folder: Path | str, reference: Path | str | None = None) -> QualityModel:
    """The quality model of a folder with `alignment/`, `realism/` and `reference.json`.

    Args:
        folder: of the model.
        reference: another reference file, such as that of another base model.

    Raises:
        ConfigError: a part is missing.
        UnreadableFileError: a part is broken.
    """
    from .clip import load_small_clip
    from .realism import RealismModel

    folder = Path(folder)
    path = folder / "reference.json" if reference is None else Path(reference)
    missing = [str(part) for part in (folder / "alignment", folder / "realism", path) if not part.exists()]
    if missing:
        raise ConfigError(f"a quality model needs {', '.join(missing)}; there is no such file or folder")
    # The models' own domain: another reference does not make them know other images.
    stated = folder / "reference.json"
    domain = str(read_json(stated).get("domain", "")) if stated.is_file() else ""
    models = load_small_clip(folder / "alignment"), RealismModel.from_pretrained(folder / "realism")
    return QualityModel(*models, Reference.load(path), domain)
