"""Faults in functions that are loaded already: the code of a function is exchanged where it lies.

So tests are collected once, and a fault costs no import. It goes for faults inside of functions; a fault in a default,
a decorator or a statement of the file itself shows only where the file is read anew.
"""

from __future__ import annotations

import ast
import builtins
import gc
import inspect
import os
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType


Place = tuple[str, int]
"""A function that is no part of another: its name (qualified, from Python 3.11 on) and first line."""


def changed_function(source: str, other: str) -> Place | None:
    """The one function in which two programs differ; None where they differ elsewhere, or in what it closes over."""
    before, after = compile(source, "", "exec"), compile(other, "", "exec")
    if _frame(before) != _frame(after):
        return None
    pairs = list(zip(_functions(before), _functions(after), strict=True))
    changed = [(one, two) for one, two in pairs if _meaning(one) != _meaning(two)]
    if len(changed) != 1 or changed[0][0].co_freevars != changed[0][1].co_freevars:
        return None
    name, line = _place(changed[0][0])
    alike = sum(_place(one) == (name, line) for one, _ in pairs)
    return (name, line) if alike == 1 and "<" not in name.rpartition(".")[2] else None


Functions = dict[Place, list[FunctionType]]


def functions_of(paths: Iterable[str]) -> dict[str, Functions]:
    """Every function that is loaded from these files, by file and place."""
    found: dict[str, Functions] = {os.path.realpath(path): {} for path in paths}
    files: dict[str, str] = {}
    for function in gc.get_objects():
        if type(function) is FunctionType:  # `isinstance` would wake objects that pretend
            file = function.__code__.co_filename
            if file not in files:
                files[file] = os.path.realpath(file)
            if files[file] in found:
                found[files[file]].setdefault(_place(function.__code__), []).append(function)
    return found


def plant(functions: Functions, path: str, source: str, other: str, place: Place) -> bool:
    """Exchange the function of `path` at `place` for that of `other`; False where no such function is loaded."""
    pairs = zip(_functions(compile(source, path, "exec")), _functions(compile(other, path, "exec")), strict=True)
    (code,) = (two for one, two in pairs if _place(one) == place)
    return _exchange(functions, {place: code})


def record(functions: Functions, path: str, source: str, reached: str) -> None:
    """Let every function of `path`, when it is called, call the builtin `reached` with its first line."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            call = ast.parse(f"{reached}({first})").body[0]
            for part in ast.walk(call):
                ast.copy_location(part, node)
            node.body.insert(0, call)
    code = compile(tree, path, "exec")
    _exchange(functions, {_place(one): one for one in _functions(code)})


def let_builtin(name: str, value: object) -> None:
    """Give `value` a name that every module knows."""
    setattr(builtins, name, value)


def _exchange(functions: Functions, codes: dict[Place, CodeType]) -> bool:
    count = 0
    for place, code in codes.items():
        for function in functions.get(place, []):
            if function.__code__.co_freevars == code.co_freevars:
                function.__code__ = code
                count += 1
    return count > 0


def _place(code: CodeType) -> Place:
    return getattr(code, "co_qualname", code.co_name), code.co_firstlineno


def _functions(code: CodeType) -> Iterator[CodeType]:
    """Those of a module or class, and of the classes in it."""
    for part in code.co_consts:
        if isinstance(part, CodeType):
            if part.co_flags & inspect.CO_OPTIMIZED:
                yield part
            else:
                yield from _functions(part)


def _frame(code: CodeType) -> tuple[object, ...]:
    """What a module or class does, without what its functions do."""
    return _meaning(code, inside=False)


def _meaning(code: CodeType, inside: bool = True) -> tuple[object, ...]:
    """What a code object does, wherever it stands in its file."""
    parts: list[object] = []
    for part in code.co_consts:
        if not isinstance(part, CodeType):
            parts.append((type(part), repr(part)))
        elif inside or not part.co_flags & inspect.CO_OPTIMIZED:
            parts.append(_meaning(part, inside))
        else:
            parts.append(part.co_name)
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return code.co_code, *parts, names, code.co_argcount, code.co_kwonlyargcount, code.co_flags
