"""The comparison of strengths, windows and gates: its stored numbers can be printed and plotted again."""

import json
import re

import pytest
from PIL import Image

from t2i_spo_plugin import sticker
from t2i_spo_plugin.experiments import gating


pytest.importorskip("matplotlib")
STORED = sticker.FOLDER / "steering.json"


def systems():
    return json.loads(STORED.read_text(encoding="utf-8"))["systems"]


def test_the_plot_names_every_system_and_both_axes():
    text = gating.plot(systems()).decode()
    for part in (*systems(), "unsafe images, IP", "relative to the base"):
        assert f"{part}" in text, part


def test_the_plot_is_equal_for_equal_numbers_and_moves_with_them():
    first = gating.plot(systems())
    assert gating.plot(systems()) == first
    for key in ("ip", "recognised_relative"):
        for part in ("value", "interval"):
            moved = systems()
            old = moved["adapter gate"][key][part]
            moved["adapter gate"][key][part] = old - 0.005 if part == "value" else [old[0] - 0.02, old[1] + 0.02]
            assert gating.plot(moved) != first, (key, part)


def test_a_base_that_shows_nothing_is_plotted_at_itself():
    changed = systems()
    changed["base"]["recognised_relative"] = None
    assert b"base" in gating.plot(changed)


def test_stored_numbers_are_printed_and_plotted_without_generating(tmp_path, capsys):
    gating.main(["--stored", str(STORED), "--out", str(tmp_path), "--no-progress"])
    assert re.search(r"adapter gate +4\.6 % \[3\.1, 6\.8\]", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"steering.svg"}
    assert (tmp_path / "steering.svg").read_bytes() == gating.plot(systems())


def rows(name, harm=()):
    kinds = [("harmful", "grammar"), ("harmful", "sentences"), ("benign", "grammar"), ("benign", "sentences")]
    return [
        {
            "system": name,
            "prompt_id": f"{kind}-{wording}-{n // 2}",
            "kind": kind,
            "wording": wording,
            "seed": n,
            "image": f"{kind}-{wording}-{n}.png",
            "not_scored": "",
            "referee_unsafe": (wording, n) in harm if kind == "harmful" else False,
        }
        for kind, wording in kinds
        for n in range(4)
    ]


def test_differences_of_ip_are_paired_by_prompt_in_all_and_by_class():
    first, second = rows("a", {("sentences", 0), ("sentences", 1), ("grammar", 3)}), rows("b", {("sentences", 0)})
    assert gating._difference(first, second)["value"] == pytest.approx(2 / 8)
    assert gating._difference(first, second, "sentences")["value"] == pytest.approx(1 / 4)
    lost = [row | ({"not_scored": "NaN", "referee_unsafe": None} if row["seed"] == 3 else {}) for row in first]
    assert gating._difference(lost, second)["value"] == pytest.approx(1 / 6)


def test_images_that_are_the_base_s_are_counted_by_class(tmp_path):
    for name in ("base", "gate"):
        folder = tmp_path / "images" / name / "images"
        folder.mkdir(parents=True)
        for row in rows(name):
            changed = name == "gate" and row["wording"] == "sentences" and row["seed"] < 3
            Image.new("RGB", (4, 4), "red" if changed else "blue").save(folder / row["image"])
    same = gating._same_images(tmp_path, rows("gate"), rows("base"))
    assert [equal for wording, _, equal in same if wording == "grammar"] == [True] * 4
    assert [equal for wording, _, equal in same if wording == "sentences"] == [False, False, False, True]
    assert len(same) == 8, "benign images alone"


def test_a_class_has_a_line_of_its_own_in_the_text():
    content = json.loads(STORED.read_text(encoding="utf-8"))
    rate = {"value": 0.25, "interval": [0.2, 0.3]}
    content["systems"]["base"]["by_wording"] = {"sentences": {"ip": rate, "identical": rate}}
    content["differences"][gating.GATE]["by_wording"] = {"sentences": {"value": 0.02, "interval": [0.01, 0.03]}}
    text = gating.results_text(content)
    assert re.search(r"\n  sentences +25\.0 % \[20\.0, 30\.0\] +25\.0 %", text)
    assert "\n    sentences: +2.0 [+1.0, +3.0]" in text
