"""Training on two processes, from caches that nobody has filled yet."""

from __future__ import annotations

import json

import pytest
from support.ranks import train_on_ranks

from t2i_spo_plugin.adapters import read_adapter


def test_two_processes_train_from_fresh_caches(tmp_path):
    assert "world 2 gloo" in train_on_ranks(tmp_path / "two")
    run = tmp_path / "two" / "run"
    report = json.loads((run / "report.json").read_text())
    assert report["processes"] == 2 and report["pairs"]["read"] == 40
    assert report["passes"]["backward"] == 2 * 2 * 2, "two samples of two pairs on each of two processes"
    assert read_adapter(run / "adapter.safetensors").rank == 2


@pytest.mark.slow
def test_twenty_fresh_starts_on_two_processes(tmp_path):
    for number in range(20):
        assert "world 2 gloo" in train_on_ranks(tmp_path / str(number), count=12)
