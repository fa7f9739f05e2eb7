"""A LoRA as a file and in memory: layouts, metadata, reading, writing, converting, merging. No diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .adapter import Adapter as Adapter
    from .architecture_names import normalise_architecture as normalise_architecture
    from .block_strengths import parse_blocks as parse_blocks
    from .block_strengths import scale_by_block as scale_by_block
    from .comerge import Activity as Activity
    from .comerge import up_norms as up_norms
    from .comfyui import ComfyBase as ComfyBase
    from .comfyui import Fit as Fit
    from .comfyui import bypass_pairs as bypass_pairs
    from .comfyui import describe as describe
    from .comfyui import fit_adapter as fit_adapter
    from .comfyui import lora_tensors as lora_tensors
    from .convert import convert_adapter as convert_adapter
    from .download import download_adapter as download_adapter
    from .download import download_folder as download_folder
    from .download import is_repo_id as is_repo_id
    from .extract import extract_adapter as extract_adapter
    from .inspection import as_lines as as_lines
    from .inspection import inspect_adapter as inspect_adapter
    from .io import find_adapter_file as find_adapter_file
    from .io import read_adapter as read_adapter
    from .io import refuse_pickle as refuse_pickle
    from .io import write_adapter as write_adapter
    from .lora import LoraPair as LoraPair
    from .lora import block_of as block_of
    from .lora import canonical as canonical
    from .merging import MERGE_METHODS as MERGE_METHODS
    from .merging import METHODS as METHODS
    from .merging import MergeOptions as MergeOptions
    from .merging import merge_adapters as merge_adapters
    from .metadata import AdapterMetadata as AdapterMetadata
    from .products import approximate_products as approximate_products
    from .products import is_product as is_product
    from .strengths import check_blocks as check_blocks
    from .strengths import check_strength as check_strength

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Activity": "comerge",
        "Adapter": "adapter",
        "AdapterMetadata": "metadata",
        "ComfyBase": "comfyui",
        "Fit": "comfyui",
        "LoraPair": "lora",
        "MERGE_METHODS": "merging",
        "METHODS": "merging",
        "MergeOptions": "merging",
        "approximate_products": "products",
        "as_lines": "inspection",
        "block_of": "lora",
        "bypass_pairs": "comfyui",
        "canonical": "lora",
        "check_blocks": "strengths",
        "check_strength": "strengths",
        "convert_adapter": "convert",
        "describe": "comfyui",
        "download_adapter": "download",
        "download_folder": "download",
        "extract_adapter": "extract",
        "find_adapter_file": "io",
        "fit_adapter": "comfyui",
        "inspect_adapter": "inspection",
        "is_product": "products",
        "is_repo_id": "download",
        "lora_tensors": "comfyui",
        "merge_adapters": "merging",
        "normalise_architecture": "architecture_names",
        "parse_blocks": "block_strengths",
        "read_adapter": "io",
        "refuse_pickle": "io",
        "scale_by_block": "block_strengths",
        "up_norms": "comerge",
        "write_adapter": "io",
    },
)
