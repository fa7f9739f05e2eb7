"""Adapters out of tuned models: exact for a merged LoRA, honest about the rest, no model loaded, no pickle opened."""

import json

import pytest
import torch
from diffusers import HiDreamImageTransformer2DModel
from safetensors.torch import load_file, save_file
from support.pipelines import fresh, images, random_adapter

from t2i_spo_plugin.adapters import checkpoints as model_files
from t2i_spo_plugin.adapters import read_adapter, write_adapter
from t2i_spo_plugin.adapters.architecture import fingerprint_of_shapes, weight_shapes
from t2i_spo_plugin.adapters.extract import extract_adapter
from t2i_spo_plugin.errors import AdapterError, ConfigError, UnreadableAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.pipelines.architecture import architecture_of, base_fingerprint, prediction_type_of
from t2i_spo_plugin.pipelines.loading import load_spo_lora


FILE = "diffusion_pytorch_model.safetensors"


def merge_into(pipe, adapter):
    """The adapter's changes added to the weights themselves."""
    for name, pair in adapter.modules.items():
        component, _, path = name.partition(".")
        if component.startswith("text_encoder") and not hasattr(getattr(pipe, component), "text_model"):
            path = path.removeprefix("text_model.")
        with torch.no_grad():
            getattr(pipe, component).get_submodule(path).weight.add_(pair.delta())
    return pipe


def component_of(pipe):
    return "unet" if hasattr(pipe, "unet") else "transformer"


@pytest.fixture
def unets(tmp_path):
    """Component folders of a base and a tuned UNet, and the adapter that was merged in."""
    base, tuned = fresh("sd1"), fresh("sd1")
    adapter = random_adapter(base, layers=("to_q", "to_v", "conv1"))
    base.unet.save_pretrained(tmp_path / "base")
    merge_into(tuned, adapter).unet.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned", adapter


def change_file(folder, change):
    """Apply `change` to a component folder's state dict."""
    state = load_file(folder / FILE)
    change(state)
    save_file(state, folder / FILE, {"format": "pt"})


def test_a_merged_lora_comes_out_as_it_went_in(family, pipe, tmp_path):
    layers = ("to_q", "to_v", "to_out.0", "conv1", "q_proj")
    components = (component_of(pipe), "text_encoder")
    adapter = random_adapter(pipe, rank=4, alpha=3.0, layers=layers, components=components)
    pipe.save_pretrained(tmp_path / "base")
    merge_into(fresh(family), adapter).save_pretrained(tmp_path / "tuned")
    result = extract_adapter(tmp_path / "base", tmp_path / "tuned", rank=4)
    assert result.adapter.modules.keys() == adapter.modules.keys() and not result.unexpressed
    for name, pair in adapter.modules.items():
        ours = result.adapter.modules[name]
        assert float((ours.delta() - pair.delta()).abs().max()) < 1e-4, name
        assert ours.rank == 4 == ours.alpha
    assert result.error < 1e-4 and max(result.module_errors.values()) < 1e-4
    metadata = result.adapter.metadata
    assert metadata.base_architecture == architecture_of(pipe) and metadata.prediction_type == prediction_type_of(pipe)
    assert metadata.extra["base_fingerprint"] == base_fingerprint(pipe)
    assert (metadata.extra["base_model"], metadata.extra["extracted_from"]) == ("base", "tuned")
    back = read_adapter(write_adapter(result.adapter, tmp_path / "a.safetensors"))
    assert back.metadata == metadata


def test_an_extracted_adapter_generates_what_the_tuned_model_generates(tmp_path):
    base, tuned = fresh("sd1"), fresh("sd1")
    base.save_pretrained(tmp_path / "base")
    merge_into(tuned, random_adapter(base)).save_pretrained(tmp_path / "tuned")
    without, expected = images(base), images(tuned)
    load_spo_lora(base, extract_adapter(tmp_path / "base", tmp_path / "tuned", rank=4).adapter)
    assert torch.allclose(images(base), expected, atol=1e-3)
    assert not torch.allclose(without, expected, atol=1e-2)


def test_energy_chooses_the_rank_of_every_module_and_the_errors_are_true(unets):
    base, tuned, adapter = unets
    for energy in (0.5, 0.99):
        result = extract_adapter(base, tuned, energy=energy)
        lost, whole = {}, {}
        for name, pair in result.adapter.modules.items():
            change = adapter.modules[name].delta()
            values = torch.linalg.svdvals(change.flatten(1)).double().square()
            shares = values.cumsum(0) / values.sum()
            assert pair.rank == int((shares < energy).sum()) + 1 <= 4
            error = float((pair.delta() - change).norm() / change.norm())
            assert result.module_errors[name] == pytest.approx(error, abs=1e-4)
            assert error**2 <= 1 - energy + 1e-6
            block = name.split(".attentions")[0].split(".resnets")[0] if "mid_block" not in name else None
            if block:
                lost[block] = lost.get(block, 0.0) + float((pair.delta() - change).norm()) ** 2
                whole[block] = whole.get(block, 0.0) + float(change.norm()) ** 2
        for block in lost:
            assert result.block_errors[block] == pytest.approx((lost[block] / whole[block]) ** 0.5, abs=1e-4)
    assert extract_adapter(base, tuned).adapter.metadata.extra["extract_energy"] == "0.99"
    assert max(pair.rank for pair in extract_adapter(base, tuned, rank=2, energy=0.99).adapter.modules.values()) == 2


@pytest.mark.parametrize("noise", [1e-4, 0.3])
@pytest.mark.parametrize("shape", [(300, 260), (260, 40, 3, 3)], ids=str)
@pytest.mark.parametrize(
    "options", [{"rank": 8}, {"rank": 3}, {"energy": 0.9}, {"rank": 60, "energy": 0.999}], ids=str
)
def test_a_large_layers_change_is_approximated_best(shape, noise, options, tmp_path):
    generator = torch.Generator().manual_seed(0)
    inner = torch.Size(shape[1:]).numel()
    change = torch.randn(shape[0], 8, generator=generator) @ torch.randn(8, inner, generator=generator)
    change += noise * torch.randn(shape[0], inner, generator=generator)
    key = "down_blocks.0.layer.weight"
    for name, weight in (("base", torch.zeros(shape)), ("tuned", change.reshape(shape))):
        save_file({key: weight}, tmp_path / f"{name}.safetensors")
    result = extract_adapter(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", architecture="stable-diffusion-v1", **options
    )
    (pair,) = result.adapter.modules.values()
    squared = torch.linalg.svdvals(change.double()).square()
    share = squared.cumsum(0) / squared.sum()
    rank = options.get("rank", len(squared))
    if "energy" in options:
        rank = min(rank, int((share < options["energy"]).sum()) + 1)
    assert pair.rank == rank
    best = float((1 - share[rank - 1]).clamp(min=0)) ** 0.5
    error = float((pair.delta().flatten(1) - change).norm() / change.norm())
    assert error < best + 1e-3 and error < best * 1.001 + 1e-5
    assert result.error == pytest.approx(error, rel=1e-3, abs=1e-5)


def test_folders_files_and_shards_give_the_same_adapter(unets, tmp_path):
    base, tuned, adapter = unets
    pipe = merge_into(fresh("sd1"), adapter)
    pipe.unet.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    pipe.save_pretrained(tmp_path / "pipeline")
    expected = extract_adapter(base, tuned, rank=4)
    for other in (tmp_path / "sharded", tuned / FILE, tmp_path / "pipeline"):
        result = extract_adapter(base, other, rank=4)
        assert result.module_errors == expected.module_errors
        assert all(
            torch.equal(pair.up, expected.adapter.modules[name].up) for name, pair in result.adapter.modules.items()
        )
    with pytest.raises(AdapterError, match="do not say which architecture"):
        extract_adapter(base / FILE, tuned / FILE)
    result = extract_adapter(
        base / FILE, tuned / FILE, 4, architecture="stable-diffusion-v1", prediction_type="epsilon"
    )
    assert result.adapter.metadata.prediction_type == "epsilon" and result.module_errors == expected.module_errors


def test_extracting_lists_what_no_lora_can_change(unets):
    base, tuned, _ = unets

    def change(state):
        state["conv_norm_out.weight"] *= 1.5
        state["conv_in.bias"] += 1.0

    change_file(tuned, change)
    result = extract_adapter(base, tuned, rank=4)
    assert result.unexpressed.keys() == {"unet.conv_norm_out.weight", "unet.conv_in.bias"}
    assert result.unexpressed["unet.conv_norm_out.weight"] == pytest.approx(0.5)
    assert result.error < 1e-4


def test_embeddings_are_not_extracted(tmp_path):
    pipe, tuned = fresh("sd1"), fresh("sd1")
    pipe.text_encoder.save_pretrained(tmp_path / "base")
    merge_into(tuned, random_adapter(pipe, components=("text_encoder",)))
    with torch.no_grad():
        tuned.text_encoder.get_input_embeddings().weight.mul_(2.0)
    tuned.text_encoder.save_pretrained(tmp_path / "tuned")
    options = {"component": "text_encoder", "architecture": "stable-diffusion-v1", "rank": 4}
    result = extract_adapter(tmp_path / "base", tmp_path / "tuned", **options)
    (name,) = result.unexpressed
    assert name.endswith("token_embedding.weight") and result.unexpressed[name] == pytest.approx(1.0)
    assert all(module.startswith("text_encoder.text_model.encoder.layers.") for module in result.adapter.modules)


def test_extracting_reads_tensors_one_by_one(unets, monkeypatch):
    base, tuned, _ = unets
    alive, most = [], []
    original = model_files.Weights.read

    def read(weights, key):
        tensor = original(weights, key).clone()
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
        most.append(sum(not reference.expired() for reference in alive))
        return tensor

    monkeypatch.setattr(model_files.Weights, "read", read)
    extract_adapter(base, tuned, rank=1)
    assert len(alive) > 100 and max(most) <= 4


def test_models_that_do_not_differ_are_refused(unets):
    base, tuned, _ = unets
    with pytest.raises(AdapterError, match="changes nothing of base"):
        extract_adapter(base, base)
    (tuned / FILE).write_bytes((base / FILE).read_bytes())
    change_file(tuned, lambda state: state["conv_in.bias"].add_(1.0))
    with pytest.raises(AdapterError, match="changed are only unet.conv_in.bias"):
        extract_adapter(base, tuned)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("conv_in.bias"), "1 weights are in the base only, such as conv_in.bias"),
        (lambda state: state.update(more=torch.ones(1)), "1 weights are in the tuned model only, such as more"),
        (lambda state: state.update({"conv_in.bias": torch.ones(3)}), r"conv_in.bias is \[32\] in the base, \[3\]"),
        (lambda state: state["conv_in.weight"].fill_(float("nan")), "NaN"),
    ],
)
def test_models_that_do_not_match_are_refused(unets, change, reason):
    base, tuned, _ = unets
    change_file(tuned, change)
    with pytest.raises(AdapterError, match=reason):
        extract_adapter(base, tuned)


def test_models_of_different_kinds_are_refused(unets, tmp_path):
    base, tuned, _ = unets
    with pytest.raises(AdapterError, match="must share the architecture"):
        extract_adapter(base, tuned, architecture="flux-1-dev")
    fresh("sd1").save_pretrained(tmp_path / "epsilon")
    fresh("sd1", prediction_type="v_prediction").save_pretrained(tmp_path / "v")
    with pytest.raises(AdapterError, match="must share the prediction type, got epsilon and v_prediction"):
        extract_adapter(tmp_path / "epsilon", tmp_path / "v")
    fresh("flux").transformer.save_pretrained(tmp_path / "flux")
    with pytest.raises(AdapterError, match="base has unet, flux has transformer"):
        extract_adapter(base, tmp_path / "flux")


def test_extracting_refuses_what_is_no_model(unets, tmp_path):
    base, _, adapter = unets
    lora = write_adapter(adapter, tmp_path / "lora.safetensors")
    with pytest.raises(UnsupportedAdapterError, match="names that diffusers uses"):
        extract_adapter(base, lora)
    with pytest.raises(UnreadableAdapterError, match="no file or folder"):
        extract_adapter(base, tmp_path / "none")
    (tmp_path / "pickled" / "unet").mkdir(parents=True)
    (tmp_path / "pickled" / "unet" / "model.bin").write_bytes(b"a pickle")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / FILE).write_bytes((base / FILE).read_bytes()[:-7])
    with pytest.raises(UnreadableAdapterError, match="it is cut off"):
        extract_adapter(base, tmp_path / "cut", component="unet")
    with pytest.raises(UnreadableAdapterError, match="pickle, which can run code and is never opened"):
        extract_adapter(base, tmp_path / "pickled" / "unet")
    with pytest.raises(AdapterError, match="no component vae"):
        extract_adapter(base, base, component="vae")
    for options, reason in (({"rank": 0}, "rank"), ({"energy": 0.0}, "energy"), ({"energy": 1.1}, "energy")):
        with pytest.raises(ConfigError, match=reason):
            extract_adapter(base, base, **options)


def test_an_index_may_not_lead_out_of_its_folder_nor_promise_what_is_not_there(unets, tmp_path):
    base, _, adapter = unets
    pipe = merge_into(fresh("sd1"), adapter)
    pipe.unet.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    index = tmp_path / "sharded" / f"{FILE}.index.json"
    content = json.loads(index.read_text())
    whole = dict(content["weight_map"])
    for place, reason in (("../base/" + FILE, "outside its own folder"), ("none.safetensors", "no file")):
        content["weight_map"] = whole | {"conv_in.bias": place}
        index.write_text(json.dumps(content))
        with pytest.raises(UnreadableAdapterError, match=reason):
            extract_adapter(base, tmp_path / "sharded")
    content["weight_map"] = whole | {"more": whole["conv_in.bias"]}
    index.write_text(json.dumps(content))
    with pytest.raises(UnreadableAdapterError, match="lacks more, which the index places there"):
        extract_adapter(base, tmp_path / "sharded")


def test_an_adapter_extracted_from_a_mixture_of_experts_fits_its_base(tmp_path):
    def model():
        torch.manual_seed(0)
        return HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_channels=[32, 16],
            text_emb_dim=64,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
        )

    model().save_pretrained(tmp_path / "base")
    tuned = model()
    with torch.no_grad():
        tuned.double_stream_blocks[0].block.attn1.to_q.weight.add_(0.1)
        # The router is a matrix that is no linear layer.
        tuned.double_stream_blocks[0].block.ff_i.gate.weight.add_(0.1)
    tuned.save_pretrained(tmp_path / "tuned")
    result = extract_adapter(tmp_path / "base", tmp_path / "tuned", rank=4)
    assert list(result.adapter.modules) == ["transformer.double_stream_blocks.0.block.attn1.to_q"]
    assert list(result.unexpressed) == ["transformer.double_stream_blocks.0.block.ff_i.gate.weight"]
    assert result.adapter.metadata.extra["base_fingerprint"] == fingerprint_of_shapes(weight_shapes(model()))


def test_component_folders_need_no_model_class(unets, monkeypatch):
    base, tuned, _ = unets
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert extract_adapter(base, tuned, rank=4).error < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_extracted_adapter_counts_the_rounding_to_its_type(unets, dtype):
    base, tuned, adapter = unets
    result = extract_adapter(base, tuned, rank=4, dtype=dtype)
    for name, pair in result.adapter.modules.items():
        assert pair.down.dtype == dtype == pair.up.dtype
        change = adapter.modules[name].delta()
        error = float((pair.delta() - change).norm() / change.norm())
        assert result.module_errors[name] == pytest.approx(error, rel=0.05) and 1e-5 < error < 1e-2
    assert 1e-5 < result.error < 1e-2
