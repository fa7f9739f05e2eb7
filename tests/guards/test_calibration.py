"""Calibration: what is fitted keeps its promise on images that did not fit, and the policy file carries it."""

import json
import math

import pytest
import torch
from PIL import Image
from support.clip import patch_head, saved_model
from support.cost_models import ColourCost

from t2i_spo_plugin import cli, load_policy
from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.guards.calibration import (
    LabelledImage,
    _in_second_half,
    area,
    calibrate,
    labelled_folders,
    roc_points,
    threshold_for,
)
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy


def painted(folder, reds, name):
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, red in enumerate(reds):
        # One pixel makes every file's content its own.
        image = Image.new("RGB", (8, 8), (int(red), 0, 0))
        image.putpixel((0, 0), (int(red), number % 256, number // 256))
        paths.append(folder / f"{name}{number:03d}.png")
        image.save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = torch.Generator().manual_seed(0)
    safe = (90 + 25 * torch.randn(160, generator=rng)).clamp(0, 255).tolist()
    unsafe = (160 + 25 * torch.randn(160, generator=rng)).clamp(0, 255).tolist()
    return folder, painted(folder / "safe", safe, "s"), painted(folder / "unsafe", unsafe, "u")


@pytest.fixture(scope="module")
def found(images):
    _, safe, unsafe = images
    labelled = [LabelledImage(path, frozenset()) for path in safe]
    labelled += [LabelledImage(path, frozenset({"red"})) for path in unsafe]
    return calibrate(ColourCost(gain=30.0), labelled, 0.1, "mine")


def test_the_threshold_lets_through_as_many_false_alarms_as_were_wanted():
    safe = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    unsafe = torch.tensor([0.72, 0.99])
    for wanted, count in ((0.0, 0), (0.05, 0), (0.1, 1), (0.25, 2), (0.3, 3)):
        threshold = threshold_for(safe, unsafe, wanted)
        assert int((safe >= threshold).sum()) == count
    # No lower threshold does: in the middle between 0.7 and the unsafe 0.72.
    assert threshold_for(safe, unsafe, 0.3) == pytest.approx(0.71)
    assert threshold_for(torch.tensor([0.5, 0.5]), torch.tensor([0.4]), 0.0) == pytest.approx(0.75)


def test_the_roc_is_that_of_counting_pairs():
    rng = torch.Generator().manual_seed(1)
    safe, unsafe = (torch.rand(40, generator=rng) * 10).round(), (torch.rand(30, generator=rng) * 10 + 3).round()
    pairs = (unsafe[:, None] > safe[None]).double() + 0.5 * (unsafe[:, None] == safe[None]).double()
    points = roc_points(safe, unsafe)
    assert points[0] == (0.0, 0.0) and points[-1] == (1.0, 1.0)
    assert area(points) == pytest.approx(float(pairs.mean()))


def test_numbers_are_measured_on_images_that_did_not_fit(images, found):
    _, safe, unsafe = images
    one = found.categories[0]
    assert found.held_out == sum(map(_in_second_half, [*safe, *unsafe]))
    assert one.false_alarms.total == sum(map(_in_second_half, safe)) and 60 < one.false_alarms.total < 100
    assert one.found.total == sum(map(_in_second_half, unsafe))
    low, high = one.false_alarms.interval
    assert low < 0.1 < high and one.found.value > 0.8 and 0.9 < one.auc < 1.0


def test_the_temperature_makes_probabilities_honest(found):
    one = found.categories[0]
    assert one.error < one.error_before and one.error < 0.12
    assert sum(count for _, _, count in one.reliability) == found.held_out


def test_a_guard_with_the_policy_gives_those_rates(images, found):
    _, safe, unsafe = images
    guard = Guard(ColourCost(gain=30.0), found.policy)
    flagged = guard([path for path in safe if _in_second_half(path)]).flagged
    assert sum(flagged) == found.categories[0].false_alarms.count
    assert sum(guard([path for path in unsafe if _in_second_half(path)]).flagged) == found.categories[0].found.count


def test_a_policys_temperature_stands_in_the_place_of_the_models():
    logits, own = torch.tensor([[3.0, -2.0]]), torch.tensor([2.0, 4.0])
    policy = Policy("p", "photo", (Category("a", temperature=0.5), Category("b")))
    costs, _ = policy.category_costs(logits, own, ("a", "b"))
    assert torch.allclose(costs, torch.tensor([[6.0, -0.5]]).sigmoid())
    image = Image.new("RGB", (8, 8), (200, 0, 0))
    colours = tuple(Category(name, temperature=0.1 if name == "red" else None) for name in ("red", "blue", "green"))
    report = Guard(ColourCost(level=0.6), Policy("c", "photo", colours))(image)
    # The map is drawn with the same temperature as the cost.
    assert report.heat_map(0, "red").max() == pytest.approx(report.cost_of(0, "red"), abs=1e-4)
    with pytest.raises(Exception, match="temperature must be a positive number"):
        Category("a", temperature=0.0)


def test_the_command_writes_a_policy_that_spo_score_takes(images, tmp_path, capsys):
    """On a CLIP head of random weights: the words are what counts here."""
    folder, safe, unsafe = images
    saved_model("clip", tmp_path / "clip")
    patch_head(tmp_path / "clip").save_pretrained(tmp_path / "model")
    out = tmp_path / "out" / "mine.yaml"
    words = ["calibrate", "--cost-model", str(tmp_path / "model"), "--out", str(out), "--safe", str(folder / "safe")]
    assert cli.main([*words, "--unsafe", str(folder / "unsafe")]) == 2
    assert "--unsafe weapons=" in capsys.readouterr().err
    assert cli.main([*words, "--unsafe", f"weapons={folder / 'unsafe'}", "--false-alarms", "0.2"]) == 0
    shown = capsys.readouterr().out
    assert "false alarms" in shown and "images held out" in shown
    policy = load_policy(out)
    assert [category.name for category in policy.categories] == ["weapons"] and policy.categories[0].temperature
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert (
        numbers["images"] == 320 and numbers["policy"]["categories"][0]["threshold"] == policy.categories[0].threshold
    )
    assert "polyline" in out.with_suffix(".html").read_text()
    score = ["score", str(safe[0]), "--domain", "photo", "--cost-model", str(tmp_path / "model"), "--policy", str(out)]
    assert cli.main(score) == 0


def test_a_table_says_which_image_shows_what(images, tmp_path):
    from t2i_spo_plugin.cli.judge_commands import _labelled

    folder, safe, unsafe = images
    (folder / "labels.csv").write_text(
        f'file,categories\nsafe/{safe[0].name},\nsafe/{safe[1].name},safe\nunsafe/{unsafe[0].name},"red, loud"\n'
    )
    rows = _labelled(("red", "loud"), (), (), folder / "labels.csv")
    assert [sorted(row.categories) for row in rows] == [[], [], ["loud", "red"]]
    assert rows[2].path == folder / "unsafe" / unsafe[0].name
    (tmp_path / "bad.csv").write_text("file,label\na.png,red\n")
    with pytest.raises(ConfigError, match="expected the columns file and categories"):
        _labelled(("red",), (), (), tmp_path / "bad.csv")


def test_too_little_is_refused(images):
    _, safe, unsafe = images
    labelled = [LabelledImage(path, frozenset()) for path in safe[:6]]
    with pytest.raises(ConfigError, match="none that is unsafe"):
        calibrate(ColourCost(), labelled)
    with pytest.raises(ConfigError, match="is named as safe and as red"):
        labelled_folders({"red": [safe[0]]}, [safe[0]])
    with pytest.raises(ConfigError, match="got pink"):
        calibrate(ColourCost(), [*labelled, LabelledImage(unsafe[0], frozenset({"pink"}))])
    second = next(path for path in unsafe if _in_second_half(path))
    with pytest.raises(ConfigError, match="6 safe and 0 unsafe|safe and 0 unsafe"):
        calibrate(ColourCost(), [*labelled, LabelledImage(second, frozenset({"red"}))])
    everything = calibrate(ColourCost(), [*labelled, LabelledImage(second, frozenset({"red"}))], held_out=False)
    assert everything.held_out == 0 and everything.categories[0].found.total == 1
    assert not math.isnan(everything.categories[0].auc)
