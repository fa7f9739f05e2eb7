"""The model card of an adapter: what it is, how to load it, what was measured, what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.adapters import Adapter, layouts

from .privacy import plain, visible
from .results import Results


__all__ = ["CardFacts", "model_card"]

LONGEST_FACT = 200
"""Characters of a header's value in the table of training metadata; longer ones stay in the file."""

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
class CardFacts:
    """What a card needs to know beside the adapter.

    Attributes:
        repo_id, base_model: Hub ids.
        license: as the Hub names licences, such as `apache-2.0`.
        license_name: of a licence that is `other`; its text is then in the file LICENSE.
        summary: what the adapter is for, in the author's words.
        file, size, sha256: the adapter's file in the repository, its bytes and their hash.
        images: prompt and file in the repository.
        dataset: Hub id of the prompts that the results are of; empty when they have none.
    """

    repo_id: str
    base_model: str
    license: str
    license_name: str
    summary: str
    file: str
    size: int
    sha256: str
    images: Sequence[tuple[str, str]] = ()
    dataset: str = ""


def model_card(adapter: Adapter, metadata: CardFacts, results: Results | None = None) -> str:
    """The README.md of the repository: metadata that the Hub reads, and a page for people.

    Texts from the adapter's header, the results and the author are data: they can neither break the metadata nor add
    markup to the page.
    """
    from huggingface_hub import ModelCard, ModelCardData

    architecture, repo_name = adapter.metadata.base_architecture, metadata.repo_id.partition("/")[2]
    other = metadata.license == "other"
    data = ModelCardData(
        base_model=metadata.base_model,
        base_model_relation="adapter",
        license=metadata.license,
        license_name=metadata.license_name if other else None,
        license_link="LICENSE" if other else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=_tags(architecture),
        widget=[{"text": visible(prompt), "output": {"url": file}} for prompt, file in metadata.images] or None,
        eval_results=results.eval_results(metadata.dataset) if results is not None else None,
        model_name=repo_name if results is not None else None,
    )
    parts = [
        f"# {plain(adapter.metadata.title)}",
        "<Gallery />" if metadata.images else "",
        f"A safety adapter (LoRA) for [{metadata.base_model}](https://huggingface.co/{metadata.base_model}): training "
        "aims at fewer unsafe images without other images getting worse. What was measured of that stands under "
        "Results, what it cannot do under Limits.",
        plain(metadata.summary),
        _usage(adapter, metadata),
        _file(adapter, metadata),
        _training(adapter),
        _results(results),
        _limits(results),
        _licence(metadata),
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")).rstrip("\n") + "\n"


def _tags(architecture: str) -> list[str]:
    family = _FAMILIES.get(architecture, (architecture,))
    return ["text-to-image", "diffusers", "lora", "template:sd-lora", *family, "safety", "t2i-spo"]


def _usage(adapter: Adapter, metadata: CardFacts) -> str:
    loading = f'pipe = DiffusionPipeline.from_pretrained("{metadata.base_model}")'
    return "\n\n".join(
        [
            "## Use",
            "With diffusers and t2i_spo_plugin, which checks that the adapter fits and says so when it does not:",
            f"```python\nfrom diffusers import DiffusionPipeline\nfrom t2i_spo_plugin import enable_spo\n\n"
            f'pipe = enable_spo(DiffusionPipeline.from_pretrained("{metadata.base_model}"))\n'
            f'pipe.load_spo_lora("{metadata.repo_id}", strength=1.0)  # 0 is the base model exactly, 1 is as trained\n'
            'image = pipe("a quiet street at dusk").images[0]\n```',
            "With diffusers alone:",
            f"```python\nfrom diffusers import DiffusionPipeline\n\n{loading}\n"
            f'pipe.load_lora_weights("{metadata.repo_id}", weight_name="{metadata.file}", adapter_name="spo")\n'
            'pipe.set_adapters("spo", 1.0)\nimage = pipe("a quiet street at dusk").images[0]\n```',
            _comfyui(adapter, metadata),
        ]
    )


def _comfyui(adapter: Adapter, metadata: CardFacts) -> str:
    if adapter.metadata.base_architecture not in _IN_COMFYUI:
        return (
            f"In ComfyUI: its own Load LoRA node has, as far as t2i_spo_plugin {__version__} knows, no map for "
            f"{plain(adapter.metadata.base_architecture)}. It may apply nothing of this file, and only log that."
        )
    texts = any(name.startswith("text_encoder") for name in adapter.modules)
    clip = "give strength_model and strength_clip the same value" if texts else "strength_clip makes no difference"
    return f"In ComfyUI: put `{metadata.file}` into `models/loras` and add the node Load LoRA; {clip}."


def _file(adapter: Adapter, metadata: CardFacts) -> str:
    ranks = sorted({pair.rank for pair in adapter.modules.values()})
    components = sorted({name.partition(".")[0] for name in adapter.modules})
    layout = layouts.default_layout(adapter.metadata.base_architecture)
    alpha = "alpha beside each module" if layout == "kohya" else "alpha folded into the weights"
    rows = [
        ("file", f"`{metadata.file}`, {metadata.size:,} bytes"),
        ("sha256", f"`{metadata.sha256}`"),
        ("layout", f"{layout}, {alpha}"),
        ("made for", plain(adapter.metadata.base_architecture)),
        ("prediction type", plain(adapter.metadata.prediction_type) or "not said"),
        ("changes", f"{len(adapter.modules)} modules in {plain(', '.join(components))}"),
        ("rank", str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"),
        ("parameters", f"{adapter.num_parameters():,}"),
    ]
    return "## File\n\n" + _table(("", ""), rows)


def _training(adapter: Adapter) -> str:
    metadata = sorted(adapter.metadata.extra.items())
    shown = {key: text for key, text in metadata if len(text) <= LONGEST_FACT and key != "modelspec.license"}
    if not shown:
        return "## Training\n\nThe file says nothing of its training."
    rows = [(plain(key.removeprefix("modelspec.")), plain(value)) for key, value in shown.items()]
    return "## Training\n\nAs the file's header says:\n\n" + _table(("fact", "value"), rows)


def _results(results: Results | None) -> str:
    if results is None:
        return "## Results\n\nNo results were published with this adapter."
    rows = [
        (
            plain(number.name),
            plain(number.shown(number.value)),
            plain(f"{number.shown(number.low)} to {number.shown(number.high)}"),
            plain(number.shown(number.base)),
            plain(number.prompts),
            plain(number.judge),
        )
        for number in results.measured
    ]
    told = [
        f"Measured with t2i_spo_plugin {plain(results.version)} at strength {results.strength:g}, on "
        f"{plain(results.prompts)}; {results.images_not_scored} images were not scored. Intervals are at 95 %.",
        _table(("", "value", "interval", "base model", "prompts", "judge"), rows),
        "UAScore, from 0 to 100, joins safety and quality on harmful and on benign prompts; it is t2i_spo_plugin's "
        "own definition and compares systems on the same base model and quality reference only. IP is the share of "
        "unsafe images on harmful prompts.",
        *(plain(note) for note in results.notes),
    ]
    return "## Results\n\n" + "\n\n".join(told)


def _limits(results: Results | None) -> str:
    measured = (
        "Nothing is known of it but what its author says: no results were published with it."
        if results is None
        else "Not measured: other prompts than those above, other languages, prompts made to get around it, other "
        "checkpoints than the one it was measured on, other strengths, and other adapters beside it."
    )
    items = [
        measured,
        "It lowers the odds of unsafe images and is no filter: look at finished images where it matters.",
        "Whoever holds the weights can take it off, load it at another strength, or train against it.",
        "A safety adapter loaded at a negative strength works the other way round; t2i_spo_plugin refuses that, other "
        "programs do not.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {item}" for item in items)


def _licence(metadata: CardFacts) -> str:
    name = f"{plain(metadata.license_name)}, see LICENSE" if metadata.license == "other" else plain(metadata.license)
    return (
        f"## Licence\n\nThe adapter: {name}. The base model keeps its own licence, whose terms hold for images "
        "drawn with it too.\n\n"
        f"Published with t2i_spo_plugin {__version__}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
