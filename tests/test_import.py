"""What importing loads, and what the doors of the packages promise."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import t2i_spo_plugin


ROOT = Path(__file__).parent.parent
LIGHT = (
    "adapters.adapter",
    "adapters.comfyui",
    "cost.vision",
    "errors",
    "files",
    "gating.gate_network",
    "guards.page",
    "guards.uascore",
    "html",
    "images",
    "metrics.scores",
    "networks.backbone",
    "quality.normalise",
)
HEAVY = ("accelerate", "diffusers", "huggingface_hub", "peft", "pyarrow", "transformers")
DOORS = sorted(
    Path(folder, "__init__.py").relative_to(ROOT)
    for folder, _, names in os.walk(ROOT / "t2i_spo_plugin", followlinks=True)
    if "__init__.py" in names and "lazy_names(" in Path(folder, "__init__.py").read_text(encoding="utf-8")
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_importing_the_package_loads_nothing_but_itself_and_is_quick():
    """A package that loads a library is never quick; on a busy machine one of five tries still is."""
    code = (
        "import sys, time; before = set(sys.modules); start = time.perf_counter(); import t2i_spo_plugin\n"
        "spent = time.perf_counter() - start; roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(spent, *sorted(roots - set(sys.stdlib_module_names)))"
    )
    spent = []
    while len(spent) < 5 and min(spent, default=1.0) >= 0.3:
        seconds, *roots = python(code).stdout.split()
        assert roots == ["t2i_spo_plugin"]
        spent.append(float(seconds))
    assert min(spent) < 0.3, spent


def test_the_light_part_needs_no_diffusion_library():
    """Imported with all of them made impossible to import."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}));"
    modules = ", ".join(f"t2i_spo_plugin.{name}" for name in LIGHT)
    done = python(f"{blocked} import {modules}")
    assert done.returncode == 0, done.stderr
    assert python(f"{blocked} import diffusers").returncode != 0


def test_errors_can_be_caught_without_torch():
    done = python("import sys; from t2i_spo_plugin import SPOError; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_public_names_open_no_socket_when_they_are_imported():
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "import t2i_spo_plugin\n"
        "for name in t2i_spo_plugin.__all__: getattr(t2i_spo_plugin, name)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["training", "training.config", "eval", "eval.config", "comfy_nodes"])
def test_folders_at_the_top_can_be_imported_from_the_root(module):
    done = python(f"import {module}; assert {module}.__name__ == {module!r}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.parent.as_posix())
def test_doors_give_every_name_from_the_file_that_type_checkers_see(door):
    tree = ast.parse((ROOT / door).read_text(encoding="utf-8"))
    seen = {
        alias.asname: (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    (table,) = (
        ast.literal_eval(node.args[1])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_names"
    )
    assert {name: (module, name) for name, module in table.items()} == seen

    package = importlib.import_module(door.parent.as_posix().replace("/", "."))
    assert list(table) == sorted(table) == package.__all__
    assert all(getattr(package, name) is not None for name in table)
    assert set(table) <= set(dir(package)) and not hasattr(package, "no_such_name")
    # A submodule of that name would take the name's place once it is imported.
    assert not [name for name in table if (ROOT / door.parent / f"{name}.py").exists()]
    assert not [name for name in table if (ROOT / door.parent / name).exists()]


def test_the_root_is_a_door_with_every_error_that_users_may_catch():
    from t2i_spo_plugin import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert kinds <= set(t2i_spo_plugin.__all__)
