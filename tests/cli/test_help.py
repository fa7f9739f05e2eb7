"""What `--help` says of an option: every one has a text that stands alone, for who reads no Python."""

import dataclasses
import re
from inspect import cleandoc

import pytest

from t2i_spo_plugin.cli.demo import DemoConfig
from t2i_spo_plugin.eval import EvalConfig
from t2i_spo_plugin.hub import ModelCardInfo
from t2i_spo_plugin.training import GateConfig, PairConfig, TrainConfig
from t2i_spo_plugin.training.objectives import OBJECTIVE_OPTIONS
from t2i_spo_plugin.training.objectives.terms import TERMS, TermOptions


CONFIGS = [
    DemoConfig,
    EvalConfig,
    GateConfig,
    ModelCardInfo,
    PairConfig,
    TrainConfig,
    TermOptions,
    *OBJECTIVE_OPTIONS.values(),
    *(type(getattr(TermOptions(), name)) for name in TERMS),
]
FRAGMENT = re.compile(r"(of|as|for|between|from|in|with|without|likewise|see|when|after|the same)\b")
"""A text that begins so says what an option belongs to, not what it is."""
PYTHON = re.compile(r"\bNone\b|\.py\b|`\w+_(model|config|adapter)`|\w+\(|\bcallable\b")


def texts(cls):
    """The help of each option."""
    _, _, attributes = cleandoc(cls.__doc__).partition("Attributes:\n")
    attributes = attributes.partition("\n\n")[0]
    pairs = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in pairs}


@pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: cls.__name__)
def test_every_option_has_a_help_text_that_stands_alone(cls):
    fields = {field.name for field in dataclasses.fields(cls)}
    found = texts(cls)
    assert set(found) == fields
    for name, text in found.items():
        assert not FRAGMENT.match(text.lower()), f"{name}: {text}"
        assert not PYTHON.search(text), f"{name}: {text}"
        assert len(text.split()) > 1 and text.endswith("."), f"{name}: {text}"


def test_a_fragment_and_a_python_name_are_recognised():
    assert FRAGMENT.match("of the adapter.") and FRAGMENT.match("between winner and loser.")
    assert PYTHON.search("`sticker`, or what `load_cost_model` takes.") and PYTHON.search("None is the last.")
    assert not FRAGMENT.match("offset in pixels.") and not PYTHON.search("`sticker`, or a folder.")
