"""Rewards for Flow-Factory: name a class of this module as `reward_model`, and the judges beside it.

rewards:
  - name: safety
    reward_model: t2i_spo_plugin.serving.flow_factory.CompositeReward
    cost_model: open_nsfw
    quality_model: path/to/rewards.json
    lambda: 1.0
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from t2i_spo_plugin.errors import ConfigError, MissingExtraError

from .scoring import Scorer, composite_reward, load_scorer


try:
    from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput
except ModuleNotFoundError as error:
    raise MissingExtraError(
        "Flow-Factory is not installed; it comes from its repository (X-GenGroup/Flow-Factory), see its README"
    ) from error


class _Reward(PointwiseRewardModel):
    """What the three have in common.

    Options beside `reward_model` in Flow-Factory's configuration: `cost_model`, `policy`, `quality_model`, `domain`,
    `override_domain` and `lambda`, as for `spo serve`. A sample's metadata may hold `safe_prompts`, a list, if its
    prompt is harmful, or `kind: harmful` where no safe prompt is known.

    A sample that could not be scored gets the worst reward, and is counted in `extra_info`.
    """

    required_fields = ("image", "prompt")
    use_tensor_inputs = False
    _judges: tuple[str, ...] = ()

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        options = {name: _option(config, name) for name in ("cost_model", "policy", "quality_model", "domain")}
        missing = [name for name in self._judges if not options[name]]
        if missing:
            raise ConfigError(f"{type(self).__name__} needs {' and '.join(missing)} in its configuration")
        self.lambda_ = float(_option(config, "lambda", _option(config, "lambda_", 1.0)))
        self.scorer: Scorer = load_scorer(
            options["cost_model"] or "",
            options["policy"],
            (options["quality_model"] or "") if "quality_model" in self._judges else "",
            domain=options["domain"],
            override_domain=bool(_option(config, "override_domain", False)),
        )
        if self.scorer.guard is not None:
            self.scorer.guard.cost_model.to(self.device)

    def value(self, entry: Mapping[str, Any]) -> float:
        """The reward of one sample, from what the scorer says of it."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, prompt: Sequence[str], image: Sequence[Any] | None = None, **fields: Any) -> RewardModelOutput:
        """Rewards `[B]` of B images and prompts; each depends on its own alone."""
        if image is None:
            raise ConfigError(f"{type(self).__name__} judges images, and this sample has none")
        safe = [_safe_prompts(one) for one in _metadata(fields.get("metadata"), len(prompt))]
        entries = self.scorer(list(image), list(prompt), safe)
        rewards = torch.tensor([self.value(entry) for entry in entries], device=self.device)
        return RewardModelOutput(
            rewards=rewards,
            extra_info={
                "cost": [entry.get("cost") for entry in entries],
                "quality": [entry.get("quality") for entry in entries],
                "not_scored": sum(entry["not_scored"] is not None for entry in entries),
            },
        )


class CostReward(_Reward):
    """`-C`, from -1 (unsafe, or not scored) to 0."""

    _judges = ("cost_model",)

    def value(self, entry: Mapping[str, Any]) -> float:
        """See the class."""
        return -1.0 if entry["cost"] is None else -float(entry["cost"])


class QualityReward(_Reward):
    """`q` in [0, 1], for a harmful prompt that of its safe completions; 0 where it was not scored."""

    _judges = ("cost_model", "quality_model")

    def value(self, entry: Mapping[str, Any]) -> float:
        """See the class."""
        return float(entry["quality"] or 0.0)


class CompositeReward(_Reward):
    """`q - lambda C`; `-lambda` where it was not scored."""

    _judges = ("cost_model", "quality_model")

    def value(self, entry: Mapping[str, Any]) -> float:
        """See the class."""
        return composite_reward(entry, self.lambda_)


def _option(config: Any, name: str, otherwise: Any = None) -> Any:
    """Flow-Factory keeps options that it does not know as attributes, or in a mapping beside its own."""
    extra = getattr(config, "reward_model_kwargs", None) or getattr(config, "extra_kwargs", None) or {}
    value = getattr(config, name, None)
    return value if value is not None else extra.get(name, otherwise)


def _metadata(given: Any, count: int) -> list[Mapping[str, Any]]:
    """A mapping a sample: it comes as JSON, one text a sample or one for all."""
    values = list(given) if isinstance(given, (list, tuple)) else [given] * count
    read = [json.loads(value) if isinstance(value, str) and value else value for value in values]
    return [value if isinstance(value, Mapping) else {} for value in read]


def _safe_prompts(metadata: Mapping[str, Any]) -> Sequence[str] | None:
    safe = metadata.get("safe_prompts") or metadata.get("safe_prompt")
    if isinstance(safe, str):
        return [safe]
    if safe:
        return [str(one) for one in safe]
    return [] if metadata.get("kind") == "harmful" else None
