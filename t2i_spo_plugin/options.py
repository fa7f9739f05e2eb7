"""Options: a dataclass is the only place where an option is named, typed, explained and checked.

A mapping (from a YAML file), a command line or both become the dataclass that the Python API takes:

- nested dataclasses are nested mappings in YAML, and dotted options on the command line (`--terms.sft.weight 300`);
- a field with `choices` in its metadata (name -> dataclass) holds one of several dataclasses. YAML says which by
  `name` among its options, or by the bare name; the command line by `--FIELD NAME`;
- a field that is a keyword in Python, such as `lambda_`, is `lambda` in both;
- fields are explained one a line under `Attributes:` of the docstring, which is the help text as well;
- a class attribute `configs` is the folder with a dataclass's bundled configurations, which are then known by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from .errors import ConfigError
from .files import user_path


Config = TypeVar("Config")


def check_range(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    whole: bool = False,
) -> None:
    """Raise unless `low <= value <= high`.

    Args:
        name: of the option, for the message.
        value: what should be a number; a bool is none.
        low: smallest value that is allowed.
        high: largest value that is allowed.
        open_low: `low` itself is not allowed.
        open_high: `high` itself is not allowed.
        whole: the value must be an int.

    Raises:
        ConfigError: no number, NaN, or outside.
    """
    kinds: tuple[type, ...] = (int,) if whole else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if number and (value > low or (value == low and not open_low)):
        if value < high or (value == high and not open_high):
            return
    if high < math.inf:
        span = f"lie in {'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
    else:
        span = f"be {'above' if open_low else 'at least'} {low:g}"
    raise ConfigError(f"{name} must {span}{' and be a whole number' if whole else ''}, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raise a ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def read_options(cls: type[Config], args: Sequence[str], prog: str) -> Config:
    """Make a `cls` from `--config FILE` and the options of a command line, which win over the file.

    Args:
        cls: a dataclass whose `__post_init__` checks the values.
        args: what stands after the command's name. The file may be a path, or the name of a bundled one.
        prog: the command as the user types it, for the help text.

    Raises:
        ConfigError: no such file, no mapping in it, an unknown option, or a value the dataclass refuses.
        SystemExit: help was asked for (0), or the command line is wrong (2).
    """
    import tyro

    file, rest = _take(args, "config")
    content = read_mapping(find_config(file, cls)) if file else {}
    for name, choices in _choice_fields(cls).items():
        choice, rest = _take(rest, name)
        if choice is not None:
            check_choice(f"--{name}", choice, choices)
            content[name] = _other_choice(content.get(name), choice, choices[choice])
    where = f"{file}: " if file else ""
    parser = _parser(cls, _values(cls, content, where))
    parsed: Any = tyro.cli(parser, args=rest, prog=prog, description=_description(cls))
    return _checked(cls, parsed)


def from_yaml(cls: type[Config], file: str | Path, **overrides: Any) -> Config:
    """Make a `cls` from a YAML file, or a bundled configuration's name; `overrides` win, nested mappings one by one.

    Raises:
        ConfigError: as `read_options`.
    """
    path = find_config(file, cls)
    given = {name.rstrip("_"): value for name, value in overrides.items()}
    return from_mapping(cls, merged(read_mapping(path), given), f"{path}: ")


def from_mapping(cls: type[Config], content: Mapping[str, Any], where: str = "") -> Config:
    """Make a `cls` from a mapping of its options by name.

    Args:
        cls: a dataclass.
        content: as YAML gives it: lists for tuples, mappings for nested dataclasses (which may stand for themselves).
        where: what the mapping is, at the front of messages.

    Raises:
        ConfigError: an option that is unknown or missing, or that the dataclass refuses.
    """
    values = _values(cls, content, where)
    needed = [_name(field) for field in dataclasses.fields(cls) if _is_required(field)]  # type: ignore[arg-type]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ConfigError(f"{where}{', '.join(missing)} must be given")
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name = _name(field)
        nested = _nested(cls, field, values.get(name))
        if nested is not None and isinstance(values.get(name), Mapping):
            arguments[field.name] = from_mapping(nested, values[name], f"{where}{name}.")
        elif name in values:
            arguments[field.name] = values[name]
    return cls(**arguments)


def own_options(cls: type[Config], options: Mapping[str, Any], where: str = "") -> tuple[Config, dict[str, Any]]:
    """A `cls` from the options that are its own, and the others, which are somebody else's.

    Raises:
        ConfigError: as `from_mapping`.
    """
    own = {_name(field) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    mine = from_mapping(cls, {name: value for name, value in options.items() if name in own}, where)
    return mine, {name: value for name, value in options.items() if name not in own}


def expand_home(config: Any) -> None:
    """Put the home folder in the place of a `~/` at the front of every path and text of a dataclass, frozen or not.

    For its `__post_init__`: YAML and Python have no shell that does it.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, (str, Path)) and str(value).startswith("~/"):
            object.__setattr__(config, field.name, type(value)(user_path(value)))


def to_mapping(config: Any) -> dict[str, Any]:
    """The options of a dataclass as plain values, which `from_mapping` reads back to an equal one."""
    content: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            choices = field.metadata.get("choices", {})
            names = [name for name, kind in choices.items() if kind is type(value)]
            value = ({"name": names[0]} if names else {}) | to_mapping(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Path):
            value = str(value)
        content[_name(field)] = value
    return content


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, or no mapping in it.
    """
    import yaml

    path = user_path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def find_config(file: str | Path, cls: type | None = None) -> Path:
    """The file itself, or the bundled configuration of `cls` of that name, with or without `.yaml`.

    Raises:
        ConfigError: neither exists.
    """
    folder: Path | None = getattr(cls, "configs", None)
    bundled = {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if user_path(file).is_file():
        return user_path(file)
    path = bundled.get(str(file).removesuffix(".yaml"))
    if path is None:
        raise ConfigError(f"there is no configuration {file}; bundled are: {', '.join(bundled) or 'none'}")
    return path


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` over it, mappings within mappings likewise."""
    both = dict(base)
    for name, value in over.items():
        before = both.get(name)
        both[name] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return both


def split_strength(text: str, default: float = 1.0) -> tuple[str, float]:
    """`SOURCE` or `SOURCE@STRENGTH` as source and strength, the latter `default` where the text says none."""
    source, at, number = text.rpartition("@")
    try:
        return (source, float(number)) if at else (text, default)
    except ValueError:
        return text, default


def _values(cls: type, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`content` with every value of its field's type, nested mappings too; unknown names are refused."""
    fields = {_name(field): field for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in content if key not in fields)
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        file, colon, nest = where.rpartition(": ")
        names = ", ".join(nest + name for name in unknown)
        raise ConfigError(f"{file}{colon}unknown {names}; {hint}known are {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, value in content.items():
        field = fields[name]
        choices = field.metadata.get("choices")
        if choices and isinstance(value, str):
            value = {"name": value}
        nested = _nested(cls, field, value)
        if nested is None or dataclasses.is_dataclass(value):
            values[name] = _converted(value, hints[field.name], f"{where}{name}")
            continue
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}{name}: expected a mapping of options, got {type(value).__name__}")
        options = {key: one for key, one in value.items() if not (choices and key == "name")}
        values[name] = _values(nested, options, f"{where}{name}.")
        if choices:
            values[name] = _Chosen(values[name], nested)
    return values


class _Chosen(dict[str, Any]):
    """Options of one of several dataclasses."""

    def __init__(self, options: Mapping[str, Any], cls: type) -> None:
        super().__init__(options)
        self.cls = cls


def _nested(cls: type, field: dataclasses.Field[Any], value: Any) -> type | None:
    """The dataclass whose options `field` holds, given its value so far; None for a plain field."""
    if dataclasses.is_dataclass(value):
        return type(value)
    if isinstance(value, _Chosen):
        return value.cls
    choices = field.metadata.get("choices")
    if choices:
        if isinstance(value, Mapping) and "name" in value:
            check_choice(f"{_name(field)}.name", value["name"], choices)
            return choices[value["name"]]
        return type(_default(field))
    hint = typing.get_type_hints(cls)[field.name]
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _converted(value: Any, hint: Any, where: str) -> Any:
    """YAML has lists for tuples and text for paths, reads 1e-4 as text and 5 as an int; nothing else is converted."""
    kinds = set(typing.get_args(hint)) | {hint}
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and Path in kinds and str not in kinds:
        return Path(value)
    if isinstance(value, str) and kinds & {int, bool} and not kinds & {str, float}:
        raise ConfigError(f"{where} must be {'a whole number' if int in kinds else 'true or false'}, got {value!r}")
    if float not in kinds or str in kinds or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if int in kinds else float(value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError as error:
            raise ConfigError(f"{where} must be a number, got {value!r}") from error
    return value


def _parser(cls: type, values: Mapping[str, Any]) -> type:
    """A dataclass for tyro: the fields of `cls` with `values` as defaults, nested ones likewise, without the checks,
    which wait until every option is known."""
    import tyro

    hints = typing.get_type_hints(cls, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(cls):
        name = _name(field)
        value = values.get(name)
        nested = _nested(cls, field, value)
        if nested is not None:
            if value is None and not _is_required(field):
                value = _default(field)
            inner = to_mapping(value) if dataclasses.is_dataclass(value) else (value or {})
            fields.append((field.name, _parser(nested, _values(nested, inner, "")), dataclasses.field()))
            continue
        options: dict[str, Any] = {}
        if name in values:
            options = {"default": value}
        elif field.default is not dataclasses.MISSING:
            options = {"default": field.default}
        elif field.default_factory is not dataclasses.MISSING:
            options = {"default_factory": field.default_factory}
        kind: Any = Annotated[hints[field.name], tyro.conf.arg(name=name)]
        fields.append((field.name, kind, dataclasses.field(**options)))
    parser = dataclasses.make_dataclass(cls.__name__, fields, kw_only=True, namespace={"_real": cls})
    parser.__doc__ = cls.__doc__
    return parser


def _checked(cls: type[Config], parsed: Any) -> Config:
    """The parsed dataclass as the real one, which checks itself."""
    arguments = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = getattr(parsed, field.name)
        arguments[field.name] = _checked(value._real, value) if hasattr(value, "_real") else value
    return cls(**arguments)


def _description(cls: type) -> str:
    lines = [(cls.__doc__ or "").strip().partition("\n")[0]]
    lines += [
        f"--{name} {{{','.join(names)}}} chooses what its options are." for name, names in _choice_fields(cls).items()
    ]
    return " ".join((*lines, "--config FILE reads the same options from a YAML file."))


def _choice_fields(cls: type) -> dict[str, Mapping[str, type]]:
    return {
        _name(field): field.metadata["choices"] for field in dataclasses.fields(cls) if "choices" in field.metadata
    }


def _other_choice(before: Any, choice: str, cls: type) -> dict[str, Any]:
    """The options of `choice`: what was given before for another one stays as far as `choice` has it too."""
    known = {_name(field) for field in dataclasses.fields(cls)}
    given = before if isinstance(before, Mapping) else {}
    return {"name": choice, **{key: value for key, value in given.items() if key in known}}


def _take(args: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """Split `--OPTION VALUE` or `--OPTION=VALUE` off."""
    rest, flag = list(args), f"--{option}"
    for position, word in enumerate(rest):
        if word == flag or word.startswith(f"{flag}="):
            if word == flag and position + 1 == len(rest):
                raise ConfigError(f"{flag} needs a {'file' if option == 'config' else 'name'}")
            value = rest[position + 1] if word == flag else word.partition("=")[2]
            del rest[position : position + (2 if word == flag else 1)]
            return value, rest
    return None, rest


def _default(field: dataclasses.Field[Any]) -> Any:
    """What a field that is not required holds unless it is given."""
    factory: Any = field.default_factory
    return factory() if field.default is dataclasses.MISSING else field.default


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _name(field: dataclasses.Field[Any]) -> str:
    return field.name.rstrip("_")
