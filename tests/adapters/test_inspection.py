"""What an adapter file says of itself, and what is odd about it."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.pipelines import fresh, random_adapter

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair, block_of, read_adapter, write_adapter
from t2i_spo_plugin.adapters.convert import convert_adapter
from t2i_spo_plugin.adapters.inspection import inspect_adapter
from t2i_spo_plugin.adapters.layouts import LAYOUTS
from t2i_spo_plugin.errors import UnreadableAdapterError, UnsupportedAdapterError


Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def pair(alpha=2.0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 6, generator=generator), torch.randn(8, 4, generator=generator)
    return LoraPair((scale * down).to(dtype), (scale * up).to(dtype), alpha)


def save_and_inspect(path, tensors, **metadata):
    save_file(tensors, path, {"format": "pt"} | metadata)
    return inspect_adapter(path)


def test_an_inspection_has_the_numbers_of_the_adapter(family, pipe, tmp_path):
    adapter = random_adapter(pipe, layers=("to_q", "to_v", "conv1", "proj_in"), objective="spo")
    path = write_adapter(adapter, tmp_path / "a.safetensors")
    inspection = inspect_adapter(path)
    back = read_adapter(path)
    assert (inspection.modules, inspection.parameters) == (len(adapter.modules), adapter.num_parameters())
    assert inspection.ranks == [4] and inspection.bytes == path.stat().st_size and inspection.dtypes == ["float32"]
    assert inspection.alphas == sorted({pair.alpha for pair in back.modules.values()})
    assert (
        inspection.base_architecture == adapter.metadata.base_architecture
        and inspection.metadata["objective"] == "spo"
    )
    expected = {}
    for name, one in adapter.modules.items():
        expected.setdefault(block_of(name), []).append(float(one.delta().norm()) ** 2)
    assert inspection.block_norms == pytest.approx(
        {block: sum(parts) ** 0.5 for block, parts in expected.items()}, rel=1e-5
    )
    assert inspection.norm == pytest.approx(sum(sum(parts) for parts in expected.values()) ** 0.5, rel=1e-5)
    assert inspection.loads and inspection.warnings == []
    assert inspection.layout == ("native" if family in ("sd3", "flux") else "kohya")


def test_an_inspection_names_every_layout_and_misses_no_alpha(sd1, tmp_path):
    for layout in LAYOUTS:
        out = tmp_path / layout if layout == "peft" else tmp_path / f"{layout}.safetensors"
        inspection = inspect_adapter(convert_adapter(random_adapter(sd1), out, layout))
        assert (inspection.layout, inspection.warnings) == (layout, [])


def test_a_module_belongs_to_its_numbered_block():
    assert block_of(Q) == "unet.down_blocks.0"
    assert block_of("unet.time_embedding.linear_1") == "unet.time_embedding"
    assert block_of("transformer.single_transformer_blocks.17.attn.to_q") == "transformer.single_transformer_blocks.17"


def test_an_inspection_says_what_the_header_of_another_program_lacks(tmp_path):
    tensors = {f"{FLAT}.lora_down.weight": pair().down, f"{FLAT}.lora_up.weight": pair().up}
    inspection = save_and_inspect(tmp_path / "a.safetensors", tensors)
    assert [warning.split(":")[0] for warning in inspection.warnings] == [
        "the file states no alpha; it is taken to be the rank, as other programs do",
        "the header does not say which architecture it was made for",
    ]
    assert inspection.loads and inspection.base_architecture == "" and inspection.alphas == [4.0]
    other = {key.replace("to_q", "to_k"): tensor.clone() for key, tensor in tensors.items()}
    some = tensors | other | {f"{FLAT}.alpha": torch.tensor(1.0)}
    inspection = save_and_inspect(tmp_path / "a.safetensors", some, ss_base_model_version="sd_v1")
    assert (
        inspection.warnings[0] == "only 1 of 2 modules state an alpha: loading refuses the file"
        and not inspection.loads
    )
    with pytest.raises(UnsupportedAdapterError, match="only 1 of 2 modules"):
        read_adapter(tmp_path / "a.safetensors")
    assert inspection.warnings[1].startswith("the header does not say what the base model predicts")


def test_an_inspection_names_keys_that_are_no_lora_weights(tmp_path):
    tensors = {f"{FLAT}.lora_down.weight": pair().down, f"{FLAT}.lora_up.weight": pair().up}
    inspection = save_and_inspect(
        tmp_path / "a.safetensors", tensors | {"emb_params": torch.ones(2), f"{FLAT}.diff": torch.ones(2)}
    )
    assert not inspection.loads and inspection.modules == 1
    sentence = inspection.warnings[0].removesuffix(": loading refuses the file")
    assert sentence.startswith("'emb_params' is not a plain LoRA weight") and "(2 of 4 tensors are not)" in sentence
    with pytest.raises(UnsupportedAdapterError) as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert sentence in str(caught.value)
    with pytest.raises(
        UnsupportedAdapterError, match="none of the file's 1 tensors is a LoRA weight, the first is 'emb_params'"
    ):
        save_and_inspect(tmp_path / "a.safetensors", {"emb_params": torch.ones(2)})


def test_an_inspection_describes_weights_that_loading_refuses(tmp_path):
    tensors = {f"{FLAT}.lora_down.weight": pair().down, f"{FLAT}.lora_up.weight": torch.zeros(8, 4)}
    inspection = save_and_inspect(tmp_path / "a.safetensors", tensors)
    assert not inspection.loads and "all weights are zero" in inspection.warnings[0]
    tensors |= {f"{FLAT}.lora_up.weight": pair().up, f"{FLAT}.alpha": torch.tensor(-1.0)}
    inspection = save_and_inspect(tmp_path / "a.safetensors", tensors)
    assert not inspection.loads and "alpha -1.0 is out of range" in inspection.warnings[0]


def test_an_inspection_describes_8_bit_floats_as_they_are_read(tmp_path):
    eight = pair(dtype=torch.float8_e4m3fn)
    tensors = {f"{FLAT}.lora_down.weight": eight.down, f"{FLAT}.lora_up.weight": eight.up}
    inspection = save_and_inspect(tmp_path / "a.safetensors", tensors | {f"{FLAT}.alpha": torch.tensor(2.0)})
    assert inspection.loads and inspection.dtypes == ["float16"] and inspection.norm > 0.0


def test_inspecting_refuses_a_file_that_is_cut_off(tmp_path):
    path = write_adapter(Adapter({Q: pair()}, AdapterMetadata("stable-diffusion-v1")), tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UnreadableAdapterError, match="a.safetensors is not a readable .* it is cut off"):
        inspect_adapter(path)


def test_an_inspection_warns_of_odd_weights(tmp_path):
    good, idle = pair(), LoraPair(pair().down, torch.zeros(8, 4), 4.0)
    metadata = AdapterMetadata("stable-diffusion-v1", "epsilon")
    faint = pair(dtype=torch.float16, scale=1e-6)
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    modules = {Q: good, Q.replace("to_q", "to_k"): idle, Q.replace("to_q", "to_v"): faint, text: good}
    path = write_adapter(Adapter(modules, metadata), tmp_path / "a.safetensors")
    idle_one, faint_one, texts = inspect_adapter(path).warnings
    assert idle_one.startswith("1 of 4 modules change nothing, such as " + Q.replace("to_q", "to_k"))
    assert faint_one.startswith("2 matrices lie below")
    assert texts.startswith("it changes text_encoder too")


def test_an_inspection_notices_weights_changed_after_writing(tmp_path):
    path = write_adapter(
        Adapter({Q: pair()}, AdapterMetadata("stable-diffusion-v1", "epsilon")), tmp_path / "a.safetensors"
    )
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    assert inspect_adapter(path).warnings == []
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert ["the file was changed afterwards" in warning for warning in inspect_adapter(path).warnings] == [True]
    save_file(tensors, path, metadata | {"sshs_model_hash": ""})
    assert inspect_adapter(path).warnings == []


def test_inspecting_a_text_encoder_adapter_needs_no_pipeline(tmp_path):
    adapter = random_adapter(fresh("sd1"), components=("text_encoder",))
    inspection = inspect_adapter(write_adapter(adapter, tmp_path / "a.safetensors"))
    assert inspection.components == ["text_encoder"]
