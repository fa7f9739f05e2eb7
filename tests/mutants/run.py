"""Plants faults one at a time and counts how many the tests see: `make mutants`.

For each source file of `targets.yaml` its faults (`faults.py`) are planted, one after the other, in a copy of the
working tree, and the tests that cover the file run on it until the first of them fails. What is found is kept in
`build/mutants/results.jsonl`; a run that was stopped goes on where it was, and a function that has not changed is not
looked at again, except for the faults that survived when its tests have changed since. `docs/mutants.md` gets the
shares and the survivors.

    python tests/mutants/run.py                                 # every file
    python tests/mutants/run.py t2i_spo_plugin/metrics --jobs 2 # files below a folder
    python tests/mutants/run.py --fresh                         # nothing is taken from earlier runs
    python tests/mutants/run.py --sample 40                     # at most 40 faults of a file, the same ones each time
    python tests/mutants/run.py --sample 0                      # only the report is written anew

A process that has collected the tests is forked for each fault, the code of the function with the fault is exchanged
in it, and the tests that call this function run, the quickest first, so that a fault costs little more than the
quickest test that sees it. Needs POSIX.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import planting
import yaml
from faults import Fault, faults_of
from trees import NOT_THERE, SURVIVED, Host, HostRun, Run, Tree, load


ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Target:
    """A source file and the tests that cover it, both relative to the root of the tree."""

    source: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """What the tests said of one fault; of the function it stands in, and of its tests, the digests."""

    source: str
    fault: str
    line: int
    outcome: str
    source_digest: str
    tests_digest: str


@dataclass(frozen=True)
class Examination:
    """The faults of one source file that were planted, and how many it has."""

    results: list[Result]
    faults: int

    @property
    def caught(self) -> int:
        """How many the tests see."""
        return sum(result.outcome != SURVIVED for result in self.results)

    @property
    def share(self) -> float:
        """Of those that were planted, how many are caught."""
        return self.caught / max(len(self.results), 1)


def read_targets(path: Path = HERE / "targets.yaml") -> list[Target]:
    """The files that are looked at, in the order of the file."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Target(source, tuple(tests)) for source, tests in content.items()]


def read_reasons(path: Path = HERE / "survivors.yaml") -> dict[str, dict[str, str]]:
    """Why a fault that survives changes nothing: source file -> fault -> reason."""
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def ranked(source: str, faults: Sequence[Fault]) -> list[Fault]:
    """The faults of `source` in the order in which they are planted: by the hash of their names.

    The first of them are a sample that is the same every time, and so is what a run has looked at when it is stopped.
    """
    return sorted(faults, key=lambda fault: hashlib.sha256(f"{source}\0{fault.name}".encode()).hexdigest())


class Session:
    """Every result that is known, and the file that keeps them."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.results: dict[tuple[str, str], Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a run that was killed
                    result = Result(**json.loads(line))
                    self.results[result.source, result.fault] = result

    def add(self, result: Result) -> None:
        """Keep `result` at once."""
        self.results[result.source, result.fault] = result
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(result)) + "\n")

    def known(self, target: Target, fault: Fault, source_digest: str, tests_digest: str) -> Result | None:
        """What still holds: the function is the same, and so are the tests or they caught the fault before."""
        result = self.results.get((target.source, fault.name))
        if result is None or result.source_digest != source_digest:
            return None
        return result if result.outcome != SURVIVED or result.tests_digest == tests_digest else None


@dataclass
class _Job:
    """One fault of a target in a tree, and how it may still be looked at."""

    target: Target
    fault: Fault
    run: Run | HostRun | None = None
    ways: list[str] = field(default_factory=list)


def examine(
    targets: Sequence[Target],
    trees: Sequence[Tree],
    session: Session,
    grace: float = 10.0,
    sample: int | None = None,
) -> dict[str, Examination]:
    """Plant every fault of the targets, or a sample of them, several at once where there are several trees.

    Those tests run that call the function of the fault, the quickest first. So a fault that shows only in a test which
    does not call it, but sees what another test left behind, counts as one that survives.

    Args:
        targets: the files and their tests.
        trees: copies of the working tree to plant faults in; source and tests are read from the first.
        session: keeps the results, and knows those of earlier runs.
        grace: seconds of computing beyond four times those of the tests without a fault; then a fault is timed out.
        sample: of more faults than this only so many are planted in a file.

    Raises:
        RuntimeError: the tests fail without any fault, or there are none.
    """
    root = trees[0].folder  # the working tree may change while this runs
    texts = {target.source: (root / target.source).read_text(encoding="utf-8") for target in targets}
    every = {source: ranked(source, faults_of(text)) for source, text in texts.items()}
    tests_digests = {target.source: _digest(_test_files(root, target.tests)) for target in targets}

    def digests(target: Target, fault: Fault) -> tuple[str, str]:
        return source_digest(texts[target.source], fault), tests_digests[target.source]

    # The first of every file before the second of any: a run that is stopped has looked at all of them alike.
    rounds = itertools.zip_longest(
        *([(target, fault) for fault in every[target.source][:sample]] for target in targets)
    )
    todo = [
        _Job(*pair)
        for pair in itertools.chain.from_iterable(rounds)
        if pair is not None and session.known(*pair, *digests(*pair)) is None
    ]
    if todo:
        tests = list(dict.fromkeys(test for job in todo for test in job.target.tests))
        hosts = {tree: Host(tree, tests, list(dict.fromkeys(job.target.source for job in todo))) for tree in trees}
        try:
            _examine(todo, hosts, texts, digests, session, grace)
        finally:
            for tree, host in hosts.items():
                host.close()
                for source, text in texts.items():
                    tree.write(source, text)
    return {
        source: Examination([session.results[source, fault.name] for fault in faults[:sample]], len(faults))
        for source, faults in every.items()
    }


def _examine(
    todo: list[_Job],
    hosts: dict[Tree, Host],
    texts: dict[str, str],
    digests: Callable[[Target, Fault], tuple[str, str]],
    session: Session,
    grace: float,
) -> None:
    for host in hosts.values():
        host.wait()
    coverage = next(iter(hosts.values())).coverage()
    load(coverage.modules)
    seconds = sum(coverage.seconds.values())
    print(f"{len(todo)} faults, {len(coverage.seconds)} tests of {seconds:.0f} s", flush=True)
    running: dict[Tree, _Job] = {}

    def start(tree: Tree, job: _Job) -> None:
        source, span = job.target.source, job.fault.span
        planted = job.fault.plant(texts[source])
        tests = coverage.tests_of(source, span, job.target.tests)
        if job.run is None:
            tree.write(source, planted)
            place = planting.changed_function(texts[source], planted)
            job.ways = ["in place"] if place and tests else ["anew"]
            if place and coverage.is_called_early(source, span):
                job.ways.append("anew")
        if job.ways.pop(0) == "in place":
            place = planting.changed_function(texts[source], planted)
            fault = {"source": source, "text": texts[source], "planted": planted, "place": place}
            job.run = hosts[tree].start(tests, fault, limit(tests))
        else:
            if span is None or not tests:
                tests = tests + [test for test in coverage.among(job.target.tests) if test not in tests]
            job.run = tree.start(tests, limit(tests))

    def limit(tests: Sequence[str]) -> float:
        return 4.0 * sum(coverage.seconds[test] for test in tests) + grace

    try:
        while todo or running:
            for tree in [tree for tree in hosts if tree not in running][: len(todo)]:
                running[tree] = todo.pop(0)
                start(tree, running[tree])
            for tree, job in list(running.items()):
                outcome = job.run.outcome() if job.run else None
                if outcome == NOT_THERE and not job.ways:
                    job.ways.append("anew")
                if outcome in (SURVIVED, NOT_THERE) and job.ways:
                    start(tree, job)
                elif outcome is not None:
                    del running[tree]
                    source, fault = job.target.source, job.fault
                    tree.write(source, texts[source])
                    session.add(Result(source, fault.name, fault.line, outcome, *digests(job.target, fault)))
                    if outcome == SURVIVED:
                        print(f"  {source}:{fault.line}, survived: {fault.name}", flush=True)
            time.sleep(0.02)
    finally:
        for job in running.values():
            if job.run:
                job.run.kill()


def report(examinations: Sequence[Examination], reasons: dict[str, dict[str, str]]) -> str:
    """The shares file by file and every survivor with its reason, as Markdown."""
    lines = [
        "# Planted faults",
        "",
        "The result of `make mutants` when it last ran: faults are planted one at a time (a comparison turned, a sign",
        "changed, a term left out; see `tests/mutants/faults.py`), and the tests of the file run on each. A fault",
        "that no test sees survives; the reason beside it says why it changes nothing that can be observed. Where",
        "only a sample was planted (those faults whose names have the smallest hashes), it says of how many.",
        "",
        "| file | faults | caught | share |",
        "|---|---|---|---|",
    ]
    for one in examinations:
        lines.append(f"| `{one.results[0].source}` | {_count(one)} | {one.caught} | {100 * one.share:.1f} % |")
    together = Examination(
        [result for one in examinations for result in one.results], sum(one.faults for one in examinations)
    )
    lines += [
        f"| together | {_count(together)} | {together.caught} | {100 * together.share:.1f} % |",
        "",
        "## Survivors",
    ]
    for one in examinations:
        survivors = [result for result in one.results if result.outcome == SURVIVED]
        survivors.sort(key=lambda result: result.line)
        if survivors:
            lines += ["", f"### `{survivors[0].source}`", ""]
        for result in survivors:
            reason = reasons.get(result.source, {}).get(result.fault, "no reason is written down")
            lines.append(f"- line {result.line}, `{result.fault}`: {reason}")
    return "\n".join(lines) + "\n"


def _count(one: Examination) -> str:
    planted = len(one.results)
    return str(planted) if planted == one.faults else f"{planted} of {one.faults}"


def reported(target: Target, session: Session, root: Path = ROOT) -> Examination:
    """All that is known of the target, as far as its functions are what they were."""
    text = (root / target.source).read_text(encoding="utf-8")
    faults = faults_of(text)
    known = [(fault, session.results.get((target.source, fault.name))) for fault in faults]
    results = [
        replace(result, line=fault.line)
        for fault, result in known
        if result is not None and result.source_digest == source_digest(text, fault)
    ]
    return Examination(results, len(faults))


def source_digest(text: str, fault: Fault) -> str:
    """Changes with the function that the fault stands in (outside of any, with the file), and with what is planted."""
    lines = text.splitlines()
    part = lines if fault.span is None else lines[fault.span[0] - 1 : fault.span[1]]
    return hashlib.sha256("\n".join(part).encode() + (HERE / "faults.py").read_bytes()).hexdigest()[:16]


def _test_files(root: Path, tests: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for test in tests:
        path = root / test.partition("::")[0]
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return files


def _digest(paths: Sequence[Path]) -> str:
    content = b"\0".join(path.read_bytes() for path in paths)
    return hashlib.sha256(content).hexdigest()[:16]


def main(arguments: Sequence[str]) -> int:
    """Look at the files that are asked for; 1 when a file's share is too small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="source files or folders of them; every target by default")
    parser.add_argument("--jobs", type=int, default=1, help="faults planted at once, each in a tree of its own")
    parser.add_argument("--sample", type=int, help="plant at most so many faults of a file; every one by default")
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    parser.add_argument("--least", type=float, default=0.9, help="share that every file must reach")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "mutants", help="folder for trees and results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "mutants.md", help="the report")
    options = parser.parse_args(arguments)

    targets = read_targets()
    wanted = [target for target in targets if _is_below(target.source, options.files)]
    if not wanted:
        parser.error(f"no target below {', '.join(options.files)}; tests/mutants/targets.yaml lists them")
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_XET": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    session = Session(options.build / "results.jsonl", options.fresh)
    if options.sample != 0:
        load(["hypothesis", "torch"])
    trees = [Tree(ROOT, options.build / f"tree-{number}") for number in range(options.jobs)]
    examined = examine(wanted, trees, session, sample=options.sample)
    # The report holds what earlier runs said of the other targets, and of other faults, too.
    everything = [reported(target, session) for target in targets]
    options.out.write_text(report([one for one in everything if one.results], read_reasons()), encoding="utf-8")
    shares = {source: one.share for source, one in examined.items() if one.results}
    for source, share in shares.items():
        print(f"{100 * share:5.1f} %  {source}")
    return 1 if any(share < options.least for share in shares.values()) else 0


def _is_below(source: str, places: Sequence[str]) -> bool:
    return not places or any(Path(place.rstrip("/")) in (Path(source), *Path(source).parents) for place in places)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
