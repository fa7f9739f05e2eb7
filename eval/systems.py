"""What is compared: the base model, and the base model with an adapter at a strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.files import folder_hash
from t2i_spo_plugin.options import split_strength
from t2i_spo_plugin.registry import ADAPTERS, adapter_source


BASE = "base"

Prepare = Callable[[Any], AbstractContextManager[Any]]


def _as_it_is(pipe: Any) -> AbstractContextManager[Any]:
    return nullcontext(pipe)


@dataclass(frozen=True)
class System:
    """A name, a way to prepare the pipeline, and the metadata that decide its images.

    Attributes:
        prepare: a function of the pipeline that gives a context in which the pipeline generates as this system.
        metadata: JSON values that change whenever the images would: source, hash, strength. For the report.
        identity: those of them that the weights of the prepared pipeline do not say already; None takes `metadata`.
    """

    name: str
    prepare: Prepare = field(default=_as_it_is, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.name or any(letter in self.name for letter in "/\\"):
            raise ConfigError(f"a system needs a name without slashes, got {self.name!r}")


def base_system() -> System:
    """The pipeline as it is."""
    return System(BASE)


def adapter_system(name: str, source: str | Path, strength: float = 1.0) -> System:
    """The pipeline with the safety adapter `source` (a file, a folder or a Hub id) at `strength`."""

    @contextmanager
    def prepare(pipe: Any) -> Iterator[Any]:
        from t2i_spo_plugin.pipelines import load_spo_lora, unload_spo_lora

        load_spo_lora(pipe, source, strength=strength, adapter_name="evaluated")
        try:
            yield pipe
        finally:
            unload_spo_lora(pipe, "evaluated")

    local = Path(source).exists()
    metadata = {"adapter": Path(source).name if local else str(source), "strength": strength}
    return System(name, prepare, metadata | ({"adapter_hash": folder_hash(source)} if local else {}), identity={})


def parse_adapters(specs: Sequence[str], strength: float = 1.0) -> list[System]:
    """Systems from `NAME` or `NAME=SOURCE`, each with an optional `@STRENGTH`, such as `spo` or `half=spo@0.5`.

    A source is a bundled name (`spo`, `dpo`, `style`), a file, a folder or a Hub id.

    Raises:
        ConfigError: a malformed text, a strength below 0, or two systems with one name.
    """
    systems = [_parse(spec, strength) for spec in specs]
    names = [BASE, *(system.name for system in systems)]
    if len(set(names)) != len(names):
        raise ConfigError(f"systems need names of their own, got {', '.join(names)}")
    return systems


def _parse(spec: str, default_strength: float) -> System:
    rest, strength = split_strength(spec, default_strength)
    name, equals, source = rest.partition("=")
    if not equals:
        name, source = (spec, rest) if rest in ADAPTERS.names() else (Path(rest).stem, rest)
    if not name or not source:
        raise ConfigError(f"expected NAME, NAME=SOURCE or NAME=SOURCE@STRENGTH, got {spec!r}")
    if strength < 0:
        raise ConfigError(f"{spec}: strength must be at least 0")
    return adapter_system(name, adapter_source(source), strength)
