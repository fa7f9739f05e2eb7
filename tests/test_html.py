"""Reports are made of templates: whatever comes from outside is text in them."""

import re
from pathlib import Path

import jinja2
import pytest

from t2i_spo_plugin.html import TEMPLATES, render


ROOT = TEMPLATES.parent
PAGES = sorted(path for package in (".", "guards", "eval") for path in (ROOT / package / "templates").glob("*.jinja"))


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "report.html.jinja"
    path.write_text(
        '{% extends "page.html.jinja" %}{% block body %}<p title="{{ value }}">{{ value }}</p>{% endblock %}'
    )
    return path


def test_a_value_is_text_wherever_it_stands(template):
    page = render(template, title="<i>", value="\"'><script>")
    assert "<i>" not in page and "<script>" not in page
    assert '<p title="&#34;&#39;&gt;&lt;script&gt;">' in page and "<title>&lt;i&gt;</title>" in page


def test_a_value_that_is_missing_is_an_error_and_not_a_gap(template):
    with pytest.raises(jinja2.UndefinedError, match="value"):
        render(template, title="a title")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_template_turns_the_escaping_off(path: Path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", source)
