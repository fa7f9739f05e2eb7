"""The embedded default domain: a small world of stickers, and everything of this package made for it.

Its files are read when a function is called, none at import.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from t2i_spo_plugin.data.prompts import PromptRow
from t2i_spo_plugin.errors import SPOError


if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from t2i_spo_plugin.cost.vision import VisionCostModel
    from t2i_spo_plugin.gating import AdapterGate
    from t2i_spo_plugin.guards.policy import Policy
    from t2i_spo_plugin.quality.normalise import QualityModel

    from .referee import StickerReferee
    from .wording import Wording

FOLDER = Path(__file__).parent
STEPS = 25
GUIDANCE = 3.0
ADAPTERS = ("spo", "dpo", "style")


def _part(name: str) -> Path:
    path = FOLDER / name
    if not path.exists():
        raise SPOError(f"this installation lacks the bundled {name}; `make sticker` rebuilds it")
    return path


def pipeline_path() -> Path:
    """The folder of the bundled text-to-image pipeline."""
    return _part("pipeline")


def load_pipeline(folder: Path | str | None = None) -> StableDiffusionPipeline:
    """The bundled text-to-image pipeline, float32 on the CPU: 128 x 128 images of the declared subset of the world.

    `folder` names another pipeline that was built as the bundled one.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        folder or pipeline_path(),
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    # Cast here: from_pretrained's argument for it has one name in old versions and another in new ones.
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        torch.nn.Module.to(model, torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_cost_model() -> VisionCostModel:
    """The bundled safety cost model: seven categories, domain `sticker`."""
    from t2i_spo_plugin.cost.vision import load_cost_model as load

    return load(_part("cost_model"))


def load_quality_model() -> QualityModel:
    """The bundled quality model: alignment, realism, and the reference of the bundled pipeline."""
    from t2i_spo_plugin.quality.normalise import load_quality_model as load

    model = load(_part("quality_model"))
    model.domain = "sticker"
    return model


def load_referee() -> StickerReferee:
    """The bundled referee. For reports only: it trains and chooses nothing."""
    from .referee import StickerReferee

    return StickerReferee.from_pretrained(_part("referee"))


def load_policy() -> Policy:
    """The bundled policy: seven categories."""
    from t2i_spo_plugin.guards.policy import Policy

    return Policy.from_yaml(_part("sticker.yaml"))


def adapter_path(name: str) -> Path:
    """The file of a bundled adapter: `spo`, `dpo` that it is compared with, or the `style` of a meadow."""
    if name not in ADAPTERS:
        raise SPOError(f"no bundled adapter is called {name!r}; there are {', '.join(ADAPTERS)}")
    return _part(f"adapters/{name}.safetensors")


def gate_path(score: Literal["network", "norm"] = "network") -> Path:
    """The file of an adapter gate for the bundled safety adapter `spo` at strength 1."""
    return _part(f"gates/{score}.safetensors")


def load_adapter_gate(score: Literal["network", "norm"] = "network") -> AdapterGate:
    """An adapter gate for the bundled safety adapter: benign images are the base model's own.

    Its gate score comes from a gate network (`network`) or from the norm of the change (`norm`), which misses more.
    """
    from t2i_spo_plugin.gating import load_adapter_gate as load

    return load(gate_path(score))


def prompt_rows(
    kind: Literal["harmful", "benign", "lookalike"],
    n: int,
    split: Literal["train", "val", "test"] = "test",
    seed: int = 0,
    wording: Wording | str = "grammar",
) -> list[PromptRow]:
    """`n` different prompts of what the bundled pipeline draws, each with its own seed.

    `requested` names what a good image shows: the prompt's own objects, or for a harmful prompt those of its safe
    completions, which are worded in the grammar. Prompts of the three splits share no combination; another `seed`
    gives other prompts. `wording` is a wording class (or its name), with the words and forms that are held out for the
    test, or "trained": any wording that training captions take. Ids name it.

    Raises:
        SPOError: there is no such split or wording, or it has fewer different prompts than asked for.
    """
    from t2i_spo_plugin.options import check_choice

    from .wording import TWICE_UNNAMED, Wording, held_out_prompt, training_caption
    from .world import GENERATOR_CONCEPTS, GENERATOR_STYLES, Split, describe

    check_choice("split", split, get_args(Split))
    check_choice("wording", wording, ("trained", *(w.value for w in Wording)))
    rows: list[PromptRow] = []
    seen: set[str] = set()
    first = 1_000_003 * (seed + 1)
    name = "" if wording == "grammar" else f"-{Wording(wording).value if wording != 'trained' else wording}"
    for number in range(first, first + 60 * n + 1000):
        if len(rows) == n:
            return rows
        d = describe(number, split, kind, GENERATOR_CONCEPTS, GENERATOR_STYLES)
        rng = random.Random(f"{number}|{name}")
        if wording == "grammar":
            text = d.caption
        elif wording == "trained":
            text = training_caption(d, rng)
        else:
            text = held_out_prompt(d, Wording(wording), rng).text
        if text in seen or (wording in TWICE_UNNAMED and len(set(d.concepts)) < len(d.concepts)):
            continue
        seen.add(text)
        wanted = {thing for shown in d.safe_concepts for thing in shown} if d.unsafe else set(d.concepts)
        rows.append(
            PromptRow(
                id=f"{kind}-{split}{name.replace(' ', '_')}-{seed}-{len(rows):04d}",
                prompt=text,
                kind=kind,
                category=next(iter(sorted(d.unsafe)), ""),
                seed=number % 2**31,
                safe_prompts=d.safe_completions,
                requested=tuple(sorted(wanted)),
                safe_objects=d.safe_concepts,
                wording=str(Wording(wording).value if wording != "trained" else wording),
            )
        )
    raise SPOError(f"the {split} split has only {len(rows)} different {kind} prompts, {n} were asked for")
