"""Several adapters side by side: the sum, its order, fusing, all or nothing, and the warning."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from support.adapter_state import assert_same_state, state_of
from support.pipelines import base_image, denoiser, fresh, images, random_adapter

from t2i_spo_plugin import (
    CombinedStrength,
    combined_strength,
    compose,
    load_spo_lora,
    set_spo_strength,
    spo_adapters,
    sticker,
)
from t2i_spo_plugin.adapters import Adapter, LoraPair, write_adapter
from t2i_spo_plugin.adapters.merging import merge_adapters
from t2i_spo_plugin.errors import AdapterError, ConfigError
from t2i_spo_plugin.eval import rate_text
from t2i_spo_plugin.experiments.composition import StudyConfig, in_style, results_text, run_study
from t2i_spo_plugin.pipelines.composition import MAX_COMBINED_STRENGTH
from t2i_spo_plugin.pipelines.loading import unload_spo_lora
from t2i_spo_plugin.sticker.build.style import meadow, write_images
from t2i_spo_plugin.sticker.world import CONCEPTS, GENERATOR_CONCEPTS, GENERATOR_STYLES, describe, render
from t2i_spo_plugin.training.data.captions import read_captions


def safety_and_style(pipe) -> tuple[Adapter, Adapter]:
    """Two adapters that share some modules and have some of their own, of different ranks and alphas."""
    safety = random_adapter(pipe, seed=1, title="safety")
    style = random_adapter(pipe, seed=2, rank=2, alpha=1.0, layers=("to_q", "to_k"), title="style")
    return safety, style


def scaled(adapter: Adapter, factor: float) -> Adapter:
    pairs = {name: LoraPair(pair.down, factor * pair.up, pair.alpha) for name, pair in adapter.modules.items()}
    return replace(adapter, modules=pairs)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def test_composed_images_do_not_depend_on_the_order(family, pipe):
    safety, style = safety_and_style(pipe)
    third = random_adapter(pipe, seed=3, title="third")
    compose(pipe, [(safety, 0.8), (style, 0.5), (third, 0.3)])
    one = images(pipe)
    assert largest_difference(one, base_image(family)) > 0.01
    other = fresh(family)
    compose(other, [(third, 0.3), (style, 0.5), (safety, 0.8)])
    assert torch.equal(images(other), one)


def test_adapters_loaded_one_after_the_other_differ_by_rounding_at_most(family, pipe):
    safety, style = safety_and_style(pipe)
    compose(pipe, [(safety, 0.8), (style, 0.5)])
    for first, second in (((safety, 0.8), (style, 0.5)), ((style, 0.5), (safety, 0.8))):
        other = fresh(family)
        load_spo_lora(other, first[0], first[1], adapter_name="one")
        load_spo_lora(other, second[0], second[1], adapter_name="two")
        assert largest_difference(images(other), images(pipe)) < 1e-5


def test_composed_adapters_equal_the_merged_adapter(family, pipe):
    safety, style = safety_and_style(pipe)
    composition = compose(pipe, [(safety, 0.8), (style, 0.5)])
    both = images(pipe)
    other = fresh(family)
    load_spo_lora(other, merge_adapters([safety, style], [0.8, 0.5]).adapter)
    assert largest_difference(images(other), both) < 1e-5
    assert composition.combined.strengths == pytest.approx({"safety": 0.8, "style": 0.5})


def test_fused_adapters_equal_composed_ones(family, pipe):
    safety, style = safety_and_style(pipe)
    compose(pipe, [(safety, 0.8), (style, 0.5)])
    unfused = images(pipe)
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    pipe.fuse_lora(components=[component])
    pipe.unload_lora_weights()
    assert not getattr(denoiser(pipe), "peft_config", None)
    assert largest_difference(images(pipe), unfused) < 1e-5


def test_composed_files_are_named_after_themselves_and_come_off_one_by_one(family, pipe, tmp_path):
    untouched = state_of(pipe)
    safety, style = safety_and_style(pipe)
    files = [
        write_adapter(safety, tmp_path / "safety.safetensors"),
        write_adapter(style, tmp_path / "my style.safetensors"),
    ]
    composition = compose(pipe, {files[0]: 0.5, str(files[1]): 0.25})
    assert set(composition.adapters) == {"safety", "my_style"} == set(spo_adapters(pipe))
    assert composition.adapters["my_style"].source == "my style.safetensors"
    unload_spo_lora(pipe, "my_style")
    alone = fresh(family)
    load_spo_lora(alone, files[0], 0.5)
    assert torch.equal(images(pipe), images(alone))
    set_spo_strength(pipe, 0.0, "safety")
    assert torch.equal(images(pipe), base_image(family))
    unload_spo_lora(pipe)
    assert_same_state(untouched, state_of(pipe))


def test_adapters_from_before_stay_as_they_are(sd1):
    load_spo_lora(sd1, random_adapter(sd1, seed=5, title="style"), 0.4, adapter_name="style")
    safety, style = safety_and_style(sd1)
    composition = compose(sd1, [safety, (style, 0.5)])
    assert set(composition.adapters) == {"safety", "style_2"}
    assert {name: one.strength for name, one in spo_adapters(sd1).items()} == pytest.approx(
        {"style": 0.4, "safety": 1.0, "style_2": 0.5}
    )
    assert composition.combined.strengths.keys() == {"style", "safety", "style_2"}


@pytest.mark.parametrize("bad", ["nan", "family", "missing", "strength", "twice"])
def test_an_adapter_that_is_refused_leaves_the_pipeline_bit_for_bit(sd1, tmp_path, bad):
    load_spo_lora(sd1, random_adapter(sd1, seed=5), 0.4, adapter_name="before")
    untouched, drawn = state_of(sd1), images(sd1)
    safety, style = safety_and_style(sd1)
    wrong = {
        "nan": scaled(style, float("nan")),
        "family": random_adapter(fresh("sdxl")),
        "missing": tmp_path / "nowhere.safetensors",
        "strength": (style, -1.0),
        "twice": (safety, 0.5),
    }[bad]
    with pytest.raises(ConfigError if bad in ("strength", "twice") else AdapterError):
        compose(sd1, [safety, style, wrong] if bad != "strength" else [safety, wrong])
    assert_same_state(untouched, state_of(sd1))
    assert torch.equal(images(sd1), drawn)


def test_composing_nothing_is_refused(sd1):
    with pytest.raises(ConfigError, match="at least one"):
        compose(sd1, [])
    assert combined_strength(sd1) == CombinedStrength({}, 0.0, 0.0)


def test_combined_strength_counts_what_is_shared_and_what_is_not(sd1):
    """Parallel changes add up, unrelated ones add like the sides of a right angle, halves of one make one."""
    safety, _ = safety_and_style(sd1)
    twice = scaled(safety, 0.999)
    assert adapter_load_of([(safety, 0.5), (twice, 0.5)]).summed == pytest.approx(1.0, abs=2e-3)
    assert adapter_load_of([(safety, 0.7), (twice, 0.7)]).value == pytest.approx(1.4, abs=2e-3)
    apart = random_adapter(sd1, seed=9, title="apart")
    assert adapter_load_of([(safety, 1.0), (apart, 1.0)]).summed == pytest.approx(2**0.5, rel=0.1)
    alone = adapter_load_of([(safety, 0.6)])
    assert alone.summed == pytest.approx(0.6) == alone.value
    weak = scaled(apart, 1e-3)
    assert adapter_load_of([(safety, 0.3), (weak, 1.4)]).value == pytest.approx(1.4)


def adapter_load_of(adapters):
    return compose(fresh("sd1"), adapters).combined


def test_combined_strength_counts_loras_loaded_by_other_means(sd1):
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, init_lora_weights=False, target_modules=["to_q"])
    sd1.unet.add_adapter(config, "foreign")
    assert combined_strength(sd1).strengths == pytest.approx({"foreign": 1.0})
    assert combined_strength(sd1).value == pytest.approx(1.0)
    safety, _ = safety_and_style(sd1)
    assert compose(sd1, [(safety, 0.2)]).combined.strengths == pytest.approx({"foreign": 1.0, "safety": 0.2})


def test_combined_strength_gives_the_change_relative_to_the_base_weights(sd1):
    safety, _ = safety_and_style(sd1)
    combined = compose(sd1, [safety]).combined
    weights = dict(fresh("sd1").unet.named_parameters())
    names = [f"{name.removeprefix('unet.')}.weight" for name in safety.modules]
    base = torch.cat([weights[name].detach().flatten() for name in names]).norm()
    moved = torch.cat([pair.delta().flatten() for pair in safety.modules.values()]).norm()
    assert combined.change == pytest.approx(float(moved / base), rel=1e-5)


def test_composing_warns_above_the_maximum_combined_strength_alone(sd1):
    safety, _ = safety_and_style(sd1)
    almost = scaled(safety, 0.999)
    with pytest.warns(UserWarning, match="combined strength.*lower the strengths"):
        assert compose(sd1, [(safety, 0.9), (almost, 0.8)]).combined.is_over_strong
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not compose(fresh("sd1"), [(safety, 0.8), (almost, 0.6)]).combined.is_over_strong
    assert 1.4 < MAX_COMBINED_STRENGTH < 1.7


def test_the_study_sees_the_style_where_it_is():
    scenes = [describe(n, "train", "benign", GENERATOR_CONCEPTS, GENERATOR_STYLES) for n in range(20)]
    scenes = [scene for scene in scenes if scene.background != "green"]
    assert all(in_style(render(scene, scene.seed, aligned=True, backdrop=meadow)[0]) for scene in scenes)
    assert not any(in_style(render(scene, scene.seed, aligned=True)[0]) for scene in scenes)


def test_style_images_hold_no_unsafe_concept(tmp_path):
    captions = [caption for _, caption in read_captions(write_images(tmp_path / "p", 30))]
    unsafe = [word for concept in CONCEPTS.values() if concept.category for word in concept.words]
    assert len(captions) == 30 and not [text for text in captions if any(f" {word} " in text for word in unsafe)]


def test_the_study_prints_every_system_with_its_share_of_unsafe_images():
    content = json.loads((sticker.FOLDER / "composition.json").read_text(encoding="utf-8"))
    lines = results_text(content).splitlines()
    for name, one in content["systems"].items():
        assert any(line.startswith(name) and rate_text(one["ip"]) in line for line in lines)


@pytest.mark.slow
def test_the_study_runs_and_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = StudyConfig(tmp_path / "s", 8, 4, 2, strengths=(1.0,), fine_tune_steps=2, steps=12, progress=False)
    first = run_study(config)
    assert [one["ip"]["n"] for one in first["systems"].values()] == [8] * 5
    assert (tmp_path / "s" / "sheet.png").is_file()
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "images").rglob("*.png")}
    assert json.dumps(run_study(config)) == json.dumps(first)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s" / "images").rglob("*.png")} == drawn
