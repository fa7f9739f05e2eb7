"""Safety adapters for text-to-image models: load them, draw, and see how unsafe a picture is and where.

Every public name is imported when it is first used, so that `import t2i_spo_plugin` itself loads neither torch nor
diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .adapter import AdapterFacts as AdapterFacts
    from .adapter import LoraPair as LoraPair
    from .adapter import read_adapter as read_adapter
    from .adapter import write_adapter as write_adapter
    from .architecture import architecture_of as architecture_of
    from .change_reader import load_closed_loop as load_closed_loop
    from .change_reader import save_closed_loop as save_closed_loop
    from .composition import AdapterLoad as AdapterLoad
    from .composition import Composition as Composition
    from .composition import adapter_load as adapter_load
    from .composition import compose as compose
    from .convert import convert_adapter as convert_adapter
    from .cost.base import CostBatch as CostBatch
    from .cost.base import CostModel as CostModel
    from .cost.clip_head import ClipCostModel as ClipCostModel
    from .cost.clip_head import clip_cost_model as clip_cost_model
    from .cost.clip_head import clip_tower as clip_tower
    from .cost.models import load_cost_model as load_cost_model
    from .errors import AdapterError as AdapterError
    from .errors import ConfigError as ConfigError
    from .errors import DomainError as DomainError
    from .errors import HubError as HubError
    from .errors import ImageError as ImageError
    from .errors import IncompatibleAdapterError as IncompatibleAdapterError
    from .errors import InvalidAdapterError as InvalidAdapterError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import NotScoredError as NotScoredError
    from .errors import PipelineError as PipelineError
    from .errors import PolicyError as PolicyError
    from .errors import SPOError as SPOError
    from .errors import TableError as TableError
    from .errors import UnreadableAdapterError as UnreadableAdapterError
    from .errors import UnsupportedAdapterError as UnsupportedAdapterError
    from .extract import extract_adapter as extract_adapter
    from .guard import Guard as Guard
    from .guard import SafetyReport as SafetyReport
    from .guard import pipeline_domain as pipeline_domain
    from .hub import Published as Published
    from .hub import publish_adapter as publish_adapter
    from .loading import LoadedAdapter as LoadedAdapter
    from .loading import adapter_facts as adapter_facts
    from .loading import adapter_of as adapter_of
    from .loading import load_spo_lora as load_spo_lora
    from .loading import set_spo_strength as set_spo_strength
    from .loading import spo_adapters as spo_adapters
    from .loading import unload_spo_lora as unload_spo_lora
    from .merge import merge_adapters as merge_adapters
    from .mixin import SPOLoraLoaderMixin as SPOLoraLoaderMixin
    from .mixin import enable_spo as enable_spo
    from .mixin import spo_pipeline_class as spo_pipeline_class
    from .policy import Category as Category
    from .policy import Policy as Policy
    from .policy import load_policy as load_policy
    from .quality.base import QualityReward as QualityReward
    from .safety_checker import SPOSafetyChecker as SPOSafetyChecker
    from .steering import LoopReport as LoopReport
    from .trajectory import ClosedLoop as ClosedLoop
    from .trajectory import Schedule as Schedule

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "AdapterError": "errors",
    "AdapterFacts": "adapter",
    "AdapterLoad": "composition",
    "Category": "policy",
    "ClipCostModel": "cost.clip_head",
    "ClosedLoop": "trajectory",
    "Composition": "composition",
    "ConfigError": "errors",
    "CostBatch": "cost.base",
    "CostModel": "cost.base",
    "DomainError": "errors",
    "Guard": "guard",
    "HubError": "errors",
    "ImageError": "errors",
    "IncompatibleAdapterError": "errors",
    "InvalidAdapterError": "errors",
    "LoadedAdapter": "loading",
    "LoopReport": "steering",
    "LoraPair": "adapter",
    "MissingExtraError": "errors",
    "NotScoredError": "errors",
    "PipelineError": "errors",
    "Policy": "policy",
    "PolicyError": "errors",
    "Published": "hub",
    "QualityReward": "quality.base",
    "SPOError": "errors",
    "SPOLoraLoaderMixin": "mixin",
    "SPOSafetyChecker": "safety_checker",
    "SafetyReport": "guard",
    "Schedule": "trajectory",
    "TableError": "errors",
    "UnreadableAdapterError": "errors",
    "UnsupportedAdapterError": "errors",
    "adapter_facts": "loading",
    "adapter_load": "composition",
    "adapter_of": "loading",
    "architecture_of": "architecture",
    "clip_cost_model": "cost.clip_head",
    "clip_tower": "cost.clip_head",
    "compose": "composition",
    "convert_adapter": "convert",
    "enable_spo": "mixin",
    "extract_adapter": "extract",
    "load_closed_loop": "change_reader",
    "load_cost_model": "cost.models",
    "load_policy": "policy",
    "load_spo_lora": "loading",
    "merge_adapters": "merge",
    "pipeline_domain": "guard",
    "publish_adapter": "hub",
    "read_adapter": "adapter",
    "save_closed_loop": "change_reader",
    "set_spo_strength": "loading",
    "spo_adapters": "loading",
    "spo_pipeline_class": "mixin",
    "unload_spo_lora": "loading",
    "write_adapter": "adapter",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
