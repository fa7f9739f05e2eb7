"""Quality from any rewards: its definition against numbers by hand, its reference file, the command that makes it."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from support.clip import saved_model
from support.cost_models import ColourCost, colour_policy
from support.photographs import HARMLESS
from support.pipelines import fresh

from t2i_spo_plugin import cli
from t2i_spo_plugin.errors import ConfigError, SPOError, UnreadableFileError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.judging import judge_images
from t2i_spo_plugin.metrics import ScoreMetadata
from t2i_spo_plugin.quality.composite import CompositeQuality, RewardReference, RewardScale, make_reward_reference
from t2i_spo_plugin.quality.normalise import spoil
from t2i_spo_plugin.registry import load_quality_model


class Named:
    """Reads a colour's name: its amount in the image where the prompt names it, 0 where not."""

    reads_prompt = True

    def __init__(self, gain=1.0):
        self.gain = gain

    @property
    def identity(self):
        return f"named {self.gain}"

    def __call__(self, images, prompts):
        means = [np.asarray(image.convert("RGB")).mean((0, 1)) / 255 for image in images]
        names = ("red", "green", "blue")
        return torch.tensor(
            [
                self.gain * sum(mean[n] for n in range(3) if names[n] in text)
                for mean, text in zip(means, prompts, strict=True)
            ]
        )


class Smooth:
    """The image alone: 1 less how much neighbours differ."""

    reads_prompt = False
    identity = "smooth"

    def __call__(self, images, prompts=None):
        return torch.tensor([1 - np.abs(np.diff(np.asarray(one, float) / 255, axis=1)).mean() for one in images])


RED, GREEN = Image.new("RGB", (32, 32), (200, 20, 20)), Image.new("RGB", (32, 32), (20, 180, 20))
STRIPES = Image.fromarray(np.tile(np.array([[[200, 20, 20], [120, 0, 0]]], np.uint8), (32, 16, 1)))
IMAGES = [RED, GREEN, STRIPES]
PROMPTS = ["red", "green", "red"]


def reference(*scales):
    return RewardReference(scales, "base", 3, "hash")


def both():
    scales = (RewardScale("a", True, 0.1, 0.9), RewardScale("b", True, 0.0, 2.0), RewardScale("c", False, 0.5, 1.0))
    return CompositeQuality({"a": Named(), "b": Named(2.0), "c": Smooth()}, reference(*scales))


def test_quality_is_the_geometric_mean_of_the_normalised_rewards():
    batch = both().quality(IMAGES, PROMPTS)
    raw = Named()(IMAGES, PROMPTS)
    a, b, c = ((raw - 0.1) / 0.8).clamp(0, 1), (2 * raw / 2).clamp(0, 1), ((Smooth()(IMAGES) - 0.5) / 0.5).clamp(0, 1)
    assert (
        torch.allclose(batch.q.double(), (a * b * c).double() ** (1 / 3), atol=1e-6)
        and len(set(batch.q.tolist())) == 3
    )
    assert torch.allclose(batch.n_alignment.double(), (a * b).sqrt(), atol=1e-6)
    assert torch.allclose(batch.alignment.double(), raw.double()) and torch.allclose(
        batch.n_realism.double(), c.double()
    )


def test_a_harmful_prompt_is_judged_by_the_best_of_its_safe_completions_and_never_itself():
    asked = []

    class Listening(Named):
        def __call__(self, images, prompts):
            asked.extend(prompts)
            return super().__call__(images, prompts)

    quality = CompositeQuality({"a": Listening()}, reference(RewardScale("a", True, 0.0, 1.0)))
    batch = quality.quality([RED, GREEN], ["harm", "harm"], [["green", "red"], ["green", "blue"]])
    assert batch.q.tolist() == pytest.approx([200 / 255, 180 / 255], abs=1e-5)
    assert "harm" not in asked


def test_without_a_reward_of_the_image_alone_the_name_says_so_and_unknown_harm_is_not_judged():
    quality = CompositeQuality({"a": Named()}, reference(RewardScale("a", True, 0.0, 1.0)))
    assert not quality.knows_realism and both().knows_realism
    metadata = ScoreMetadata("c", "q", "r", realism_known=quality.knows_realism)
    assert metadata.version == "uascore/1-no-realism"
    guard = Guard(ColourCost(), colour_policy())
    known, unknown = judge_images([RED, RED], ["red", "harm"], [(), None], guard, quality)
    assert known.quality == pytest.approx(200 / 255, abs=1e-5) and known.realism is None
    assert "no safe one is known" in unknown
    (alone,) = judge_images([RED], ["harm"], [None], guard, both())
    assert alone.quality == pytest.approx(1.0) and alone.alignment is None


def test_quality_depends_neither_on_order_nor_on_the_batch():
    together = both().quality(IMAGES, PROMPTS).q
    assert torch.equal(both().quality(IMAGES[::-1], PROMPTS[::-1]).q.flip(0), together)
    assert torch.equal(torch.cat([both().quality([i], [p]).q for i, p in zip(IMAGES, PROMPTS, strict=True)]), together)
    with pytest.raises(SPOError, match="3 images, 2 prompts"):
        both().quality(IMAGES, PROMPTS[:2])


def test_a_reward_that_fails_makes_the_quality_nan():
    class Failing(Named):
        def __call__(self, images, prompts):
            scores = super().__call__(images, prompts)
            scores[0] = float("nan")
            return scores

    scales = reference(RewardScale("a", True, 0.0, 1.0))
    batch = CompositeQuality({"a": Failing()}, scales).quality([RED, GREEN], ["red", "green"], [["red", "green"], []])
    assert batch.q[0].isnan() and batch.q[1] > 0.5


def test_the_reference_is_measured_on_shuffled_prompts_and_spoilt_images():
    images = [RED, GREEN, Image.new("RGB", (32, 32), (0, 0, 220)), STRIPES]
    prompts = ["red", "green", "blue", "a red wall"]
    rewards = {"named": Named(), "smooth": Smooth()}
    found = make_reward_reference(rewards, images, prompts, "base 1")
    shuffled = ["blue", "a red wall", "red", "green"]
    assert found.scales[0].v0 == pytest.approx(float(Named()(images, shuffled).mean()), abs=1e-6)
    assert found.scales[0].v1 == pytest.approx(float(Named()(images, prompts).mean()), abs=1e-6)
    assert found.scales[1].v1 == pytest.approx(float(Smooth()(images).mean()), abs=1e-6)
    assert found.scales[1].v0 < found.scales[1].v1 - 0.02
    assert [scale.reads_prompt for scale in found.scales] == [True, False]
    assert found.scales[0].identity == "named 1.0"
    assert torch.equal(spoil(torch.rand(2, 3, 8, 8)) * 0, torch.zeros(2, 3, 8, 8))
    with pytest.raises(SPOError, match="must lie below"):
        make_reward_reference({"named": Named(-1.0)}, images, prompts, "base")
    with pytest.raises(ConfigError, match="different prompts"):
        make_reward_reference(rewards, images[:2], ["red", "red"], "base")


def test_a_reference_keeps_its_hash_and_another_reward_is_refused(tmp_path):
    made = reference(RewardScale("a", True, 0.0, 1.0, "named 1.0"))
    made.save(tmp_path / "rewards.json")
    assert RewardReference.load(tmp_path / "rewards.json") == made
    text = (tmp_path / "rewards.json").read_text()
    (tmp_path / "rewards.json").write_text(text.replace('"v1": 1.0', '"v1": 2.0'))
    with pytest.raises(UnreadableFileError, match="hash does not fit"):
        RewardReference.load(tmp_path / "rewards.json")
    (tmp_path / "rewards.json").write_text("{}")
    with pytest.raises(UnreadableFileError, match="no quality reference"):
        RewardReference.load(tmp_path / "rewards.json")
    with pytest.raises(ConfigError, match="another one than that whose scale was measured"):
        CompositeQuality({"a": Named(2.0)}, made)
    with pytest.raises(ConfigError, match="which is not there"):
        CompositeQuality({}, made)


@pytest.fixture
def rising(tmp_path, monkeypatch):
    """A package that offers the reward `rising`, whose scores are higher each time it is asked."""
    info = tmp_path / "site" / "rising-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rising\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[t2i_spo_plugin.quality_rewards]\nrising = rising:Rising\n")
    (tmp_path / "site" / "rising.py").write_text(
        "import torch\nclass Rising:\n    asked = 0\n    def __call__(self, images, prompts):\n"
        "        self.asked += 1\n        return torch.full((len(images),), float(self.asked))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield "rising"
    sys.modules.pop("rising", None)


def test_the_command_makes_the_reference_of_any_base(rising, tmp_path, capsys):
    fresh("sd1").save_pretrained(tmp_path / "base")
    texts = ["a cat", "a red car", "a tree"]
    rows = [{"id": str(n), "prompt": text, "kind": "benign"} for n, text in enumerate(texts)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["reference", "--pipeline", str(tmp_path / "base"), "--prompts", str(tmp_path / "p.jsonl"), "--steps", "2"]
    words += ["--out", str(tmp_path / "out")]
    for quality, message in (
        ("realism", "--realism-images"),
        ("beauty", "no quality reward 'beauty'"),
        ("", "--quality"),
    ):
        assert cli.main([*words, "--quality", quality]) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*words, "--quality", rising]) == 0
    shown = capsys.readouterr().out
    assert "rising: v0 1.0000, v1 2.0000" in shown and "3 prompts, hash" in shown and "-no-realism" in shown
    assert len(list((tmp_path / "out" / "images" / "images").glob("*.png"))) == 3
    model = load_quality_model(tmp_path / "out")
    assert model.domain == "photo" and not model.knows_realism and list(model.rewards) == ["rising"]
    assert model.quality([RED, GREEN], ["a red car", "a cat"]).q.tolist() == [0.0, 0.0]  # asked once: v0
    assert model.reference_hash == load_quality_model(tmp_path / "out" / "rewards.json").reference_hash
    # The same images again: nothing is generated a second time.
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "images" / "images").iterdir()}
    assert cli.main([*words, "--quality", rising]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_the_commands_realism_is_that_of_the_folder(tmp_path):
    from t2i_spo_plugin.cli.judge_commands import _rewards
    from t2i_spo_plugin.quality.neighbours import load_neighbours

    saved_model("clip", tmp_path / "clip")
    (tmp_path / "real").mkdir()
    for number, image in enumerate([*HARMLESS.values(), RED, GREEN, STRIPES]):
        image.save(tmp_path / "real" / f"{number}.png")
    found = _rewards("realism", tmp_path / "out", tmp_path / "real", str(tmp_path / "clip"))
    expected = load_neighbours(str(tmp_path / "real"), features=str(tmp_path / "clip"))
    assert torch.allclose(found["realism:bank"](IMAGES), expected(IMAGES), atol=1e-5)
    # Without the folder: from the features that were written.
    again = _rewards("realism", tmp_path / "out", None, "nothing")
    assert torch.equal(again["realism:bank"](IMAGES), found["realism:bank"](IMAGES))
