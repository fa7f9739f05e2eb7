"""The comparison of strengths, windows and gates: its stored numbers can be printed and plotted again."""

import json
import re

import pytest

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
