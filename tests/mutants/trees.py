"""Copies of the working tree, and tests that run in them in a process of their own."""

from __future__ import annotations

import compileall
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest


COPIED = ("t2i_spo_plugin", "training", "eval", "comfy_nodes", "tests", "pyproject.toml")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0")
CAUGHT, SURVIVED, TIMED_OUT = "caught", "survived", "timed out"
NO_TESTS, NO_VERDICT = 5, 99
"""Exit codes: pytest's, and ours."""


@dataclass(frozen=True)
class Coverage:
    """What each test needs and reaches.

    Attributes:
        seconds: by test, in the order in which they ran.
        lines: by test, where the functions of the source file that it calls begin.
        modules: what the tests imported beside the tree's own modules.
    """

    seconds: dict[str, float]
    lines: dict[str, set[int]]
    modules: list[str]

    def tests_of(self, span: tuple[int, int]) -> list[str]:
        """The tests that reach a function which begins within `span`, the quickest first."""
        reaching = [test for test, lines in self.lines.items() if any(span[0] <= line <= span[1] for line in lines)]
        return sorted(reaching, key=lambda test: self.seconds[test])


class Tree:
    """A copy of the working tree in which one fault stands at a time."""

    def __init__(self, root: Path, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in COPIED:
            source = root / name
            if source.is_dir():
                shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            elif source.is_file():
                shutil.copy(source, folder / name)
        self.folder = folder
        # A fault then costs one compilation.
        compileall.compile_dir(str(folder), quiet=2, workers=1)

    def write(self, source: str, text: str) -> None:
        """Let `source` read `text`."""
        path = self.folder / source
        for file in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            file.unlink()
        path.write_text(text, encoding="utf-8")

    def start(self, tests: Sequence[str], recorded: str = "") -> Run:
        """Run tests of this tree until one fails.

        Args:
            tests: files, folders or single tests.
            recorded: a source file; what the tests call of it is then in `coverage`.
        """
        child = os.fork()
        if child == 0:
            code = NO_VERDICT
            try:
                os.setsid()
                code = _run_tests(self.folder, tests, recorded)
            finally:
                os._exit(code)
        return Run(child, self.folder, chosen=any("::" in test for test in tests))

    def coverage(self) -> Coverage:
        """Of the last recorded run."""
        content = json.loads((self.folder / "coverage.json").read_text(encoding="utf-8"))
        lines = {test: set(numbers) for test, numbers in content["lines"].items()}
        return Coverage(content["seconds"], lines, content["modules"])


class Run:
    """Tests that run in a process of their own."""

    def __init__(self, process: int, folder: Path, chosen: bool = False) -> None:
        self.process, self.folder, self.chosen = process, folder, chosen
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.start

    @property
    def output(self) -> str:
        """What pytest printed."""
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")

    def outcome(self, timeout: float) -> str | None:
        """`caught`, `survived` or `timed out`; None while it goes on.

        Raises:
            RuntimeError: no test ran, or they ran on another copy of the package.
        """
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            if code == NO_TESTS and self.chosen:
                return SURVIVED  # the fault changed the names of the tests: all of them will tell
            if code in (NO_TESTS, NO_VERDICT):
                raise RuntimeError(f"the tests did not run in {self.folder}\n{self.output}")
            return SURVIVED if code == 0 else CAUGHT
        if self.seconds < timeout:
            return None
        self.kill()
        return TIMED_OUT

    def kill(self) -> None:
        """End it and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.process, 0)


def load(modules: Sequence[str]) -> None:
    """Import libraries once, so that every fork has them."""
    for name in modules:
        # Some cannot be imported by themselves, or only where the tests have prepared something.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _run_tests(folder: Path, tests: Sequence[str], recorded: str) -> int:
    """In the forked process: the exit code of pytest on `tests` of the copy."""
    os.chdir(folder)
    with open("output.txt", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["PYTHONPATH"] = str(folder)
    if not recorded:
        # The recorded run leaves bytecode of the tests, as pytest rewrites them; faults leave none.
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    here = str(Path(__file__).parent)
    sys.path[:] = [str(folder)] + [path for path in sys.path if path not in (str(Path(here).parents[1]), here, "")]

    recorder = _Recorder(folder / recorded) if recorded else None
    plugins: list[Any] = [_Order(tests)] + ([recorder] if recorder else [])
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    code = int(pytest.main([*OPTIONS, *files], plugins=plugins))
    package = sys.modules.get("t2i_spo_plugin")
    if package is not None and not str(package.__file__).startswith(str(folder)):
        return NO_VERDICT  # the tests ran on another copy of the package, and prove nothing
    if recorder is not None:
        recorder.write(folder)
    return code


class _Order:
    """A pytest plugin: of single tests, only those that are asked for, in their order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.rank = {test: number for number, test in enumerate(tests) if "::" in test}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.rank:
            items[:] = sorted(
                (item for item in items if item.nodeid in self.rank), key=lambda item: self.rank[item.nodeid]
            )


class _Recorder:
    """A pytest plugin: which functions of a file each test calls, and how long it takes.

    What is called while tests are collected counts for every test, and what is called while fixtures are set up for
    every test of the file, since a fixture may serve them all.
    """

    def __init__(self, source: Path) -> None:
        self.source = os.path.realpath(source)
        self.matches: dict[str, bool] = {}
        self.called: set[int] = set()
        self.always: set[int] = set()
        self.setup: dict[str, set[int]] = {}
        self.lines: dict[str, set[int]] = {}
        self.seconds: dict[str, float] = {}
        self.before = set(sys.modules)

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            if file not in self.matches:
                self.matches[file] = os.path.realpath(file) == self.source
            if self.matches[file]:
                self.called.add(frame.f_code.co_firstlineno)

    def pytest_sessionstart(self) -> None:
        sys.setprofile(self.profile)

    def pytest_collection_finish(self) -> None:
        self.always, self.called = self.called, set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        start = time.monotonic()
        result = yield
        self.seconds[item.nodeid] = time.monotonic() - start
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        self.setup.setdefault(item.nodeid.partition("::")[0], set()).update(self.called)
        self.called = set()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        result = yield
        self.lines[item.nodeid], self.called = self.called, set()
        return result

    def write(self, folder: Path) -> None:
        sys.setprofile(None)
        lines = {
            test: sorted(lines | self.setup.get(test.partition("::")[0], set()) | self.always)
            for test, lines in self.lines.items()
        }
        modules = [
            name
            for name, module in list(sys.modules.items())
            if name not in self.before
            and (file := getattr(module, "__file__", None))
            and not file.startswith(str(folder))
        ]
        content = {"seconds": self.seconds, "lines": lines, "modules": modules}
        (folder / "coverage.json").write_text(json.dumps(content), encoding="utf-8")
