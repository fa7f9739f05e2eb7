"""What mkdocs does otherwise than GitHub: pages of the repository's root, and links that leave `docs/`.

The API reference is checked after the build: every public name of a package has to be on its page.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from griffe_doors import public_names
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?P<head>!?\[(?P<text>[^\]]*)\])\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages as if they stood in `docs/`."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=translate(text, source)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links of a page in `docs/` to files elsewhere."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return translate(markdown, f"docs/{page.file.src_uri}")


def on_post_build(config: MkDocsConfig, **kwargs: Any) -> None:
    """Fail when a page of the reference lacks a public name."""
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for package in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            source = ROOT / package.replace(".", "/") / "__init__.py"
            names = public_names(ast.parse(source.read_text(encoding="utf-8"))) or []
            built = (Path(config.site_dir) / "reference" / f"{page.stem}.html").read_text(encoding="utf-8")
            missing = [name for name in names if f'id="{package}.{name}"' not in built]
            if missing:
                raise PluginError(f"{package}: {', '.join(missing)} not in the reference: no docstring, or not seen")


def translate(text: str, source: str) -> str:
    """`text` of the repository's file `source` with links as the site needs them.

    A link to a page of the site leads there; one to another file of the repository, of which the site has no copy,
    becomes its text.
    """
    folder = posixpath.dirname(source)
    here = posixpath.dirname(PAGES.get(source, source.removeprefix("docs/")))

    def moved(target: str) -> str | None:
        target = posixpath.normpath(posixpath.join(folder, target))
        if target not in PAGES and not target.startswith("docs/"):
            return None
        return posixpath.relpath(PAGES.get(target, target.removeprefix("docs/")), here or ".")

    def link(match: re.Match[str]) -> str:
        target = moved(match["target"])
        return match["text"] if target is None else f"{match['head']}({target}{match['anchor'] or ''})"

    text = LINK.sub(link, text)
    return re.sub(r'(?<=<img src=")[^":]+(?=")', lambda match: moved(match[0]) or match[0], text)
