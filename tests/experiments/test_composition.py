"""What the study of safety and style counts, by hand: by wording class, over seeds, and paired over prompts."""

import pytest
import torch

from t2i_spo_plugin.data.generation import GeneratedImage
from t2i_spo_plugin.data.prompts import PromptRow
from t2i_spo_plugin.errors import ConfigError, NotScoredError
from t2i_spo_plugin.eval.referee import RefereeBatch
from t2i_spo_plugin.experiments.composition import (
    BOTH,
    SAFETY,
    StudyConfig,
    SystemImages,
    _difference,
    _level,
    _numbers,
    results_text,
)
from t2i_spo_plugin.pipelines import CombinedStrength


CLASSES = ("grammar", "sentences")


def system(unsafe, seen):
    """Two harmful and two benign prompts of each class with two seeds; `unsafe` and `seen` by class and image."""
    images, flags, objects = [], [], []
    for wording in CLASSES:
        for kind in ("harmful", "benign"):
            for n in range(4):
                row = PromptRow(
                    f"{kind}-{wording}-{n // 2}", "on a blue background", kind, seed=n, requested=("cat", "car")
                )
                images.append(GeneratedImage(PromptRow(**{**vars(row), "wording": wording}), None))
                flags.append(kind == "harmful" and n in unsafe.get(wording, ()))
                objects.append(seen.get(wording, ()) if kind == "benign" else ())
    nothing = torch.zeros(len(images), 1)
    referee = RefereeBatch(
        nothing, nothing[:, 0], torch.tensor(flags), torch.tensor(flags), torch.tensor(flags), objects
    )
    return SystemImages(images, referee, [False] * len(images))


STRENGTH = CombinedStrength({"spo": 1.0}, 1.0, 0.1)
BAD = system({"grammar": (0,), "sentences": (0, 1, 2)}, {"grammar": ("cat", "car"), "sentences": ("cat",)})
GOOD = system({"sentences": (0,)}, {"grammar": ("cat",), "sentences": ()})


def test_shares_are_counted_in_all_and_by_wording_class():
    numbers = _numbers(BAD, STRENGTH, CLASSES)
    assert (numbers["ip"]["k"], numbers["ip"]["n"]) == (4, 8)
    assert (numbers["unsafe_prompts"]["k"], numbers["unsafe_prompts"]["n"]) == (3, 4)
    assert (numbers["recognised"]["k"], numbers["recognised"]["n"]) == (12, 16)
    grammar, sentences = (numbers["by_wording"][name] for name in CLASSES)
    assert (grammar["ip"]["k"], sentences["ip"]["k"], grammar["ip"]["n"]) == (1, 3, 4)
    assert (grammar["recognised"]["value"], sentences["recognised"]["value"]) == (1.0, 0.5)


def test_differences_are_paired_over_prompts_in_all_and_by_class():
    difference = _difference(BAD, GOOD, CLASSES)
    assert difference["value"] == pytest.approx(3 / 8)
    assert difference["by_wording"]["grammar"]["value"] == pytest.approx(1 / 4)
    assert difference["by_wording"]["sentences"]["value"] == pytest.approx(2 / 4)


def test_objects_are_held_against_the_base_image_by_image():
    level = _level(GOOD, BAD, STRENGTH)["recognised_relative"]
    assert level["value"] == pytest.approx(4 / 12) and level["n"] == 8
    with pytest.raises(NotScoredError):
        _level(BAD, system({}, {}), STRENGTH)


def test_the_text_has_a_line_for_each_class():
    content = {
        "systems": {SAFETY: _numbers(GOOD, STRENGTH, CLASSES), BOTH: _numbers(BAD, STRENGTH, CLASSES)},
        "differences": {f"{BOTH} - {SAFETY}": _difference(BAD, GOOD, CLASSES)},
        "strengths": {},
    }
    text = results_text(content)
    assert text.count("  sentences ") == 2 and "    sentences: +50.0 [" in text


@pytest.mark.parametrize("options", [{"n_strength": 201}, {"wordings": ()}, {"seeds_per_prompt": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        StudyConfig(**options)
