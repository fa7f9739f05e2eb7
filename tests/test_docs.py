"""What the documentation says exists: links, anchors, files, commands and their options, modules, imported names."""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from t2i_spo_plugin import sticker
from t2i_spo_plugin.cli.commands import COMMANDS
from t2i_spo_plugin.training.objectives import OBJECTIVES


ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("comfy_nodes/*.md"),
        *ROOT.glob(".github/**/*.md"),
    ]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FOLDERS = "t2i_spo_plugin|training|eval|comfy_nodes|tests|docs|examples|benchmarks"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose(page))]


def fences(page: Path, *languages: str) -> list[str]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    found: set[str] = set()
    for title in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def command_lines(page: Path) -> list[list[str]]:
    """The words of each `spo …` in a shell block or in inline code."""
    texts = [line for code in fences(page, "sh", "bash") for line in code.replace("\\\n", " ").splitlines()]
    lines = [shlex.split(text, comments=True) for text in texts if "$(" not in text and text.startswith("spo ")]
    inline = (text.split() for text in inline_code(page) if re.match(r"spo [a-z]", text))
    return [*lines, *inline]


@cache
def options_of(command: str) -> str:
    """The help text of a command, of all its actions or objectives where it has some."""
    actions = {
        "comfyui": (["install"], ["check"], ["uninstall"]),
        "train": (["--objective", "dpo"], ["--objective", "spo"], ["--objective", "sft"]),
    }
    text = io.StringIO()
    for action in actions.get(command, ([],)):
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            COMMANDS[command]([*action, "--help"])
    if command == "train":
        # Of the other objectives the names that the command line makes of their fields; a help text takes seconds.
        names = {field.name.rstrip("_") for row in OBJECTIVES.values() for field in dataclasses.fields(row.options)}
        text.write("".join(f" --objective.{name.replace('_', '-')}\n" for name in sorted(names)))
    return text.getvalue()


@every_page
def test_links_lead_somewhere(page):
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(linked), f"{target}: there is no such heading"


@every_page
def test_files_that_are_named_exist(page):
    for text in inline_code(page):
        for path in re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./*-]+", text):
            assert list(ROOT.glob(path.rstrip("./"))), f"there is no {path}"


@every_page
def test_commands_and_their_options_exist(page):
    for words in command_lines(page):
        if words[1].startswith("-") or words[1].isupper():
            continue
        assert words[1] in COMMANDS, f"there is no command spo {words[1]}"
        for option in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", options_of(words[1])), " ".join(words)


@pytest.mark.parametrize("name", ["papers", "training", "how-to-add", "scores", "steering"])
def test_options_that_are_named_alone_belong_to_a_command(name):
    every = "".join(map(options_of, COMMANDS))
    for option in re.findall(r"`(--[\w.-]+)", (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", every), option


@every_page
def test_targets_of_make_exist(page):
    texts = [*inline_code(page), *(line for code in fences(page, "sh", "bash") for line in code.splitlines())]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in texts:
        for target in re.findall(r"^make (?:-\S+ )*([a-z][\w-]*)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"there is no make {target}"


@every_page
def test_modules_that_are_run_exist(page):
    for module in re.findall(r"-m (t2i_spo_plugin[\w.]*)", page.read_text(encoding="utf-8")):
        assert importlib.util.find_spec(module), f"there is no module {module}"


def check_imports(code: str) -> None:
    """Whether `code` compiles and what it imports from this package exists."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("t2i_spo_plugin"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                # A package's submodules are no attributes before they are imported.
                known = hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")
                assert known, f"{node.module} has no {alias.name}"


@every_page
def test_python_blocks_compile_and_import_what_exists(page):
    for code in fences(page, "python"):
        check_imports(code)


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*.py")), ids=name_of)
def test_examples_compile_and_import_from_packages(path):
    code = path.read_text(encoding="utf-8")
    check_imports(code)
    modules = re.findall(r"^(?:from|import) (t2i_spo_plugin[\w.]*)", code, re.MULTILINE)
    assert modules
    for module in modules:
        assert module.count(".") <= 1 and hasattr(importlib.import_module(module), "__path__"), f"{module} is private"


def test_generated_parts_of_pages_are_up_to_date():
    run = [sys.executable, "docs/tools/blocks.py", "--check"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generated_parts_are_found_out_of_date(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "tools")
    blocks = importlib.import_module("blocks")
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert blocks.filled(text) == text
    typed = text.replace("<!-- block: results -->", "<!-- block: results -->\na number typed by hand", 1)
    assert typed != text and blocks.filled(typed) == text


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "docs/results.md"])
def test_the_gain_over_dpo_is_the_measured_one_and_says_what_it_is_made_of(name):
    comparisons = json.loads((sticker.FOLDER / "results.json").read_text(encoding="utf-8"))["comparisons"]
    gain = next(
        one["value"] for one in comparisons if (one["first"], one["second"], one["judge"]) == ("spo", "dpo", "referee")
    )
    text = " ".join(prose(ROOT / name).split())
    assert f"{gain:+.1f}" in text and "SFT term" in text and "prior preservation" in text and "ablation" in text


DOORS = {
    package.name
    for package in (ROOT / "t2i_spo_plugin").iterdir()
    if (package / "__init__.py").is_file() and package.name not in ("cli", "comfy_nodes", "experiments", "networks")
}


def test_every_public_package_has_a_page_in_the_reference():
    pages = {page.stem for page in ROOT.glob("docs/reference/*.md")} - {"index", "t2i_spo_plugin"}
    assert pages == DOORS


@pytest.mark.parametrize("name", ["t2i_spo_plugin", *sorted(f"t2i_spo_plugin.{name}" for name in DOORS)])
def test_the_reference_sees_every_public_name(name):
    # The pages are made without running the package: what is imported lazily must be imported for type checkers too.
    module = importlib.import_module(name)
    assert module.__file__ and module.__doc__
    seen = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(getattr(module, "__all__", ())) - {"__version__"} <= seen


def test_the_cost_model_of_the_guide_finds_what_is_red():
    code = fences(ROOT / "docs" / "how-to-add.md", "python")[0]
    names: dict = {}
    exec(compile(code, "how-to-add.md", "exec"), names)
    report = names["guard"]([Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "white")], "photo")
    assert report.flagged == [True, False]


def test_every_paper_that_the_code_names_is_in_the_table_of_papers():
    listed = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    sources = [path for folder in ("t2i_spo_plugin", "training", "eval") for path in ROOT.glob(f"{folder}/**/*.py")]
    for path in sources:
        for number in re.findall(r"(?i)arxiv[: ]+(\d{4}\.\d{5})", path.read_text(encoding="utf-8")):
            assert number in listed, f"{name_of(path)} names arXiv {number}"
