"""A command's options from the dataclass that the Python API takes: YAML file first, command line over it.

The dataclass stays the only place where an option is named, typed, explained and checked. Its docstring explains a
field on a line such as `steps: optimiser steps.`; several fields may share a line (`rank, alpha: of the LoRA`).
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from .errors import ConfigError


Config = TypeVar("Config")
CONFIGS = Path(__file__).parent / "training" / "configs"

_EXPLAINED = re.compile(r"(?:\w+, )*\w+: \S")
_NEXT = re.compile(r"[;.] (?=(?:\w+, )*\w+: )")


def read_options(cls: type[Config], args: Sequence[str], prog: str) -> Config:
    """Make a `cls` from `--config FILE` and the options of a command line.

    Args:
        cls: a dataclass whose `__post_init__` checks the values.
        args: what stands after the command's name. The file may be a path, or the name of a bundled one.
        prog: the command as the user types it, for the help text.

    Raises:
        ConfigError: no such file, no mapping in it, an unknown option, or a value the dataclass refuses.
        SystemExit: help was asked for (0), or the command line makes no sense (2).
    """
    import tyro

    file, rest = _take_config(args)
    parsed: Any = tyro.cli(_without_checks(cls, yaml_options(cls, file) if file else {}), args=rest, prog=prog)
    return cls(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def split_strength(text: str, default: float = 1.0) -> tuple[str, float]:
    """`SOURCE` or `SOURCE@STRENGTH` as source and strength, the latter `default` where the text says none."""
    source, at, number = text.rpartition("@")
    try:
        return (source, float(number)) if at else (text, default)
    except ValueError:
        return text, default


def yaml_options(cls: type, file: str | Path) -> dict[str, Any]:
    """The options in a YAML file, by field name.

    Raises:
        ConfigError: no such file, no mapping in it, or an option that `cls` does not have.
    """
    import yaml

    path = find_config(file)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of options, got {type(content).__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in content if key not in fields)
    if unknown:
        raise ConfigError(f"{path}: unknown {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
    return {key: _converted(value, str(fields[key].type), f"{path}: {key}") for key, value in content.items()}


def find_config(file: str | Path) -> Path:
    """The file itself, or the bundled configuration of that name, with or without `.yaml`.

    Raises:
        ConfigError: neither exists.
    """
    for path in (Path(file), CONFIGS / file, CONFIGS / f"{file}.yaml"):
        if path.is_file():
            return path
    bundled = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml"))) or "none"
    raise ConfigError(f"there is no configuration {file}; bundled are: {bundled}")


def _converted(value: Any, kind: str, where: str) -> Any:
    """YAML 1.1 reads 1e-4 as text and has lists for tuples; nothing else is converted."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and "float" in kind and "str" not in kind:
        try:
            return float(value)
        except ValueError as error:
            raise ConfigError(f"{where} must be a number, got {value!r}") from error
    return value


def _take_config(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split `--config FILE` or `--config=FILE` off."""
    rest, file = list(args), None
    for position, word in enumerate(rest):
        if word == "--config" or word.startswith("--config="):
            if word == "--config" and position + 1 == len(rest):
                raise ConfigError("--config needs a file")
            taken = 2 if word == "--config" else 1
            file = rest[position + 1] if taken == 2 else word.partition("=")[2]
            del rest[position : position + taken]
            break
    return file, rest


def _without_checks(cls: type, defaults: Mapping[str, Any]) -> type:
    """A dataclass for the parser: the fields of `cls` with their help, and `defaults` over its own; the checks
    wait until every option is known."""
    import tyro

    types = typing.get_type_hints(cls, include_extras=True)
    explained = _explanations(cls.__doc__ or "")
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(cls):
        argument = tyro.conf.arg(name=field.name.rstrip("_"), help=explained.get(field.name, ""))
        made = dataclasses.field()
        if field.name in defaults:
            made = dataclasses.field(default=defaults[field.name])
        elif field.default is not dataclasses.MISSING:
            made = dataclasses.field(default=field.default)
        elif field.default_factory is not dataclasses.MISSING:
            made = dataclasses.field(default_factory=field.default_factory)
        fields.append((field.name, Annotated[types[field.name], argument], made))
    made_class = dataclasses.make_dataclass(cls.__name__, fields, kw_only=True)
    first = (cls.__doc__ or "").strip().partition("\n")[0]
    made_class.__doc__ = f"{first} --config FILE reads the same options from a YAML file."
    return made_class


def _explanations(doc: str) -> dict[str, str]:
    """What the docstring says of each field; a deeper indented line carries the sentence on."""
    lines: list[str] = []
    depth = -1
    for line in doc.expandtabs().splitlines():
        indent = len(line) - len(line.lstrip())
        if lines and line.strip() and indent > depth >= 0:
            lines[-1] += f" {line.strip()}"
        elif _EXPLAINED.match(line.strip()):
            lines.append(line.strip())
            depth = indent
        else:
            depth = -1
    found: dict[str, str] = {}
    for part in (part for line in lines for part in _NEXT.split(line)):
        names, _, text = part.partition(": ")
        found.update(dict.fromkeys(names.split(", "), text.strip().rstrip(";.")))
    return found
