"""Every row of docs/refusals.md: the file is refused as the table says, quickly, and nothing has happened."""

import json
import pickle
import re
import struct
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from support.pipelines import base_image, fresh, images, random_adapter

from t2i_spo_plugin import errors
from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.adapters.layouts import encode
from t2i_spo_plugin.files import MAX_JSON
from t2i_spo_plugin.pipelines.architecture import lora_components
from t2i_spo_plugin.pipelines.loading import load_spo_lora


TABLE = Path(__file__).parents[2] / "docs" / "refusals.md"
ROW = re.compile(r"^\| (?P<what>[^|]+) \| `(?P<kind>\w+Error)` \| (?P<message>[^|]+) \|$", re.MULTILINE)
FILES = TABLE.read_text(encoding="utf-8").partition("## The state of the pipeline")[0]
ROWS = {row["what"]: (row["kind"], row["message"]) for row in ROW.finditer(FILES)}
MEGABYTES = 2**20
ENCODER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def shared():
    """One tiny pipeline for all rows: what they may not change."""
    return fresh("sd1")


@pytest.fixture(scope="module")
def valid(shared):
    """The tensors of a valid kohya file of 24 modules for the pipeline."""
    return encode(random_adapter(shared).modules, "stable-diffusion-v1")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


def raw(header, data=b"", length=None):
    """The bytes of a file with `header`, a mapping or bytes, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin=0, end=16, shape=(4,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file_rows(valid):
    """Row -> bytes of the file."""
    good = save(valid)
    text_length = struct.unpack("<Q", good[:8])[0]
    tags = {"__metadata__": {"ss_tag_frequency": "x" * MAX_JSON}}
    zeros = bytes(16)
    return {
        "a pickle named .safetensors": pickle.dumps(Bomb()),
        "a PyTorch archive named .safetensors": b"PK\x03\x04" + bytes(60),
        "a web page": b"\n<!DOCTYPE html><html><body>404</body></html>",
        "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n",
        "empty": b"",
        "a few bytes": bytes(9),
        "cut off in the header": good[: text_length // 2],
        "cut off in the weights": good[:-7],
        "a header length beyond the file": raw({"a": entry()}, zeros, 10**12),
        "a huge header": raw(tags),
        "a header of too many parts": raw(b"{" + b'"a":[],' * 300_000 + b'"b":[]}'),
        "a header that is no JSON": raw(b'{"a": }'),
        "a header that is no text": raw(b'{"a\xff": {}}'),
        "a deeply nested header": raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "a number without end": raw(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 1_000_000 + b"]}}"),
        "a tensor twice": raw(f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode(), zeros),
        "a tensor without a type": raw({"a": {"shape": [4], "data_offsets": [0, 16]}}, zeros),
        "a shape of negative sizes": raw({"a": entry(shape=(-2, -2))}, zeros),
        "offsets the wrong way round": raw({"a": entry(16, 0)}, zeros),
        "offsets beyond the file": raw({"a": entry(0, 2**50, (2**48,))}, zeros),
        "overlapping offsets": raw({"a": entry(), "b": entry(8, 24)}, bytes(24)),
        "a gap between two tensors": raw({"a": entry(), "b": entry(24, 40)}, bytes(40)),
        "trailing bytes": good + bytes(7),
        "a shape that is not the size": raw({"a": entry(shape=(5,))}, zeros),
        "a path for a name": raw({"unet.../../../etc/passwd.lora_A.weight": entry()}, zeros),
        "an endless name": raw({"a" * 100_000: entry()}, zeros),
        "a type that is not understood": raw({"a": entry(0, 3, (4,), "F6_E2M3")}, bytes(3)),
        "metadata that is no mapping": raw({"__metadata__": [1]}),
        "metadata that is no text": raw({"__metadata__": {"spo.seed": 3}}),
        "metadata twice": raw(b'{"__metadata__": {"format": "pt", "format": "pt"}}'),
        "an endless metadata key": raw({"__metadata__": {"k" * 100_000: ""}}),
    }


def tensor_rows(valid, native):
    """Row -> tensors of the file, and metadata where it has some."""
    name = next(iter(valid)).rpartition(".lora_")[0]
    down, up, alpha = (f"{name}.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    q = next(iter(native)).rpartition(".lora_")[0]
    whole = {f"model.diffusion_model.input_blocks.{n}.0.weight": torch.ones(2, 2) for n in range(9)}

    def without(key):
        return {other: tensor for other, tensor in valid.items() if other != key}

    def configured(**config):
        return native, {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}

    def pair_at(flat, rows=32):
        return {f"{flat}.lora_down.weight": torch.ones(4, 32), f"{flat}.lora_up.weight": torch.ones(rows, 4)}

    t5 = pair_at("lora_te3_encoder_block_0_layer_0_SelfAttention_q")
    qkv = "lora_unet_double_blocks_0_img_attn_qkv"
    scaled = pair_at("lora_unet_mid_block_attentions_0_proj_in")
    scaled = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in scaled.items()}
    scaled |= {f"{key}_scale": torch.ones(2) for key in scaled}

    return {
        "XLabs' processors for Flux": {"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(4, 32)},
        "names of another model's code": pair_at("diffusion_model.some_blocks.0.attn.proj"),
        "names of another model's code, flat": pair_at("lora_unet_some_blocks_0_attn_proj"),
        "a block of Flux without such a module": pair_at("lora_unet_double_blocks_0_img_norm"),
        "a fused layer of other sizes": pair_at(qkv, 95),
        "a fused layer and one of its parts": pair_at(qkv, 96)
        | pair_at("lora_transformer_transformer_blocks_0_attn_to_q"),
        "the T5 text encoder too": valid | t5,
        "the T5 text encoder alone": t5,
        "a scale of other sizes": scaled,
        "adapter metadata that is no JSON": (native, {"lora_adapter_metadata": "{"}),
        "deeply nested adapter metadata": (native, {"lora_adapter_metadata": "[" * 100_000 + "]" * 100_000}),
        "adapter metadata of a list": (native, {"lora_adapter_metadata": "[1]"}),
        "an alpha of text": configured(lora_alpha="eight"),
        "two alphas that disagree": (valid, {"ss_network_alpha": "3.0"}),
        "a rank that is not that of the weights": (native, {"lora_alpha": "8", "r": "16"}),
        "a flat header with patterns": (native, {"lora_alpha": "8", "use_rslora": "true"}),
        "an alpha pattern that runs for ever": configured(alpha_pattern={"(a+)+": 2}),
        "alpha patterns of a list": configured(alpha_pattern=["to_q"]),
        "an architecture of a million letters": (valid, {"modelspec.architecture": "x" * 1_000_000}),
        "an unknown prediction type": (valid, {"spo.prediction_type": "velocity"}),
        "no weights": {},
        "LoHa": {f"{name}.hada_w1_a": torch.ones(2, 2), f"{name}.alpha": torch.tensor(1.0)},
        "LoKr": {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(2, 2)},
        "DoRA": valid | {f"{name}.dora_scale": torch.ones(1, 2)},
        "Tucker decomposition": valid | {f"{name}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        "DoRA by its configuration": configured(use_dora=True),
        "a full checkpoint": whole,
        "an unknown prefix": {key.replace("lora_unet_", "lora_prior_"): tensor for key, tensor in valid.items()},
        "foreign keys": valid | {"lora_unet_conv_in.diff": torch.ones(2, 2), "step": torch.ones(1)},
        "alpha for some modules only": without(alpha),
        "a matrix that is missing": without(up),
        "an alpha without matrices": valid | {"lora_unet_conv_in.alpha": torch.tensor(1.0)},
        "a matrix twice": native | {f"{q}.lora.down.weight": native[f"{q}.lora_A.weight"].clone()},
        "ranks that differ": valid | {down: valid[down][:-1].clone()},
        "no rank at all": valid | {down: valid[down][:0].clone(), up: valid[up][:, :0].clone()},
        "an alpha of several numbers": valid | {alpha: torch.ones(2)},
        "alpha zero": valid | {alpha: torch.tensor(0.0)},
        "alpha negative": valid | {alpha: torch.tensor(-2.0)},
        "alpha NaN": valid | {alpha: torch.tensor(float("nan"))},
        "alpha out of proportion": valid | {alpha: torch.tensor(1e6)},
        "NaN": valid | {down: torch.full_like(valid[down], float("nan"))},
        "Inf": valid | {up: torch.full_like(valid[up], float("-inf"))},
        "all zero": {key: tensor if "alpha" in key else torch.zeros_like(tensor) for key, tensor in valid.items()},
        "whole numbers for weights": valid | {down: valid[down].int()},
        "another architecture by its claim": (valid, {"modelspec.architecture": "flux-1-dev/lora"}),
        "another architecture by its modules": {
            key.replace("unet.", "transformer."): tensor for key, tensor in native.items()
        },
        "another architecture by its shapes": valid | {down: torch.ones(4, 2048), up: torch.ones(1280, 4)},
        "another prediction type": (valid, {"modelspec.prediction_type": "v"}),
        "a partial match": {key.replace(name, f"{name}_more"): tensor for key, tensor in valid.items()},
        "a module under two spellings": native
        | {key.replace("transformer_blocks.0", "transformer_blocks_0"): native[key].clone() for key in native},
        "text encoder only": {
            f"{ENCODER}.lora_{letter}.weight": torch.ones(shape) for letter, shape in SHAPES.items()
        },
    }


SHAPES = {"A": (4, 32), "B": (32, 4)}


def other_rows(native, folder):
    """Row -> path of what is loaded."""
    bare = {key.removeprefix("unet."): tensor for key, tensor in native.items()}
    for name in ("alone", "broken", "loha"):
        (folder / name).mkdir()
        (folder / name / "adapter_model.safetensors").write_bytes(
            save({f"base_model.model.{k}": v for k, v in bare.items()})
        )
    (folder / "broken" / "adapter_config.json").write_text('{"r": 4')
    (folder / "loha" / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    (folder / "a.pt").write_bytes(pickle.dumps(Bomb()))
    return {
        "no such file": folder / "missing.safetensors",
        "a pickle by its name": folder / "a.pt",
        "a PEFT folder without its configuration": folder / "alone",
        "a PEFT folder with a broken configuration": folder / "broken",
        "another method in a PEFT folder": folder / "loha",
    }


def state_of(pipe):
    """All weights, and whatever is registered on the modules."""
    return {
        name: [(key, type(module), module.training) for key, module in model.named_modules()]
        + [
            (key, weight.detach().clone(), weight.requires_grad)
            for key, weight in model.state_dict(keep_vars=True).items()
        ]
        for name, model in lora_components(pipe).items()
    }


def assert_untouched(pipe, before):
    for name, after in state_of(pipe).items():
        assert len(after) == len(before[name])
        for old, new in zip(before[name], after, strict=True):
            assert old[0] == new[0] and old[2] == new[2]
            assert torch.equal(old[1], new[1]) if isinstance(old[1], torch.Tensor) else old[1] is new[1]
    assert pipe.get_list_adapters() == {}
    assert not any(getattr(model, "peft_config", None) for model in lora_components(pipe).values())


@pytest.fixture(scope="module")
def native(shared):
    """The tensors of a valid file with diffusers' names."""
    return encode(random_adapter(shared).modules, "native")


@pytest.fixture(scope="module")
def sources(valid, native, tmp_path_factory):
    """Row -> path."""
    folder = tmp_path_factory.mktemp("refusals")
    content = dict(file_rows(valid))
    for what, tensors in tensor_rows(valid, native).items():
        content[what] = save(*tensors) if isinstance(tensors, tuple) else save(tensors)
    paths = other_rows(native, folder)
    for number, (what, data) in enumerate(content.items()):
        (folder / str(number)).mkdir()
        paths[what] = folder / str(number) / "adapter.safetensors"
        paths[what].write_bytes(data)
    return paths


def test_the_table_has_a_row_for_every_case(sources):
    assert len(ROWS) > 70
    assert set(ROWS) == set(sources)


@pytest.mark.parametrize("what", ROWS)
def test_loading_refuses_every_row_as_the_table_says(what, shared, sources):
    kind, message = ROWS[what]
    before = state_of(shared)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises(errors.AdapterError) as caught:
            load_spo_lora(shared, sources[what])
        took, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is getattr(errors, kind)
    assert re.search(".+".join(map(re.escape, message.split("…"))), str(caught.value)), str(caught.value)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()
    assert took < 2.0 and peak < 64 * MEGABYTES
    assert_untouched(shared, before)


def test_a_huge_file_is_refused_by_its_names_alone(tmp_path, shared):
    path = tmp_path / "checkpoint.safetensors"
    size = 40 * 2**30
    header = json.dumps({"model.diffusion_model.out.2.weight": entry(0, size, (size // 4,))}).encode()
    with open(path, "wb") as file:
        file.write(raw(header))
        file.truncate(8 + len(header) + size)
    start = time.process_time()
    with pytest.raises(errors.UnsupportedAdapterError, match="a whole model is no adapter"):
        load_spo_lora(shared, path)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize("source", ["x" * 5000, "\0", "~no_such_user_at_all/x", "a/\0.safetensors", ""], ids=range(5))
def test_loading_refuses_what_is_no_path(source, shared):
    with pytest.raises(errors.AdapterError):
        load_spo_lora(shared, source)


def test_the_pipeline_generates_as_before_after_all_refusals(sources, shared):
    assert torch.equal(images(shared), base_image("sd1"))


def test_strict_false_reads_the_rest_and_counts_what_it_left_out(sources, valid):
    for what, counts in (
        ("foreign keys", "2 of 74 tensors"),
        ("alpha for some modules only", "only 23 of 24 modules"),
    ):
        with pytest.warns(UserWarning, match=counts):
            adapter = read_adapter(sources[what], strict=False)
        assert len(adapter.modules) == 24 and counts in adapter.notes[0]
        pipe = fresh("sd1")
        with pytest.warns(UserWarning, match=counts):
            assert counts in load_spo_lora(pipe, sources[what], strict=False).notes[0]
    for what in ("LoHa", "DoRA", "a matrix that is missing", "all zero", "a full checkpoint", "ranks that differ"):
        with pytest.raises(errors.AdapterError):
            read_adapter(sources[what], strict=False)


def test_text_encoders_alone_load_when_allowed(sources):
    pipe = fresh("sd1")
    with pytest.warns(UserWarning, match="change text encoders only"):
        assert load_spo_lora(pipe, sources["text encoder only"], strict=False).components == ("text_encoder",)


def test_a_file_without_any_alpha_is_noted_and_nothing_more(native, valid, tmp_path):
    bare = {key: tensor for key, tensor in valid.items() if not key.endswith(".alpha")}
    for number, tensors in enumerate((bare, native)):
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(save(tensors))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapter = read_adapter(path)
        assert adapter.notes == ("the file states no alpha; it is taken to be the rank, as other programs do",)
        assert {pair.alpha for pair in adapter.modules.values()} == {4.0}
