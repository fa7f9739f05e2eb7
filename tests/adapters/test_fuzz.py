"""Files made by chance: whatever the bytes are, reading gives an adapter or an AdapterError, and nothing else."""

import json
import struct
import warnings
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from t2i_spo_plugin.adapters import read_adapter
from t2i_spo_plugin.errors import AdapterError


FEW = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(FEW, max_examples=4000, derandomize=False, print_blob=True)
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONFIG = {"unet.lora_alpha": 3, "unet.alpha_pattern": {"^down.*to_q": 2}, "unet.use_rslora": False}


@cache
def seeds():
    """Small valid files: `(header, weights)` in kohya, diffusers and processor layout."""
    down, up, alpha = torch.randn(2, 3), torch.randn(4, 2).half(), torch.tensor(2.0)
    flat = "lora_unet_" + Q.replace(".", "_")
    files = [
        save(
            {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.alpha": alpha}, {"format": "pt"}
        ),
        save(
            {f"unet.{Q}.lora_A.weight": down, f"unet.{Q}.lora_B.weight": up.to(torch.float8_e4m3fn)},
            {"lora_adapter_metadata": json.dumps(CONFIG), "modelspec.architecture": "stable-diffusion-v1/lora"},
        ),
        save({f"{Q[:-5]}.processor.to_out_lora.{role}.weight": torch.ones(2, 2) for role in ("down", "up")}),
    ]
    return [(json.loads(data[8 : 8 + n]), data[8 + n :]) for data in files for n in struct.unpack("<Q", data[:8])]


def pack(header, weights):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + weights


numbers = st.one_of(st.integers(-2, 70), st.sampled_from([2**31, 2**63, 2**64, True, 1.5, float("nan")]))
texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["F32", "F16", "BF16", "F8_E5M2", "I64", "BOOL", "C64", "pt", "[" * 3000, "{}", "1e999", "\ud800"]
    ),
    st.sampled_from([f"unet.{Q}.lora_A.weight", f"unet.{Q}.alpha", "lora_te_x.lora_up.weight", "lora_unet_.alpha"]),
    st.sampled_from(["lora_unet_input_blocks_0_1_op.alpha", "lycoris_.alpha", "transformer.lora_A.weight", ".alpha"]),
)
values = st.recursive(
    st.one_of(st.none(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {"dtype": texts, "shape": st.lists(numbers, max_size=4), "data_offsets": st.lists(numbers, min_size=1, max_size=3)}
)
simple = st.one_of(st.none(), st.booleans(), st.integers(-2, 9), texts, st.lists(st.integers(0, 9), max_size=2))
patterns = st.one_of(st.text("abQ.*^$()+\\", max_size=8), st.sampled_from([Q, "to_q", "^down_blocks.*to_q", "(a+)+"]))
configs = st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": simple,
        "alpha_pattern": st.one_of(simple, st.dictionaries(patterns, simple, max_size=3)),
        "use_rslora": simple,
        "use_dora": st.sampled_from([None, False, True]),
        "peft_type": st.sampled_from(["LORA", "LOHA", None, 3]),
    },
)
headers = st.one_of(values, st.dictionaries(texts, st.one_of(entries, values), max_size=5))


@st.composite
def damaged_files(draw):
    """A valid file with some bytes changed, removed, inserted or cut off."""
    data = bytearray(pack(*draw(st.sampled_from(seeds()))))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["change", "remove", "insert", "cut"]))
        if kind == "change" and data:
            data[at] = draw(st.integers(0, 255))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 9))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "cut":
            del data[at:]
    return bytes(data)


@st.composite
def altered_headers(draw):
    """A valid file in whose header a name, a field or some metadata is another one, offsets still in order or not."""
    header, weights = draw(st.sampled_from(seeds()))
    header = json.loads(json.dumps(header))
    for _ in range(draw(st.integers(1, 3))):
        names = sorted(name for name, entry in header.items() if isinstance(entry, dict) and "dtype" in entry)
        kind = draw(st.sampled_from(["name", "field", "metadata", "config", "shape", "weights"]))
        if kind == "metadata":
            header["__metadata__"] = draw(st.one_of(values, st.dictionaries(texts, texts, max_size=3)))
        elif kind == "config":
            ours = configs.map(lambda config: {f"unet.{key}": value for key, value in config.items()})
            text = draw(st.one_of(texts, values.map(json.dumps), ours.map(json.dumps)))
            header["__metadata__"] = {"lora_adapter_metadata": text}
        elif kind == "weights":
            weights = draw(st.binary(min_size=len(weights), max_size=len(weights)))
        elif names:
            name = draw(st.sampled_from(names))
            if kind == "name":
                header[draw(texts)] = header.pop(name)
            elif kind == "field":
                header[name][draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(values)
            elif isinstance(header[name]["shape"], list):
                shape = draw(st.permutations([*header[name]["shape"], 1]))
                header[name]["shape"] = shape if draw(st.booleans()) else [size for size in shape if size != 1]
    return pack(header, weights)


files = st.one_of(
    st.binary(max_size=200),
    st.builds(pack, st.binary(max_size=60).map(lambda data: b"{" + data), st.binary(max_size=20)),
    st.builds(pack, headers, st.binary(max_size=70)),
    damaged_files(),
    altered_headers(),
)


def assert_read_or_refused(data, strict, path):
    path.write_bytes(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = read_adapter(path, strict)
    except AdapterError as error:
        str(error).encode("utf-8")
        return False
    assert all(pair.delta().ndim >= 2 for pair in adapter.modules.values())
    return True


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "adapter.safetensors"


def test_reading_accepts_the_seeds_of_the_fuzzer(path):
    assert len(seeds()) == 3
    assert all(assert_read_or_refused(pack(*seed), True, path) for seed in seeds())


@FEW
@given(data=files, strict=st.booleans())
def test_reading_any_bytes_gives_an_adapter_or_an_error(data, strict, path):
    assert_read_or_refused(data, strict, path)


@FEW
@given(data=altered_headers(), strict=st.booleans())
def test_reading_any_header_gives_an_adapter_or_an_error(data, strict, path):
    assert_read_or_refused(data, strict, path)


@FEW
@given(
    config=st.one_of(
        st.binary(max_size=60), values.map(json.dumps).map(str.encode), configs.map(json.dumps).map(str.encode)
    )
)
def test_reading_any_peft_configuration_gives_an_adapter_or_an_error(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft", numbered=True)
    (folder / "adapter_config.json").write_bytes(config)
    tensors = {f"base_model.model.{Q}.lora_{role}.weight": torch.ones(2, 2) for role in "AB"}
    assert_read_or_refused(save(tensors), True, folder / "adapter_model.safetensors")


@pytest.mark.slow
@MANY
@given(data=st.one_of(files, damaged_files()), strict=st.booleans())
def test_reading_many_bytes_gives_adapters_or_errors(data, strict, path):
    assert_read_or_refused(data, strict, path)


@pytest.mark.slow
@MANY
@given(data=damaged_files(), strict=st.booleans())
def test_reading_many_damaged_files_gives_adapters_or_errors(data, strict, path):
    assert_read_or_refused(data, strict, path)


@pytest.mark.slow
@MANY
@given(data=altered_headers(), strict=st.booleans())
def test_reading_many_headers_gives_adapters_or_errors(data, strict, path):
    assert_read_or_refused(data, strict, path)
