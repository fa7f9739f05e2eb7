"""What a result depends on, known by content: hashes of weights as they are in memory.

A path or a name says nothing of what lies there now. So whatever can be resumed stores these identities with its
settings, and refuses to go on when they differ; a file that was moved or renamed has the identity that it had.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .files import write_json


_ADAPTER = re.compile(r"(?P<layer>.+)\.(?P<part>lora_\w+)\.(?P<name>[^.]+)(?P<rest>\.\w+)?")
"""A tensor of one of PEFT's adapters, which have names that mean nothing for the image."""
_SETTINGS = ("categories", "domain", "features", "size", "k")
"""What decides the answers of a cost or quality model beside its weights."""


def content_hash(*parts: Any) -> str:
    """Sixteen hex digits that change with any weight or setting of the modules, or word of the tokenizers.

    The name of an adapter that a module carries plays no part.
    """
    digest = hashlib.sha256()
    for part in parts:
        for line in _content(part):
            digest.update(line)
    return digest.hexdigest()[:16]


def model_identity(model: Any) -> str:
    """What tells a cost or quality model from others: its own `identity`, or the hash of its weights and settings.

    A model of another package that is no module and has no `identity` is known by its class alone.
    """
    stated = getattr(model, "identity", "")
    if stated:
        return str(stated)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, nn.Module):
        return kind
    settings = {name: getattr(model, name) for name in _SETTINGS if hasattr(model, name)}
    return content_hash(json.dumps([kind, settings], default=str), model)


def pipeline_identity(pipe: Any, only: Collection[str] = ()) -> dict[str, str]:
    """The hash of each model and tokenizer of a pipeline, and one of its adapters with their strengths, if any.

    Args:
        pipe: any diffusers pipeline.
        only: beginnings of the components' names; by default all count.
    """
    components = dict(getattr(pipe, "components", {}))
    parts = {
        name: part
        for name, part in sorted(components.items())
        if (isinstance(part, nn.Module) or hasattr(part, "get_vocab")) and (not only or name.startswith(tuple(only)))
    }
    identity = {name: content_hash(part) for name, part in parts.items()}
    adapters = _adapters(pipe, {name: part for name, part in parts.items() if isinstance(part, nn.Module)})
    return identity | ({"adapters": adapters} if adapters else {})


def rows_identity(rows: Collection[Any]) -> str:
    """Of prompts or other rows, in their order."""
    return content_hash(*(repr(row) for row in rows))


def claim(folder: Path, settings: Mapping[str, Any], what: str) -> None:
    """Write `settings` into `folder/settings.json`, or hold them against those that are there.

    Args:
        folder: is made when it is missing.
        settings: JSON values, nested mappings among them.
        what: lies in the folder, for the message.

    Raises:
        ConfigError: the folder holds results of other settings; nothing in it is changed.
    """
    path = folder / "settings.json"
    now = json.loads(json.dumps(settings, sort_keys=True, default=str))
    if not path.is_file():
        write_json(path, now)
        return
    changed = changes(json.loads(path.read_text(encoding="utf-8")), now)
    if changed:
        raise ConfigError(
            f"{folder} holds {what} of other settings ({'; '.join(changed)}); use another folder, or remove this one"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`name: old there, new now` for every value that differs; names of nested mappings have dots."""
    flat, flat_now = dict(_flat(before)), dict(_flat(now))
    names = [name for name in {**flat, **flat_now} if flat.get(name) != flat_now.get(name)]
    return [f"{name}: {_stated(flat.get(name))} there, {_stated(flat_now.get(name))} now" for name in sorted(names)]


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _stated(value: Any) -> str:
    return "none" if value is None else str(value)


def _content(part: Any) -> Iterator[bytes]:
    if isinstance(part, nn.Module):
        yield json.dumps(_config(part), sort_keys=True, default=str).encode()
        weights = {name: tensor for name, tensor in _state(part) if not _ADAPTER.fullmatch(name)}
        yield from _tensors({name.replace(".base_layer.", "."): tensor for name, tensor in weights.items()})
    elif isinstance(part, Tensor):
        yield from _tensors({"": part})
    elif hasattr(part, "get_vocab"):
        yield json.dumps(part.get_vocab(), sort_keys=True).encode()
    else:
        yield f"{part!r}\0".encode()


def _config(module: nn.Module) -> dict[str, Any]:
    config: Any = getattr(module, "config", {})
    content = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    skipped = ("transformers_version", "dtype", "torch_dtype")
    return {key: value for key, value in content.items() if not key.startswith("_") and key not in skipped}


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    state = module.state_dict()
    if any(value.is_meta for value in state.values() if isinstance(value, Tensor)):
        # Offloaded by accelerate: the weights are elsewhere until a layer needs them.
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        state = get_state_dict_offloaded_model(module)
    return ((name, value) for name, value in state.items() if isinstance(value, Tensor))


def _tensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes]:
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode()
        yield from _bytes(tensor.detach())


def _bytes(tensor: Tensor) -> Iterator[Any]:
    if hasattr(tensor, "__tensor_flatten__"):
        # Quantised: the tensors and the settings that stand for this one.
        names, context = tensor.__tensor_flatten__()
        yield repr(context).encode()
        for name in names:
            yield from _bytes(getattr(tensor, name))
    else:
        plain = tensor.as_subclass(Tensor).cpu().contiguous().flatten()
        yield plain.view(torch.uint8).numpy().data


def _adapters(pipe: Any, modules: Mapping[str, nn.Module]) -> str:
    """One hash of all adapters that the modules carry; empty when there is none."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for component, module in modules.items():
        for name, tensor in module.state_dict().items():
            match = _ADAPTER.fullmatch(name)
            if match:
                place = f"{component}.{match['layer']}.{match['part']}{match['rest'] or ''}"
                by_name.setdefault(match["name"], {})[place] = tensor
    if not by_name:
        return ""
    loaded = pipe.spo_adapters() if hasattr(pipe, "spo_adapters") else {}
    entries = []
    for name, tensors in by_name.items():
        digest = hashlib.sha256()
        for line in _tensors(tensors):
            digest.update(line)
        record = loaded.get(name)
        use = _layers(modules, name) if record is None else _record(record)
        entries.append(f"{digest.hexdigest()} {use}")
    return content_hash(*sorted(entries))


def _record(loaded: Any) -> str:
    """How a safety adapter is applied: what `LoadedAdapter` says of strength, window, blocks and steering."""
    blocks = sorted(loaded.blocks.items())
    return repr([loaded.strength, loaded.window, blocks, _described(loaded.steering), loaded.fused])


def _described(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return content_hash(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(_described(getattr(value, part.name)) for part in dataclasses.fields(value))]
    return repr(value)


def _layers(modules: Mapping[str, nn.Module], name: str) -> str:
    """How any other adapter is applied: its scale in each layer, and whether it is active there."""
    layers = {
        f"{component}.{path}": (layer.scaling[name], name in layer.active_adapters and not layer.disable_adapters)
        for component, module in modules.items()
        for path, layer in module.named_modules()
        if hasattr(layer, "scaling") and hasattr(layer, "active_adapters") and name in layer.scaling
    }
    return repr(sorted(layers.items()))
