"""How a function becomes a command: its parameters are the options, its docstring the help."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro


Command = Callable[[Sequence[str]], int | None]
"""Takes what stands after the command's name; gives the exit code, where it is not always 0."""

AsJSON = Annotated[bool, tyro.conf.arg(name="json")]
"""Called `json_` in Python, `--json` on the command line."""

AsCSV = Annotated[bool, tyro.conf.arg(name="csv")]
"""Called `csv_` in Python, `--csv` on the command line."""


def command(function: Callable[..., Any]) -> Command:
    """`spo NAME` with the parameters of `function` as its options, and the docstring's `Args` as their help."""
    name = function.__name__.replace("_", "-")

    @functools.wraps(function)
    def run(args: Sequence[str]) -> int | None:
        code: int | None = tyro.cli(function, args=args, prog=f"spo {name}", description=summary(function))
        return code

    return run


def summary(function: Callable[..., Any]) -> str:
    """The first line of a docstring."""
    return (function.__doc__ or "").strip().partition("\n")[0]
