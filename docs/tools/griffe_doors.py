"""Lets griffe see the public names of packages whose names are imported lazily.

The second argument of `lazy_names` in a package's `__init__.py` is its list of public names; the imports that resolve
them stand under `TYPE_CHECKING`, where griffe finds them by itself.
"""

from __future__ import annotations

import ast
from typing import Any

import griffe


def public_names(tree: ast.AST) -> list[str] | None:
    """The names in a module's call of `lazy_names`, or None where there is no such call."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "lazy_names":
            homes = call.args[1]
            assert isinstance(homes, ast.Dict)
            return [key.value for key in homes.keys if isinstance(key, ast.Constant)]
    return None


class Doors(griffe.Extension):
    """Sets `exports` of each package from its call of `lazy_names`."""

    def on_module_members(self, *, node: ast.AST | griffe.ObjectNode, mod: griffe.Module, **kwargs: Any) -> None:
        """Read the call and remember its names."""
        names = public_names(node) if isinstance(node, ast.AST) else None
        if names is not None:
            mod.exports = names
