"""The table in docs/adapters.md of what reads what: its cells are run here, and the tests it names exist."""

import re
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from support.pipelines import denoiser, fresh, needs_metadata, random_adapter

from t2i_spo_plugin.adapters.convert import convert_adapter
from t2i_spo_plugin.adapters.layouts import LAYOUTS
from t2i_spo_plugin.pipelines.loading import load_spo_lora


ROOT = Path(__file__).parents[2]
BASES = ("sd1", "sd2", "sdxl", "sd3", "flux")
UNETS = ("sd1", "sd2", "sdxl")
WRITTEN = [(base, layout) for base in BASES for layout in LAYOUTS if layout != "kohya" or base in UNETS]
READ_BY_DIFFUSERS = [case for case in WRITTEN if case[1] != "peft"]


def changes(pipe):
    """What the adapter that is loaded changes, by module."""
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    layers = {path: layer for path, layer in denoiser(pipe).named_modules() if isinstance(layer, BaseTunerLayer)}
    return {f"{component}.{path}": layer.get_delta_weight(layer.active_adapters[0]) for path, layer in layers.items()}


def write_random(base, layout, folder):
    """A random adapter whose alpha is not its rank, and its file."""
    adapter = random_adapter(fresh(base), rank=4, alpha=3.0)
    return adapter, convert_adapter(adapter, folder / ("folder" if layout == "peft" else "a.safetensors"), layout)


def assert_same(deltas, adapter):
    assert deltas.keys() == adapter.modules.keys()
    for name, pair in adapter.modules.items():
        assert torch.allclose(deltas[name], pair.delta(), rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(("base", "layout"), WRITTEN)
def test_every_written_file_loads_at_full_strength(base, layout, tmp_path):
    adapter, path = write_random(base, layout, tmp_path)
    pipe = fresh(base)
    load_spo_lora(pipe, path)
    assert_same(changes(pipe), adapter)


@pytest.mark.parametrize(
    ("base", "layout"),
    [pytest.param(*case, marks=needs_metadata if case[1] == "diffusers" else ()) for case in READ_BY_DIFFUSERS],
)
def test_diffusers_loads_what_we_write_at_full_strength(base, layout, tmp_path):
    adapter, path = write_random(base, layout, tmp_path)
    pipe = fresh(base)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    assert_same(changes(pipe), adapter)


@pytest.mark.upstream
@pytest.mark.parametrize("base", BASES)
def test_diffusers_finds_nothing_in_a_peft_folder(base, tmp_path):
    _, path = write_random(base, "peft", tmp_path)
    pipe = fresh(base)
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    except (KeyError, ValueError):
        pass
    assert not changes(pipe)


@pytest.mark.upstream
@pytest.mark.parametrize("base", UNETS)
def test_diffusers_needs_a_text_encoders_output_projection(base, tmp_path):
    for layers, loads in ((("to_q", "q_proj"), False), (("to_q", "q_proj", "out_proj"), True)):
        pipe = fresh(base)
        adapter = random_adapter(pipe, components=("unet", "text_encoder"), layers=layers)
        path = convert_adapter(adapter, tmp_path / "a.safetensors", "kohya")
        if loads:
            pipe.load_lora_weights(path.parent, weight_name=path.name)
            assert set(pipe.get_list_adapters()) == {"unet", "text_encoder"}
        else:
            with pytest.raises(ValueError, match="state dict type"):
                pipe.load_lora_weights(path.parent, weight_name=path.name)
        assert load_spo_lora(fresh(base), path).modules == len(adapter.modules)


def test_the_table_names_a_test_for_every_cell_that_is_run():
    section = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8").partition("## What reads what")[2]
    section = section.partition("\n## ")[0]
    notes = dict(re.findall(r"^- (\w): `(tests/[\w/]+\.py::test_\w+)`", section, re.MULTILINE))
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [cell for row in rows for cell in row.split("|")[3:-1]]
    assert len(cells) > 30
    for cell in cells:
        assert re.search(r"\*(run|read)\*|unknown", cell), cell
        assert ("*run*" in cell) == bool(re.search(r"\*run\* \w\b", cell)), cell
    used = set(re.findall(r"\*run\* (\w)\b", section))
    assert used == notes.keys()
    for place in notes.values():
        file, name = place.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), place
