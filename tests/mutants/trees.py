"""Copies of the working tree, and tests that run in them in processes of their own."""

from __future__ import annotations

import compileall
import contextlib
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import planting
import pytest


COPIED = ("t2i_spo_plugin", "training", "eval", "comfy_nodes", "tests", "pyproject.toml")
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--hypothesis-seed=0")
CAUGHT, SURVIVED, TIMED_OUT, NOT_THERE = "caught", "survived", "timed out", "not there"
NO_TESTS, NOT_PLANTED, NO_VERDICT = 5, 98, 99
"""Exit codes: pytest's, and ours."""
REACHED = "_function_reached_"
WAIT = 20
"""Seconds on the clock for each second of computing that a fault may take: other programs may be running."""


@dataclass(frozen=True)
class Coverage:
    """What each test reaches and needs.

    Attributes:
        seconds: of computing, by test, in the order in which they ran.
        lines: by source and test, where the functions that it calls begin.
        always: by source, where the functions begin that are called before any test runs.
        modules: what the tests imported beside the tree's own modules.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[str, set[int]]]
    always: dict[str, set[int]]
    modules: list[str]

    def tests_of(self, source: str, span: tuple[int, int] | None, among: Sequence[str]) -> list[str]:
        """The tests that reach a function which begins within `span`, or any of the file; the quickest first.

        Args:
            source: the file.
            span: first and last line.
            among: only tests of these files and folders, or these single ones.
        """
        reaching = [
            test
            for test, lines in self.lines[source].items()
            if lines and (span is None or any(span[0] <= line <= span[1] for line in lines))
        ]
        return sorted(self.among(among, reaching), key=lambda test: self.seconds[test])

    def among(self, places: Sequence[str], tests: Iterable[str] = ()) -> list[str]:
        """Those of the tests, or of all, that are of these files and folders, or these single ones."""
        return [test for test in tests or self.seconds if any(_is_part(test, place) for place in places)]

    def is_called_early(self, source: str, span: tuple[int, int] | None) -> bool:
        """Whether a function which begins within `span` is called before any test runs."""
        return span is not None and any(span[0] <= line <= span[1] for line in self.always[source])


class Tree:
    """A copy of the working tree in which one fault stands at a time."""

    def __init__(self, root: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in COPIED:
            _copy(root / name, folder / name)
        self.folder = folder
        # A fault then costs one compilation.
        compileall.compile_dir(str(folder), quiet=2, workers=1)

    def write(self, source: str, text: str) -> None:
        """Let `source` read `text`."""
        path = self.folder / source
        for file in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            file.unlink()
        path.write_text(text, encoding="utf-8")

    @property
    def output(self) -> str:
        """What pytest printed last."""
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")

    def start(self, tests: Sequence[str], seconds: float) -> Run:
        """Run tests of this tree, as it stands now, until one fails.

        Args:
            tests: files, folders or single tests.
            seconds: of computing, after which they are ended.
        """
        child = os.fork()
        if child == 0:
            code = NO_VERDICT
            try:
                os.setsid()
                _limit(seconds)
                # The tests that were collected first leave bytecode, as pytest rewrites them; faults leave none.
                sys.dont_write_bytecode = True
                os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
                code = _pytest_main(self.folder, tests, [_Order(tests)])
            finally:
                os._exit(code)
        return Run(child, self.folder, WAIT * seconds)


def _is_part(test: str, place: str) -> bool:
    return test == place or test.startswith((place.rstrip("/") + "/", place + "::", place + "["))


def _copy(source: Path, copy: Path) -> None:
    """Make `copy` what `source` is; files that are the same already stay, with their bytecode."""
    if source.is_symlink() or source.is_file():
        here, there = (path.lstat() if path.is_symlink() or path.exists() else None for path in (source, copy))
        if here and there and (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns):
            return
        if copy.is_dir() and not copy.is_symlink():
            shutil.rmtree(copy)
        copy.unlink(missing_ok=True)
        shutil.copy2(source, copy, follow_symlinks=False)
    elif source.is_dir():
        if copy.is_symlink() or copy.is_file():
            copy.unlink()
        copy.mkdir(exist_ok=True)
        names = {path.name for path in source.iterdir()} - {"__pycache__"}
        for path in copy.iterdir():
            if path.name not in names | {"__pycache__"}:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in sorted(names):
            _copy(source / name, copy / name)


class Run:
    """Tests that run in a process of their own."""

    def __init__(self, process: int, folder: Path, patience: float) -> None:
        self.process, self.folder = process, folder
        self.end = time.monotonic() + patience

    def outcome(self) -> str | None:
        """`caught`, `survived` or `timed out`; None while it goes on.

        Raises:
            RuntimeError: no test ran, or they ran on another copy of the package.
        """
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if ended:
            return _verdict(os.waitstatus_to_exitcode(status), self.folder)
        if time.monotonic() < self.end:
            return None
        self.kill()
        return TIMED_OUT

    def kill(self) -> None:
        """End it and everything that it started."""
        _kill(self.process)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.process, 0)


class Host:
    """A process that has collected tests of a tree, and forks another one for each fault."""

    def __init__(self, tree: Tree, tests: Sequence[str], sources: Sequence[str]) -> None:
        self.tree, self.tests, self.sources = tree, tests, sources
        reading, telling = os.pipe()
        hearing, asking = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            try:
                os.setsid()
                os.close(reading)
                os.close(asking)
                with os.fdopen(hearing, "r") as requests, os.fdopen(telling, "w") as answers:
                    recorder = _Recorder(tree.folder, sources)
                    sys.setprofile(recorder.profile)
                    _pytest_main(tree.folder, tests, [recorder, _Server(tree.folder, recorder, requests, answers)])
            finally:
                os._exit(0)
        os.close(telling)
        os.close(hearing)
        self.answers, self.requests = os.fdopen(reading, "r"), os.fdopen(asking, "w")

    def wait(self) -> None:
        """Until the tests are collected.

        Raises:
            RuntimeError: there are none.
        """
        if not self._answer().get("tests"):
            raise RuntimeError(f"{', '.join(self.sources)}: the tests did not run\n{self.tree.output}")

    def coverage(self, seconds: float = 3600.0) -> Coverage:
        """What the tests reach when no fault stands in the tree.

        Raises:
            RuntimeError: they fail.
        """
        run = self.start([], None, seconds)
        while (outcome := run.outcome()) is None:
            time.sleep(0.02)
        if outcome != SURVIVED:
            raise RuntimeError(f"{', '.join(self.sources)}: its tests fail without any fault\n{self.tree.output}")
        content = json.loads((self.tree.folder / "coverage.json").read_text(encoding="utf-8"))
        lines = {
            source: {test: set(numbers) for test, numbers in by_test.items()}
            for source, by_test in content["lines"].items()
        }
        always = {source: set(numbers) for source, numbers in content["always"].items()}
        return Coverage(content["seconds"], lines, always, content["modules"])

    def start(self, tests: Sequence[str], fault: dict[str, Any] | None, seconds: float) -> HostRun:
        """Run single tests with a fault planted, or all of them without one and record what they reach."""
        self.requests.write(json.dumps({"tests": list(tests), "fault": fault, "seconds": seconds}) + "\n")
        self.requests.flush()
        return HostRun(self, self._answer()["process"], WAIT * seconds)

    def _answer(self) -> dict[str, Any]:
        line = self.answers.readline()
        return json.loads(line) if line else {}

    def close(self) -> None:
        """End it."""
        _kill(self.process)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.process, 0)
        self.answers.close()
        self.requests.close()


class HostRun:
    """Tests that run in a process that a host has forked."""

    def __init__(self, host: Host, process: int, patience: float) -> None:
        self.host, self.process = host, process
        self.end = time.monotonic() + patience
        self.late = False

    def outcome(self) -> str | None:
        """`caught`, `survived` or `timed out`; None while it goes on, and `not there` without the function."""
        if select.select([self.host.answers], [], [], 0.0)[0]:
            code = self.host._answer()["code"]
            if code == NOT_PLANTED:
                return NOT_THERE
            return TIMED_OUT if self.late else _verdict(code, self.host.tree.folder)
        if time.monotonic() > self.end and not self.late:
            self.late = True
            self.kill()
        return None

    def kill(self) -> None:
        """End it and everything that it started."""
        _kill(self.process)


def load(modules: Sequence[str]) -> None:
    """Import libraries once, so that every fork has them."""
    for name in modules:
        # Some cannot be imported by themselves, or only where the tests have prepared something.
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def _verdict(code: int, folder: Path) -> str:
    if code in (NO_TESTS, NO_VERDICT):
        output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the tests did not run in {folder}\n{output}")
    if code == -signal.SIGXCPU:
        return TIMED_OUT
    return SURVIVED if code == 0 else CAUGHT


def _kill(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _limit(seconds: float) -> None:
    """End this process after so much computing from now on."""
    limit = int(time.process_time() + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))


def _pytest_main(folder: Path, tests: Sequence[str], plugins: Sequence[Any]) -> int:
    """In a forked process: the exit code of pytest on `tests` of the copy."""
    os.chdir(folder)
    with open("output.txt", "wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ["PYTHONPATH"] = str(folder)
    here = str(Path(__file__).parent)
    sys.path[:] = [str(folder)] + [path for path in sys.path if path not in (str(Path(here).parents[1]), here, "")]
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    code = int(pytest.main([*OPTIONS, f"--basetemp={folder / 'tmp'}", *files], plugins=list(plugins)))
    return code if _is_of(folder) else NO_VERDICT


def _is_of(folder: Path) -> bool:
    """Whether the package was imported from `folder`: tests of another copy prove nothing."""
    package = sys.modules.get("t2i_spo_plugin")
    return package is None or str(package.__file__).startswith(str(folder))


class _Order:
    """A pytest plugin: of single tests, only those that are asked for, in their order.

    A fault may change the parameters of a test, and with them its name: then all of its cases run.
    """

    def __init__(self, tests: Sequence[str]) -> None:
        self.rank: dict[str, int] = {}
        for number, test in enumerate(tests):
            self.rank[test] = number
            self.rank.setdefault(test.partition("[")[0], number)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        cases = {item.nodeid for item in items}
        ranks = [
            (self.rank.get(item.nodeid if item.nodeid in self.rank else item.nodeid.partition("[")[0]), item)
            for item in items
            if item.nodeid in self.rank or not {test for test in self.rank if "[" in test} <= cases
        ]
        chosen = [(rank, number, item) for number, (rank, item) in enumerate(ranks) if rank is not None]
        items[:] = [item for _, _, item in sorted(chosen, key=lambda one: one[:2])]


class _Server:
    """A pytest plugin of a host: instead of running the tests, it forks a process for each request and runs some."""

    def __init__(self, folder: Path, recorder: _Recorder, requests: TextIO, answers: TextIO) -> None:
        self.folder, self.recorder, self.requests, self.answers = folder, recorder, requests, answers
        self.functions: dict[str, planting.Functions] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for source in self.recorder.paths.values():
            package = "" if source.startswith("t2i_spo_plugin/") else "t2i_spo_plugin."
            load([package + source.removesuffix(".py").replace("/", ".")])
        self.functions = planting.functions_of(self.recorder.paths)
        gc.collect()
        gc.freeze()  # a fork copies what it changes, and looking for garbage changes everything
        tests = [item.nodeid for item in session.items]
        self._answer(tests=tests if not session.testsfailed and _is_of(self.folder) else [])
        for line in self.requests:
            request = json.loads(line)
            child = os.fork()
            if child == 0:
                code = NO_VERDICT
                try:
                    os.setsid()
                    _limit(request["seconds"])
                    sys.dont_write_bytecode = True
                    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
                    code = self._run(session, request)
                finally:
                    os._exit(code)
            self._answer(process=child)
            self._answer(code=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        return True

    def _answer(self, **answer: Any) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def _run(self, session: pytest.Session, request: dict[str, Any]) -> int:
        items, fault = session.items, request["fault"]
        if fault is None:
            self.recorder.begin(self.functions)
        else:
            by_name = {item.nodeid: item for item in items}
            items = [by_name[test] for test in request["tests"]]
            path = os.path.realpath(self.folder / fault["source"])
            functions = self.functions[path]
            if not planting.plant(functions, path, fault["text"], fault["planted"], tuple(fault["place"])):
                return NOT_PLANTED
        for item, following in zip(items, [*items[1:], None], strict=True):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                return 1
        if fault is None:
            self.recorder.write()
        return 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with (self.folder / "output.txt").open("a", encoding="utf-8") as output:
                output.write(f"{report.nodeid}\n{report.longreprtext}\n")


class _Recorder:
    """A pytest plugin: which functions of the sources each test calls, and how long it takes.

    What is called while fixtures are set up counts for every test of the file, since a fixture may serve them all.
    """

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        self.folder = folder
        self.paths = {os.path.realpath(folder / source): source for source in sources}
        self.sources: dict[str, str | None] = {}
        self.called: set[tuple[str, int]] = set()
        self.always: set[tuple[str, int]] = set()
        self.setup: dict[str, set[tuple[str, int]]] = {}
        self.lines: dict[str, set[tuple[str, int]]] = {}
        self.seconds: dict[str, float] = {}
        self.before = set(sys.modules)

    def profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            if file not in self.sources:
                self.sources[file] = self.paths.get(os.path.realpath(file))
            source = self.sources[file]
            if source is not None:
                self.called.add((source, frame.f_code.co_firstlineno))

    def pytest_collection_finish(self) -> None:
        sys.setprofile(None)
        self.always, self.called = self.called, set()

    def begin(self, functions: dict[str, planting.Functions]) -> None:
        """From now on: the functions tell that they are called."""
        for number, (path, source) in enumerate(self.paths.items()):
            planting.let_builtin(f"{REACHED}{number}", lambda line, source=source: self.called.add((source, line)))
            text = Path(path).read_text(encoding="utf-8")
            planting.record(functions[path], path, text, f"{REACHED}{number}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        start = sum(os.times()[:4])
        result = yield
        self.seconds[item.nodeid] = sum(os.times()[:4]) - start
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

    def write(self) -> None:
        """Leave what was recorded in `coverage.json`."""
        reached = {test: lines | self.setup.get(test.partition("::")[0], set()) for test, lines in self.lines.items()}
        content = {
            "seconds": self.seconds,
            "lines": {
                source: {test: sorted(line for of, line in lines if of == source) for test, lines in reached.items()}
                for source in self.paths.values()
            },
            "always": {
                source: sorted(line for of, line in self.always if of == source) for source in self.paths.values()
            },
            "modules": [
                name
                for name, module in list(sys.modules.items())
                if name not in self.before
                and (file := getattr(module, "__file__", None))
                and not file.startswith(str(self.folder))
            ],
        }
        (self.folder / "coverage.json").write_text(json.dumps(content), encoding="utf-8")
