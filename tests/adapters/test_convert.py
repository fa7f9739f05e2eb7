"""From layout to layout without changing what an adapter does; other libraries read the result alike."""

import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from support.pipelines import denoiser, fresh, needs_metadata, random_adapter

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair, read_adapter, write_adapter
from t2i_spo_plugin.adapters.convert import convert_adapter
from t2i_spo_plugin.adapters.layouts import LAYOUTS, layout_of
from t2i_spo_plugin.errors import AdapterError, ConfigError


def uneven(pipe, dtype=torch.float32, **options):
    """An adapter in which ranks and alphas differ from module to module, and from each other."""
    adapter = random_adapter(pipe, dtype=dtype, **options)
    modules = {}
    for number, (name, pair) in enumerate(adapter.modules.items()):
        rank = 4 if number % 3 else 2
        modules[name] = LoraPair(pair.down[:rank], pair.up[:, :rank], 3.0 if number % 4 else 1.1 + number)
    return Adapter(modules, adapter.metadata)


def write_and_read(adapter, folder, layout):
    """The converted adapter read back, and the layout that its file is in."""
    path = convert_adapter(adapter, folder / ("folder" if layout == "peft" else "a.safetensors"), layout)
    with safe_open(path, framework="pt") as file:
        config = json.loads((path.parent / "adapter_config.json").read_text()) if layout == "peft" else None
        name_of_layout = layout_of(list(file.keys()), file.metadata(), config)
    return read_adapter(path), name_of_layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_changes_a_delta(family, pipe, layout, dtype, tmp_path):
    adapter = uneven(pipe, dtype)
    if layout == "kohya" and family in ("sd3", "flux"):
        with pytest.raises(AdapterError, match="no name for the component transformer"):
            convert_adapter(adapter, tmp_path / "a.safetensors", layout)
        assert not list(tmp_path.iterdir())
        return
    back, name_of_layout = write_and_read(adapter, tmp_path, layout)
    assert name_of_layout == layout
    assert back.metadata == adapter.metadata and back.modules.keys() == adapter.modules.keys()
    for name, pair in adapter.modules.items():
        assert torch.allclose(back.modules[name].delta(), pair.delta(), rtol=1e-6, atol=1e-6), name
        assert back.modules[name].rank == pair.rank
        if layout != "native":
            assert back.modules[name].alpha == pytest.approx(pair.alpha, rel=1e-7)
            assert back.modules[name].down.dtype == dtype


def test_a_walk_through_all_layouts_ends_where_it_began(sd1, tmp_path):
    adapter = uneven(sd1, layers=("to_q", "to_v", "conv1"))
    back = adapter
    for number, layout in enumerate(("diffusers", "peft", "kohya", "native", "kohya")):
        back, _ = write_and_read(back, tmp_path / str(number), layout)
    for name, pair in adapter.modules.items():
        assert torch.allclose(back.modules[name].delta(), pair.delta(), rtol=1e-6, atol=1e-6), name


def test_text_encoders_survive_in_every_layout_that_names_them(tmp_path):
    pipe = fresh("sdxl")
    adapter = uneven(pipe, components=("unet", "text_encoder", "text_encoder_2"))
    for layout in ("kohya", "diffusers", "native"):
        back, _ = write_and_read(adapter, tmp_path / layout, layout)
        assert back.modules.keys() == adapter.modules.keys()
    with pytest.raises(AdapterError, match="holds the adapter of one denoiser"):
        convert_adapter(adapter, tmp_path / "folder", "peft")


def changes(model):
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    return {path: layer.get_delta_weight(layer.active_adapters[0]) for path, layer in layers.items()}


@needs_metadata
def test_diffusers_reads_its_layout_with_every_alpha(pipe, tmp_path):
    adapter = uneven(pipe)
    path = convert_adapter(adapter, tmp_path / "a.safetensors", "diffusers")
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    deltas = changes(denoiser(pipe))
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    assert {f"{component}.{path}" for path in deltas} == adapter.modules.keys()
    for path, change in deltas.items():
        assert torch.allclose(change, adapter.modules[f"{component}.{path}"].delta(), atol=1e-5), path


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_peft_reads_its_folder_with_every_alpha(pipe, tmp_path):
    adapter = uneven(pipe)
    convert_adapter(adapter, tmp_path, "peft")
    model = PeftModel.from_pretrained(denoiser(pipe), tmp_path)
    deltas = changes(model.base_model.model)
    assert len(deltas) == len(adapter.modules)
    component = "unet" if hasattr(pipe, "unet") else "transformer"
    for path, change in deltas.items():
        assert torch.allclose(change, adapter.modules[f"{component}.{path}"].delta(), atol=1e-5), path


def pair(dtype=torch.float32, alpha=3.0):
    return LoraPair(torch.randn(4, 6).to(dtype), torch.randn(8, 4).to(dtype), alpha)


def test_folding_keeps_16_bits_only_where_they_hold_the_product(tmp_path):
    metadata = AdapterMetadata("stable-diffusion-3")
    for alpha, dtype in ((2.0, torch.float16), (3.0, torch.float32)):
        adapter = Adapter({"transformer.proj": pair(torch.float16, alpha)}, metadata)
        back = read_adapter(convert_adapter(adapter, tmp_path / "a.safetensors", "native"))
        assert back.modules["transformer.proj"].up.dtype == dtype == back.modules["transformer.proj"].down.dtype


def test_converting_refuses_what_a_layout_would_lose(tmp_path):
    metadata = AdapterMetadata("stable-diffusion-v1")
    unknown = Adapter({"unet.down_blocks.0.my_layer.to_q": pair()}, metadata)
    with pytest.raises(AdapterError, match="kohya layout would lose 1 modules, such as unet.down_blocks.0.my_layer"):
        convert_adapter(unknown, tmp_path / "a.safetensors", "kohya")
    with pytest.raises(AdapterError, match="would lose"):
        convert_adapter(Adapter({"unet.add_embedding.linear_1": pair()}, metadata), tmp_path / "folder", "peft")
    with pytest.raises(AdapterError, match="no layout lycoris; there are kohya"):
        convert_adapter(unknown, tmp_path / "a.safetensors", "lycoris")
    known = Adapter({"unet.down_blocks.0.attentions.0.to_q": pair()}, metadata)
    with pytest.raises(AdapterError, match="folder of two files"):
        convert_adapter(known, tmp_path / "a.safetensors", "peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_alphas_find_modules_whose_names_are_no_plain_words(layout, tmp_path):
    modules = {f"transformer.block-{n}.to_q": pair(alpha=alpha) for n, alpha in enumerate((3.0, 3.0, 5.0))}
    back, _ = write_and_read(Adapter(modules, AdapterMetadata("flux-1-dev")), tmp_path, layout)
    assert [one.alpha for one in back.modules.values()] == [3.0, 3.0, 5.0]


def test_equal_adapters_give_equal_files_in_every_layout(sd1, tmp_path):
    adapter = uneven(sd1)
    reordered = Adapter(dict(reversed(adapter.modules.items())), adapter.metadata)
    for layout in LAYOUTS:
        paths = [tmp_path / name / layout / ("" if layout == "peft" else "a.safetensors") for name in "ab"]
        files = [convert_adapter(one, path, layout) for one, path in zip((adapter, reordered), paths, strict=True)]
        assert files[0].read_bytes() == files[1].read_bytes(), layout
    configs = [(tmp_path / name / "peft" / "adapter_config.json").read_bytes() for name in "ab"]
    assert configs[0] == configs[1]


def test_writing_uses_the_kohya_layout_for_a_unet(tmp_path, sd1):
    adapter = uneven(sd1)
    default = write_adapter(adapter, tmp_path / "a.safetensors").read_bytes()
    assert convert_adapter(adapter, tmp_path / "b.safetensors", "kohya").read_bytes() == default


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_converting_to_a_type_rounds_once(sd1, layout, dtype, tmp_path):
    adapter = uneven(sd1)
    path = tmp_path / ("folder" if layout == "peft" else "a.safetensors")
    back = read_adapter(convert_adapter(adapter, path, layout, dtype)).modules
    steps = torch.finfo(dtype).eps
    for name, pair in adapter.modules.items():
        assert back[name].down.dtype == dtype == back[name].up.dtype
        assert torch.equal(back[name].down, pair.down.to(dtype))
        assert torch.allclose(back[name].scale * back[name].up.float(), pair.scale * pair.up, rtol=steps, atol=1e-6)


@pytest.mark.parametrize("value", [7e4, 1e-6])
@pytest.mark.parametrize("role", ["down", "up"])
def test_converting_refuses_what_float16_cannot_hold(value, role, tmp_path):
    matrices = {"down": torch.ones(2, 6), "up": torch.ones(8, 2)}
    matrices[role] *= value
    adapter = Adapter({"unet.conv_in": LoraPair(**matrices, alpha=2.0)}, AdapterMetadata("stable-diffusion-v1"))
    path = tmp_path / "a.safetensors"
    with pytest.raises(AdapterError, match=r"unet.conv_in: the largest weight is .*, float16 holds .* float32"):
        convert_adapter(adapter, path, "kohya", torch.float16)
    assert not path.exists()
    back = read_adapter(convert_adapter(adapter, path, "kohya", torch.bfloat16))
    assert back.modules["unet.conv_in"].delta() == pytest.approx(adapter.modules["unet.conv_in"].delta(), rel=0.01)
    with pytest.raises(ConfigError, match="float32, float16, bfloat16, got torch.float64"):
        convert_adapter(adapter, path, "kohya", torch.float64)
