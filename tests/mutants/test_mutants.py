"""The mutation tester plants what it says it plants, and believes only the tests."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.faults import faults_of


HERE = Path(__file__).parent

PLANTED = {
    "order": ("x = a < b", {"(a <= b)", "(a >= b)"}),
    "equality": ("x = a == b", {"(a != b)"}),
    "identity": ("x = a is None", {"(a is not None)"}),
    "membership": ("x = a not in b", {"(a in b)"}),
    "chain": ("x = 0 < a <= n", {"(0 <= a <= n)", "(0 < a < n)", "(1)"}),
    "sum": ("x = a + b", {"(a - b)", "(a)", "(b)"}),
    "difference": ("x = a - b", {"(a + b)", "(a)"}),
    "quotient": ("x = a / b", {"(a * b)", "(a)"}),
    "power": ("x = a ** b", {"(a * b)"}),
    "sign": ("x = -a", {"(a)"}),
    "negation": ("x = not a", {"(a)"}),
    "conjunction": ("x = a and b", {"(a or b)", "(a)", "(b)"}),
    "whole number": ("x = 3", {"(4)"}),
    "fraction": ("x = 0.5", {"(0.55)"}),
    "zero": ("x = 0.0", {"(1.0)"}),
    "truth": ("x = True", {"(False)"}),
    "extreme": ("x = max(a, b)", {"(min(a, b))"}),
    "mean": ("x = a.mean(dim)", {"(a.sum(dim))"}),
    "method that is left out": ("x = a.clamp(low)", {"(a)"}),
    "function that is left out": ("x = torch.sqrt(a)", {"(a)"}),
    "choice": ("x = a if c else b", {"(a)", "(b)"}),
    "condition": ("if a:\n    b = c", {"(False)", "(not a)"}),
    "check": ("if a > b:\n    raise ValueError(f'{a} > {b + 1}')", {"(False)", "(a >= b)", "(a <= b)"}),
    "filter": ("x = [a for a in b if a.c]", {"(True)"}),
    "call": ("def f():\n    a.append(b)", {"pass"}),
    "accumulation": ("def f(a):\n    a += b", {"pass"}),
    "second assignment": ("def f(a):\n    a = b\n    c = d", {"pass"}),
    "break": ("for a in b:\n    break", {"continue"}),
    "default": ("def f(a=2):\n    return a", {"(3)"}),
    "decorator": ("@torch.no_grad()\ndef f():\n    return a", {"(lambda function: function)"}),
}

TEXT = """
'''A docstring: 1 < 2.'''
from a import b
Number = int | float
if TYPE_CHECKING:
    from c import d
def f(a: Literal[1], b: int) -> Literal[2]:
    '''Another: a + b.'''
    c = f"{a + 1}" + "x"
    warnings.warn("a" if a > 1 else "b")
    print(a + 1)
    for c, d in zip(a, b, strict=True):
        pass
    assert a > 1
    raise ValueError(a + 1)
"""


@pytest.mark.parametrize("kind", PLANTED)
def test_each_kind_of_fault_is_planted(kind):
    source, expected = PLANTED[kind]
    planted = {fault.after for fault in faults_of(source)}
    assert planted == expected


def test_messages_types_and_docstrings_are_left_alone():
    assert faults_of(TEXT) == []


def test_a_fault_changes_its_own_place_only():
    source = "def f(a):\n    # ü: two bytes\n    return a + 1 if a > 0 else (\n        a - 1\n    )\n"
    faults = faults_of(source)
    planted = {fault.name: fault.plant(source) for fault in faults}
    assert len(set(planted.values()) | {source}) == len(planted) + 1 == len(faults) + 1
    assert planted["f: a > 0 -> (a >= 0)"] == source.replace("a > 0", "(a >= 0)")
    assert planted["f: a - 1 -> (a)"] == source.replace("a - 1", "(a)")
    assert {fault.line for fault in faults} == {3, 4}


def test_a_fault_keeps_its_name_when_its_function_moves():
    source = "def f(a):\n    return a + a + a\n\nclass C:\n    def g(self):\n        return 1\n"
    names = [fault.name for fault in faults_of(source)]
    assert "C.g: 1 -> (2)" in names and len(set(names)) == len(names)
    assert names == [fault.name for fault in faults_of("import x\n\n\n" + source)]


@pytest.fixture
def toy(tmp_path):
    """A tree with one module, of which the tests cover a part."""
    (tmp_path / "t2i_spo_plugin").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "t2i_spo_plugin" / "__init__.py").touch()
    (tmp_path / "t2i_spo_plugin" / "toy.py").write_text("def longer(a, b):\n    return a > b\n")
    (tmp_path / "tests" / "test_toy.py").write_text(
        "from t2i_spo_plugin.toy import longer\n\n\ndef test_longer():\n    assert longer(2, 1) and not longer(1, 2)\n"
    )
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\naddopts = '--import-mode=importlib'\n")
    return tmp_path


def examine(root, tests="tests/test_toy.py", sample=None):
    """Outcomes by fault, how many faults were planted, and the report."""
    code = (
        f"import hypothesis, json, pytest, sys; sys.path.insert(0, {str(HERE)!r})\n"
        "from pathlib import Path; from run import Session, Target, examine, report; from trees import Tree\n"
        "root = Path(sys.argv[1]); session = Session(root / 'build' / 'results.jsonl')\n"
        "trees = [Tree(root, root / 'build' / f'tree-{number}') for number in range(2)]\n"
        "before = len(session.results) and len((root / 'build' / 'results.jsonl').read_text().splitlines())\n"
        "target, sample = Target('t2i_spo_plugin/toy.py', (sys.argv[2],)), json.loads(sys.argv[3])\n"
        "one = examine([target], trees, session, 10.0, sample)[target.source]\n"
        "planted = len((root / 'build' / 'results.jsonl').read_text().splitlines()) - before\n"
        "text = report([one], {'t2i_spo_plugin/toy.py': {'longer: a > b -> (a >= b)': 'a reason'}})\n"
        "print(json.dumps([{r.fault: r.outcome for r in one.results}, planted, text]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root), tests, json.dumps(sample)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def test_faults_that_no_test_sees_survive_and_are_planted_again_when_the_tests_change(toy):
    source = (toy / "t2i_spo_plugin" / "toy.py").read_text()
    outcomes, planted, text = examine(toy)
    assert outcomes == {"longer: a > b -> (a <= b)": "caught", "longer: a > b -> (a >= b)": "survived"}
    assert planted == 2 and (toy / "t2i_spo_plugin" / "toy.py").read_text() == source
    assert "| `t2i_spo_plugin/toy.py` | 2 | 1 | 50.0 % |" in text
    assert "- line 2, `longer: a > b -> (a >= b)`: a reason" in text
    assert examine(toy)[:2] == [outcomes, 0]

    with (toy / "tests" / "test_toy.py").open("a") as file:
        file.write("\n\ndef test_equal():\n    assert not longer(1, 1)\n")
    outcomes, planted, text = examine(toy)
    assert planted == 1 and set(outcomes.values()) == {"caught"} and "| 2 | 2 | 100.0 % |" in text


def test_a_sample_is_the_same_every_time_and_part_of_a_larger_one(toy):
    (toy / "t2i_spo_plugin" / "toy.py").write_text("def longer(a, b):\n    return a > b and a - b > 0\n")
    samples = [set(examine(toy, sample=size)[0]) for size in (2, 4)]
    assert list(map(len, samples)) == [2, 4] and samples[0] < samples[1]
    outcomes, planted, text = examine(toy, sample=4)
    assert set(outcomes) == samples[1] and planted == 0
    every = len(faults_of((toy / "t2i_spo_plugin" / "toy.py").read_text()))
    assert every > 4 and f"| `t2i_spo_plugin/toy.py` | 4 of {every} |" in text
    outcomes, planted, text = examine(toy)
    assert planted == every - 4 and f"| `t2i_spo_plugin/toy.py` | {every} |" in text


def test_faults_outside_of_functions_and_in_what_tests_are_collected_with_are_caught(toy):
    """A constant, a default, a function that gives a test its parameters: the file is read anew with the fault."""
    (toy / "t2i_spo_plugin" / "toy.py").write_text(
        "LEAST = 2\n\n\ndef more(a, b=3):\n    return a + b\n\n\ndef cases():\n    return [5]\n"
    )
    (toy / "tests" / "test_toy.py").write_text(
        "import pytest\nfrom t2i_spo_plugin import toy\n\n\n"
        "@pytest.mark.parametrize('case', toy.cases())\ndef test_more(case):\n    assert toy.more(toy.LEAST) == case\n"
    )
    outcomes, _, _ = examine(toy)
    assert len(outcomes) == 6 and set(outcomes.values()) == {"caught"}


@pytest.mark.slow
def test_faults_of_a_new_function_are_planted_and_endless_loops_are_ended(toy):
    examine(toy)
    with (toy / "t2i_spo_plugin" / "toy.py").open("a") as file:
        file.write("\n\ndef count(n):\n    while n > 0:\n        n = n - 1\n    return n\n")
    with (toy / "tests" / "test_toy.py").open("a") as file:
        file.write("\n\ndef test_count():\n    from t2i_spo_plugin.toy import count\n    assert count(3) == 0\n")
    outcomes, planted, _ = examine(toy)
    # Of the function that is as it was, only the fault that survived, since the tests have changed.
    assert planted == 8 and len(outcomes) == 9 and outcomes["count: n = n - 1 -> pass"] == "timed out"


def test_tests_that_fail_or_are_not_there_prove_nothing(toy):
    with pytest.raises(RuntimeError, match="No such file"):
        examine(toy, "tests/test_absent.py")
    (toy / "tests" / "test_empty.py").touch()
    with pytest.raises(RuntimeError, match="the tests did not run"):
        examine(toy, "tests/test_empty.py")
    (toy / "tests" / "test_toy.py").write_text("def test_nothing():\n    assert False\n")
    with pytest.raises(RuntimeError, match="its tests fail without any fault"):
        examine(toy)


def test_every_target_and_its_tests_exist():
    import yaml

    root = HERE.parents[1]
    targets = yaml.safe_load((HERE / "targets.yaml").read_text(encoding="utf-8"))
    for source, tests in targets.items():
        assert (root / source).is_file() and tests, source
        assert all((root / test.partition("::")[0]).exists() for test in tests), source
