"""Flow-Factory's interface for rewards, as its `rewards/abc.py` and `hparams` state it, without its trainers."""

from __future__ import annotations

import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class RewardModelOutput:
    rewards: Any
    extra_info: dict[str, Any] | None = None


class PointwiseRewardModel(ABC):
    required_fields: tuple[str, ...] = ("image", "prompt")
    use_tensor_inputs: bool = False

    def __init__(self, config: Any, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.config = config
        self.device = accelerator.device if config.device == torch.device("cuda") else config.device
        self.dtype = config.dtype
        self.model = None

    @abstractmethod
    def __call__(
        self,
        prompt: list[str],
        image: list[Any] | None = None,
        video: Any = None,
        audio: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
        **kwargs: Any,
    ) -> RewardModelOutput: ...


class Arguments:
    """As `RewardArguments`: what it does not know becomes an attribute."""

    def __init__(self, **given: Any) -> None:
        self.device, self.dtype, self.batch_size = torch.device("cpu"), torch.float32, 16
        for name, value in given.items():
            setattr(self, name, value)


def install(monkeypatch: Any) -> None:
    """Make `flow_factory.rewards.abc` importable."""
    names = ("flow_factory", "flow_factory.rewards", "flow_factory.rewards.abc")
    modules = [types.ModuleType(name) for name in names]
    modules[0].rewards, modules[1].abc = modules[1], modules[2]  # type: ignore[attr-defined]
    modules[2].PointwiseRewardModel = PointwiseRewardModel  # type: ignore[attr-defined]
    modules[2].RewardModelOutput = RewardModelOutput  # type: ignore[attr-defined]
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "t2i_spo_plugin.serving.flow_factory", raising=False)
