"""Safety adapters for text-to-image models: load them, generate, and see how unsafe an image is and where.

Every public name is imported when it is first used, so that `import t2i_spo_plugin` itself loads neither torch nor
diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_names
from ._version import __version__ as __version__


if TYPE_CHECKING:
    from .adapters.adapter import Adapter as Adapter
    from .adapters.convert import convert_adapter as convert_adapter
    from .adapters.extract import extract_adapter as extract_adapter
    from .adapters.io import read_adapter as read_adapter
    from .adapters.io import write_adapter as write_adapter
    from .adapters.lora import LoraPair as LoraPair
    from .adapters.merging import merge_adapters as merge_adapters
    from .adapters.metadata import AdapterMetadata as AdapterMetadata
    from .cost.base import CostBatch as CostBatch
    from .cost.base import CostModel as CostModel
    from .cost.clip import ClipCostModel as ClipCostModel
    from .cost.clip import clip_cost_model as clip_cost_model
    from .errors import AdapterError as AdapterError
    from .errors import ConfigError as ConfigError
    from .errors import DomainError as DomainError
    from .errors import HubError as HubError
    from .errors import ImageError as ImageError
    from .errors import IncompatibleAdapterError as IncompatibleAdapterError
    from .errors import InvalidAdapterError as InvalidAdapterError
    from .errors import MissingExtraError as MissingExtraError
    from .errors import NoMapError as NoMapError
    from .errors import NoPairsError as NoPairsError
    from .errors import NotScoredError as NotScoredError
    from .errors import PipelineError as PipelineError
    from .errors import PolicyError as PolicyError
    from .errors import SPOError as SPOError
    from .errors import TableError as TableError
    from .errors import UnreadableAdapterError as UnreadableAdapterError
    from .errors import UnreadableFileError as UnreadableFileError
    from .errors import UnsupportedAdapterError as UnsupportedAdapterError
    from .gating.gate import AdapterGate as AdapterGate
    from .gating.gate import GateReport as GateReport
    from .gating.gate_file import save_adapter_gate as save_adapter_gate
    from .gating.schedule import Schedule as Schedule
    from .guards.guard import Guard as Guard
    from .guards.policy import Category as Category
    from .guards.policy import Policy as Policy
    from .guards.report import SafetyReport as SafetyReport
    from .hub.card_info import ModelCardInfo as ModelCardInfo
    from .hub.publish import Published as Published
    from .hub.publish import publish_adapter as publish_adapter
    from .networks.clip import clip_tower as clip_tower
    from .pipelines.architecture import architecture_of as architecture_of
    from .pipelines.composition import CombinedStrength as CombinedStrength
    from .pipelines.composition import Composition as Composition
    from .pipelines.composition import combined_strength as combined_strength
    from .pipelines.composition import compose as compose
    from .pipelines.domain import pipeline_domain as pipeline_domain
    from .pipelines.loaded import LoadedAdapter as LoadedAdapter
    from .pipelines.loading import adapter_metadata as adapter_metadata
    from .pipelines.loading import adapter_of as adapter_of
    from .pipelines.loading import load_spo_lora as load_spo_lora
    from .pipelines.loading import set_spo_strength as set_spo_strength
    from .pipelines.loading import spo_adapters as spo_adapters
    from .pipelines.loading import unload_spo_lora as unload_spo_lora
    from .pipelines.mixin import SPOLoraLoaderMixin as SPOLoraLoaderMixin
    from .pipelines.mixin import enable_spo as enable_spo
    from .pipelines.mixin import spo_pipeline_class as spo_pipeline_class
    from .pipelines.modular import SPOGuardBlock as SPOGuardBlock
    from .pipelines.safety_checker import SPOSafetyChecker as SPOSafetyChecker
    from .quality.base import QualityReward as QualityReward
    from .registry.loading import load_adapter_gate as load_adapter_gate
    from .registry.loading import load_cost_model as load_cost_model
    from .registry.loading import load_policy as load_policy

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Adapter": "adapters.adapter",
        "AdapterError": "errors",
        "AdapterGate": "gating.gate",
        "AdapterMetadata": "adapters.metadata",
        "Category": "guards.policy",
        "ClipCostModel": "cost.clip",
        "CombinedStrength": "pipelines.composition",
        "Composition": "pipelines.composition",
        "ConfigError": "errors",
        "CostBatch": "cost.base",
        "CostModel": "cost.base",
        "DomainError": "errors",
        "GateReport": "gating.gate",
        "Guard": "guards.guard",
        "HubError": "errors",
        "ImageError": "errors",
        "IncompatibleAdapterError": "errors",
        "InvalidAdapterError": "errors",
        "LoadedAdapter": "pipelines.loaded",
        "LoraPair": "adapters.lora",
        "MissingExtraError": "errors",
        "ModelCardInfo": "hub.card_info",
        "NoMapError": "errors",
        "NoPairsError": "errors",
        "NotScoredError": "errors",
        "PipelineError": "errors",
        "Policy": "guards.policy",
        "PolicyError": "errors",
        "Published": "hub.publish",
        "QualityReward": "quality.base",
        "SPOError": "errors",
        "SPOGuardBlock": "pipelines.modular",
        "SPOLoraLoaderMixin": "pipelines.mixin",
        "SPOSafetyChecker": "pipelines.safety_checker",
        "SafetyReport": "guards.report",
        "Schedule": "gating.schedule",
        "TableError": "errors",
        "UnreadableAdapterError": "errors",
        "UnreadableFileError": "errors",
        "UnsupportedAdapterError": "errors",
        "adapter_metadata": "pipelines.loading",
        "adapter_of": "pipelines.loading",
        "architecture_of": "pipelines.architecture",
        "clip_cost_model": "cost.clip",
        "clip_tower": "networks.clip",
        "combined_strength": "pipelines.composition",
        "compose": "pipelines.composition",
        "convert_adapter": "adapters.convert",
        "enable_spo": "pipelines.mixin",
        "extract_adapter": "adapters.extract",
        "load_adapter_gate": "registry.loading",
        "load_cost_model": "registry.loading",
        "load_policy": "registry.loading",
        "load_spo_lora": "pipelines.loading",
        "merge_adapters": "adapters.merging",
        "pipeline_domain": "pipelines.domain",
        "publish_adapter": "hub.publish",
        "read_adapter": "adapters.io",
        "save_adapter_gate": "gating.gate_file",
        "set_spo_strength": "pipelines.loading",
        "spo_adapters": "pipelines.loading",
        "spo_pipeline_class": "pipelines.mixin",
        "unload_spo_lora": "pipelines.loading",
        "write_adapter": "adapters.io",
    },
)
