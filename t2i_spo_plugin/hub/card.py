"""The model card of an adapter: what it is, how to load it, what was measured, what it cannot do.

The text is in `templates/card.md.jinja`. Whatever it prints passes through `plain`, so that texts of the
adapter's header, the results and the author can neither break the metadata nor add markup to the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.adapters import Adapter, layouts

from .card_info import ModelCardInfo
from .privacy import plain, visible
from .results import Results


__all__ = ["CardFiles", "model_card"]

LONGEST_VALUE = 200
"""Characters of a header's value in the table of training metadata; longer ones stay in the file."""

_TEMPLATE = "card.md.jinja"
_FAMILIES = {
    "stable-diffusion-v1": ("stable-diffusion", "stable-diffusion-diffusers"),
    "stable-diffusion-v2": ("stable-diffusion", "stable-diffusion-diffusers"),
    "stable-diffusion-xl-v1-base": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "stable-diffusion-xl-v1-refiner": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "stable-diffusion-3": ("sd3", "sd3-diffusers"),
    "flux-1-dev": ("flux", "flux-diffusers"),
}
_IN_COMFYUI = (*_FAMILIES, "aura-flow", "lumina2", "qwen-image")
"""Architectures that ComfyUI's own Load LoRA node has a map for, for the layout in which adapters are published."""


@dataclass(frozen=True)
class CardFiles:
    """The files of the repository that the card speaks of.

    Attributes:
        repo_id: of the repository.
        adapter: the adapter's file there.
        size: of that file, in bytes.
        sha256: of that file.
        images: for each of the author's images its file there.
    """

    repo_id: str
    adapter: str
    size: int
    sha256: str
    images: Sequence[str] = ()


def model_card(adapter: Adapter, info: ModelCardInfo, files: CardFiles, results: Results | None = None) -> str:
    """The README.md of the repository: metadata that the Hub reads, and a page for people.

    Args:
        adapter: as it is published.
        info: what the author says; its licence is named.
        files: what the repository holds.
        results: what an evaluation measured of the adapter; None when nothing is published.
    """
    from huggingface_hub import ModelCard

    text = _template().render(
        metadata=_metadata(adapter, info, files, results),
        info=info,
        files=files,
        results=results,
        version=__version__,
        title=adapter.metadata.title,
        training=_training(adapter),
        **_properties(adapter),
    )
    return str(ModelCard(text)).rstrip("\n") + "\n"


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        # What the template itself marks as safe has the method; no text of another does.
        finalize=lambda value: value if hasattr(value, "__html__") else plain(str(value)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(_TEMPLATE)


def _metadata(adapter: Adapter, info: ModelCardInfo, files: CardFiles, results: Results | None) -> str:
    """The YAML block that the Hub reads."""
    from huggingface_hub import ModelCardData

    architecture, other = adapter.metadata.base_architecture, info.license == "other"
    family = _FAMILIES.get(architecture, (architecture,))
    prompts = [visible(prompt) for prompt, _ in info.images]
    data = ModelCardData(
        base_model=info.base_model,
        base_model_relation="adapter",
        license=info.license,
        license_name=info.license_name if other else None,
        license_link="LICENSE" if other else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "lora", "template:sd-lora", *family, "safety", "t2i-spo"],
        widget=[{"text": text, "output": {"url": file}} for text, file in zip(prompts, files.images, strict=True)]
        or None,
        eval_results=results.eval_results(info.dataset) if results is not None else None,
        model_name=files.repo_id.partition("/")[2] if results is not None else None,
    )
    return str(data.to_yaml())


def _properties(adapter: Adapter) -> dict[str, Any]:
    """What the card says of the adapter itself."""
    architecture = adapter.metadata.base_architecture
    ranks = sorted({pair.rank for pair in adapter.modules.values()})
    components = sorted({name.partition(".")[0] for name in adapter.modules})
    return {
        "architecture": architecture,
        "prediction_type": adapter.metadata.prediction_type,
        "in_comfyui": architecture in _IN_COMFYUI,
        "layout": layouts.default_layout(architecture),
        "modules": len(adapter.modules),
        "components": ", ".join(components),
        "changes_text": any(name.startswith("text_encoder") for name in components),
        "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "parameters": adapter.num_parameters(),
    }


def _training(adapter: Adapter) -> dict[str, str]:
    """What the header says of the training, but for long values."""
    return {
        key.removeprefix("modelspec."): value
        for key, value in sorted(adapter.metadata.extra.items())
        if len(value) <= LONGEST_VALUE and key != "modelspec.license"
    }
