"""Whether an adapter fits a model: architecture, prediction type, and every module by its weight's shape.

What is asked of the model is plain data, so that a diffusers pipeline and a ComfyUI model are judged alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from t2i_spo_plugin.errors import IncompatibleAdapterError, InvalidAdapterError
from t2i_spo_plugin.files import quoted

from .adapter import Adapter
from .architecture_names import is_known_architecture, short_name


Place = TypeVar("Place", bound=Hashable)
"""What a host knows a weight by."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """The model that an adapter is to change.

    Attributes:
        kind: what messages call it: `pipeline` or `model`.
        architecture: as `AdapterMetadata.base_architecture`; empty when unknown.
        prediction_type: as `AdapterMetadata.prediction_type`; empty when unknown.
        lacks: for the name of a module that the model does not have, subject and verb of the sentence that says so,
            such as "this model lacks".
        fingerprint: as `base_fingerprint` in the metadata; empty when unknown.
    """

    kind: str
    architecture: str
    prediction_type: str
    lacks: Callable[[str], str]
    fingerprint: str = ""


@dataclass(frozen=True)
class Match(Generic[Place]):
    """Where the modules of an adapter are in a model.

    Attributes:
        places: by module name.
        missing: names of the modules that the model does not have.
        problems: why not all of the adapter can be applied as it was trained, a sentence each.
        notes: what could not be checked, a sentence each.
    """

    places: dict[str, Place]
    missing: tuple[str, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def match_modules(
    adapter: Adapter, target: Target, weights: Mapping[str, tuple[Place, Shape]], strict: bool = True
) -> Match[Place]:
    """Match the modules of `adapter` with the weights of a model.

    Args:
        adapter: in the neutral form, whatever file it was read from.
        target: the model.
        weights: place and shape of the weight of every module of the adapter that the model has.
        strict: refuse an adapter of which only a part fits, or that changes no denoiser; False returns the problems.

    Raises:
        IncompatibleAdapterError: made for another architecture, prediction type, width or depth; no module fits; or,
            with `strict`, there is a problem.
        InvalidAdapterError: two modules change the same weight.
    """
    _check_claims(adapter, target)
    places: dict[str, Place] = {}
    modules: dict[Place, str] = {}
    for name, pair in adapter.modules.items():
        if name not in weights:
            continue
        place, shape = weights[name]
        if pair.shape != shape:
            of = f" of the architecture {target.architecture}" if target.architecture else ""
            raise IncompatibleAdapterError(
                f"the adapter was made for another base{of}: it changes {name} as a weight of {list(pair.shape)}, in "
                f"this {target.kind} it has {list(shape)}{_cure(target)}"
            )
        if place in modules:
            raise InvalidAdapterError(
                f"the adapter changes one weight twice: {modules[place]} and {name} are the same module of this "
                f"{target.kind}"
            )
        places[name] = place
        modules[place] = name
    missing = tuple(name for name in adapter.modules if name not in places)
    problems = _problems(adapter, target, places, missing)
    first = f"; the first is {missing[0]}" if missing else ""
    if not places:
        raise IncompatibleAdapterError(f"no module of the adapter fits: {'; '.join(problems)}{first}{_cure(target)}")
    if problems and strict:
        raise IncompatibleAdapterError(
            f"the adapter does not fit: {'; '.join(problems)}{first}; without strict, what fits is applied"
        )
    return Match(places, missing, problems, _notes(adapter, target))


def _notes(adapter: Adapter, target: Target) -> tuple[str, ...]:
    claim = adapter.metadata.base_architecture
    if not claim or not target.architecture or claim == target.architecture:
        return ()
    return (
        f"it says that it was made for {quoted(claim)}, which is no architecture that is known here; its modules are "
        f"those of this {target.kind}, {target.architecture}",
    )


def _check_claims(adapter: Adapter, target: Target) -> None:
    metadata = adapter.metadata
    claim = metadata.base_architecture
    # A name that is not known says nothing: then the modules and their shapes decide.
    if target.architecture and claim != target.architecture and is_known_architecture(claim):
        raise IncompatibleAdapterError(
            f"the adapter was made for {claim}, this {target.kind} is {target.architecture}{_cure(target)}"
        )
    if metadata.prediction_type and target.prediction_type and metadata.prediction_type != target.prediction_type:
        raise IncompatibleAdapterError(
            f"the adapter was made for a model that predicts {metadata.prediction_type}, this one predicts "
            f"{target.prediction_type}"
        )


def _cure(target: Target) -> str:
    """What to do about an adapter of another base."""
    return f"; choose an adapter for {short_name(target.architecture)}" if target.architecture else ""


def _problems(
    adapter: Adapter, target: Target, places: Mapping[str, object], missing: tuple[str, ...]
) -> tuple[str, ...]:
    problems = []
    fingerprint = adapter.metadata.extra.get("base_fingerprint", "")
    if fingerprint and target.fingerprint and fingerprint != target.fingerprint:
        problems.append("it was trained on a model of another width or depth")
    for lacks, count in Counter(target.lacks(name) for name in missing).items():
        problems.append(f"{lacks} {count} of its {len(adapter.modules)} modules")
    if places and all(name.startswith("text_encoder") for name in places):
        problems.append("it would change text encoders only, not the denoiser")
    return tuple(problems)
