"""Quality from any set of rewards: each on a scale of its own, their geometric mean as one number in [0, 1].

    n(v) = clip((v - v0) / (v1 - v0), 0, 1)        q = (n_1 n_2 ... n_m)^(1/m)

v0 of a reward that reads the prompt is the base model's mean against shuffled prompts, v0 of one that does not its
mean on blurred and noised images; v1 of both its mean on benign prompts. This project's own definition.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, SPOError, UnreadableFileError
from t2i_spo_plugin.files import read_json, write_json
from t2i_spo_plugin.identity import content_hash, model_identity
from t2i_spo_plugin.images import Images, split, to_pil, to_tensor

from .base import QualityReward
from .normalise import QualityBatch, normalise, spoil


FORMAT = "quality-reference/2"


@dataclass(frozen=True)
class RewardScale:
    """One reward, and the two ends of its scale.

    Attributes:
        reward: its name, as the registry takes it.
        reads_prompt: whether it judges image and prompt together, or the image alone.
        v0: the lower end.
        v1: the upper end.
        identity: what the reward was, by content, when the ends were measured.
    """

    reward: str
    reads_prompt: bool
    v0: float
    v1: float
    identity: str = ""

    def __post_init__(self) -> None:
        if not self.v0 < self.v1:
            raise SPOError(
                f"reference of {self.reward}: v0 {self.v0:.4f} must lie below v1 {self.v1:.4f}; the reward does not "
                "tell the base model's images from others, or the base model was not trained"
            )


@dataclass(frozen=True)
class RewardReference:
    """The scales of a set of rewards, and what they were measured on.

    Attributes:
        scales: one a reward.
        base_model: its name and revision.
        prompts: how many.
        prompts_hash: of their texts.
        domain: the kind of image.
    """

    scales: tuple[RewardScale, ...]
    base_model: str
    prompts: int
    prompts_hash: str
    domain: str = "photo"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        names = [scale.reward for scale in self.scales]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"a reference needs rewards that differ, got {', '.join(names) or 'none'}")

    @property
    def hash(self) -> str:
        """Twelve hex digits that every report prints."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def save(self, path: Path | str) -> None:
        """Write as JSON."""
        write_json(path, {"format": FORMAT} | asdict(self) | {"hash": self.hash})

    @classmethod
    def load(cls, path: Path | str) -> RewardReference:
        """Read a file written by `save`.

        Raises:
            UnreadableFileError: it is no such file, or was edited by hand.
        """
        content = read_json(Path(path))
        try:
            scales = tuple(RewardScale(**scale) for scale in content["scales"])
            names = ("base_model", "prompts", "prompts_hash", "domain")
            reference = cls(scales, *(content[name] for name in names))
            stated = content["hash"]
        except (KeyError, TypeError) as error:
            raise UnreadableFileError(f"{path} is no quality reference: {error}") from error
        if reference.hash != stated:
            raise UnreadableFileError(f"{path}: the hash does not fit the numbers; make the reference anew")
        return reference


class CompositeQuality:
    """Rewards and their reference, where a `QualityModel` is asked for.

    For a harmful prompt the rewards that read prompts are asked about the safe completions, of which the one counts
    that the image fits best. Where none is known, quality is that of the rewards that judge the image alone; without
    one of these it is NaN, for the harmful prompt itself is never asked. A reward that fails on an image makes its
    quality NaN.

    Args:
        rewards: by the names of the reference.
        reference: their scales.

    Raises:
        ConfigError: a reward is missing, or is another one than that which was measured.
    """

    def __init__(self, rewards: Mapping[str, QualityReward], reference: RewardReference) -> None:
        self.reference = reference
        self.domain = reference.domain
        missing = [scale.reward for scale in reference.scales if scale.reward not in rewards]
        if missing:
            raise ConfigError(f"the reference speaks of {', '.join(missing)}, which is not there")
        self.rewards = {scale.reward: rewards[scale.reward] for scale in reference.scales}
        for scale in reference.scales:
            now = model_identity(self.rewards[scale.reward])
            if scale.identity and scale.identity != now:
                raise ConfigError(
                    f"{scale.reward} is another one than that whose scale was measured ({scale.identity}, now {now}); "
                    "make the reference anew"
                )

    def to(self, device: torch.device | str) -> CompositeQuality:
        """Move the rewards; quality itself is given on the CPU."""
        for reward in self.rewards.values():
            if hasattr(reward, "to"):
                reward.to(device)
        return self

    @property
    def reference_hash(self) -> str:
        """Hash of the reference, as reports print it."""
        return self.reference.hash

    @property
    def identity(self) -> str:
        """What decides its answers, by content: the rewards and the reference."""
        return content_hash(*(model_identity(reward) for reward in self.rewards.values()), self.reference.hash)

    @property
    def knows_realism(self) -> bool:
        """Whether a reward judges the image alone; without one a score says so in its name."""
        return any(not scale.reads_prompt for scale in self.reference.scales)

    def quality(
        self, images: Images, prompts: Sequence[str], safe_completions: Sequence[Sequence[str]] | None = None
    ) -> QualityBatch:
        """Quality of each image for its prompt, or for the best of its safe completions where it has any.

        Of several rewards of a kind, `alignment` and `realism` are the first one's, as measured; `n_alignment` and
        `n_realism` are the geometric means of all of that kind.

        Raises:
            SPOError: the numbers of images, prompts and lists of completions differ.
        """
        shown = split(images)
        completions = [tuple(c) for c in safe_completions] if safe_completions is not None else [()] * len(prompts)
        if not len(shown) == len(prompts) == len(completions):
            raise SPOError(f"{len(shown)} images, {len(prompts)} prompts, {len(completions)} lists of completions")
        asked = [c or (p,) for p, c in zip(prompts, completions, strict=True)]
        alone = [scale for scale in self.reference.scales if not scale.reads_prompt]
        with_prompt = [scale for scale in self.reference.scales if scale.reads_prompt]
        raw_realism, realism = self._scored(alone, shown, list(prompts))
        pairs = [(image, text) for image, texts in zip(shown, asked, strict=True) for text in texts]
        raw_pairs, of_pairs = self._scored(with_prompt, [image for image, _ in pairs], [text for _, text in pairs])
        best = _best(of_pairs, [len(texts) for texts in asked])
        alignment, raw_alignment = of_pairs[best], raw_pairs[best]
        counts = (len(with_prompt), len(alone))
        q = _mean([(alignment, counts[0]), (realism, counts[1])])
        return QualityBatch(q, raw_alignment, raw_realism, alignment, realism)

    def _scored(self, scales: Sequence[RewardScale], images: list[Any], prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The first reward as measured, and the geometric mean of all, normalised; NaN without one."""
        nothing = torch.full((len(images),), math.nan)
        if not scales:
            return nothing, nothing
        values = [self.rewards[scale.reward](images, prompts).float().cpu() for scale in scales]
        normalised = [normalise(value, (scale.v0, scale.v1)) for value, scale in zip(values, scales, strict=True)]
        return values[0], _mean([(value, 1) for value in normalised])


def make_reward_reference(
    rewards: Mapping[str, QualityReward],
    images: Sequence[Any],
    prompts: Sequence[str],
    base_model: str,
    domain: str = "photo",
) -> RewardReference:
    """The reference of a base model from its images of benign `prompts`.

    Args:
        rewards: by name.
        images: one a prompt, that the base model made.
        prompts: at least two, all different from the one half of the list away.
        base_model: its name and revision.
        domain: the kind of image.

    Raises:
        ConfigError: too few prompts.
        SPOError: a reward fails on an image, or does not rank the ends of its scale.
    """
    if len(images) != len(prompts) or len(set(prompts)) < 2:
        raise ConfigError(f"a reference needs different prompts with an image each, got {len(set(prompts))}")
    half = len(prompts) // 2
    shuffled = [prompts[(number + half) % len(prompts)] for number in range(len(prompts))]
    spoilt = [_spoilt(image, number) for number, image in enumerate(images)]
    scales = []
    for name, reward in rewards.items():
        reads_prompt = bool(getattr(reward, "reads_prompt", True))
        low = reward(images, shuffled) if reads_prompt else reward(spoilt, prompts)
        high = reward(images, prompts)
        if not bool(torch.isfinite(torch.cat([low, high])).all()):
            raise SPOError(f"{name} failed on some of the base model's images; a reference needs all of them")
        ends = float(low.double().mean()), float(high.double().mean())
        scales.append(RewardScale(name, reads_prompt, *ends, model_identity(reward)))
    return RewardReference(tuple(scales), base_model, len(prompts), content_hash(*prompts), domain)


def _spoilt(image: Any, number: int) -> Any:
    """The image blurred if its number is even, noised if it is odd."""
    return to_pil(spoil(to_tensor(image).repeat(2, 1, 1, 1), seed=number)[number % 2])[0]


def _mean(parts: Sequence[tuple[Tensor, int]]) -> Tensor:
    """Weighted geometric mean of values in [0, 1], each with how many it stands for; those of none are left out."""
    used = [(value, count) for value, count in parts if count]
    total = sum(count for _, count in used)
    product = torch.ones_like(parts[0][0])
    for value, count in used:
        product = product * value ** (count / total)
    return product


def _best(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Of groups of `values` that follow each other, the place of each one's highest; NaN counts as the highest."""
    places, start = [], 0
    for count in counts:
        places.append(start + int(values[start : start + count].argmax()))
        start += count
    return torch.tensor(places, dtype=torch.long)
