"""An adapter from one file layout into another, without changing what it does."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from t2i_spo_plugin.errors import AdapterError
from t2i_spo_plugin.files import write_bytes

from . import layouts
from .adapter import Adapter
from .dtypes import rounded
from .io import write_adapter
from .lora import LoraPair


_PEFT_NAMES = ("adapter_model.safetensors", "adapter_config.json")


def convert_adapter(adapter: Adapter, path: str | Path, layout: str, dtype: torch.dtype | None = None) -> Path:
    """Write `adapter` in `layout` without changing what it does, and return the file.

    Args:
        adapter: any.
        path: a .safetensors file, for `peft` a folder.
        layout: one of `layouts.LAYOUTS`.
        dtype: float32, float16 or bfloat16, to which the weights are rounded. By default each keeps its own; only
            where alpha has to be folded into B and 16 bits cannot hold the product, the file is written in float32.

    Raises:
        AdapterError: `write_adapter` would refuse it, the layout would lose a module, or `dtype` cannot hold a weight.
        ConfigError: adapters are not written in `dtype`.
    """
    path, modules = Path(path).expanduser(), dict(sorted(adapter.modules.items()))
    if dtype is not None:
        if layout == "native":
            modules = {name: _folded(pair) for name, pair in modules.items()}
        modules = {name: rounded(pair, dtype, name)[0] for name, pair in modules.items()}
    elif layout == "native" and not all(_folds_exactly(pair) for pair in modules.values()):
        modules = {name: LoraPair(pair.down.float(), pair.up.float(), pair.alpha) for name, pair in modules.items()}
    adapter = Adapter(modules, adapter.metadata)
    config = layouts.diffusers.peft_config(modules) if layout == "peft" else None
    metadata = layouts.diffusers.alpha_metadata(modules) if layout == "diffusers" else {}
    architecture = adapter.metadata.base_architecture
    back = layouts.decode(layouts.encode(modules, architecture, layout), metadata, config, architecture)
    lost = sorted(modules.keys() - back.keys())
    if lost:
        raise AdapterError(f"the {layout} layout would lose {len(lost)} modules, such as {lost[0]}")
    if config is None:
        return write_adapter(adapter, path, layout)
    if path.suffix == ".safetensors":
        raise AdapterError(f"a PEFT adapter is a folder of two files, got {path.name}")
    written = write_adapter(adapter, path / _PEFT_NAMES[0], layout)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_bytes(path / _PEFT_NAMES[1], text.encode("utf-8"))
    return written


def _folded(pair: LoraPair) -> LoraPair:
    return LoraPair(pair.down, pair.up.float() * pair.scale, float(pair.rank))


def _folds_exactly(pair: LoraPair) -> bool:
    folded = _folded(pair).up
    return pair.up.dtype == torch.float32 or torch.equal(folded.to(pair.up.dtype).float(), folded)
