import hashlib
import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair, find_adapter_file, read_adapter, write_adapter
from t2i_spo_plugin.errors import AdapterError, InvalidAdapterError


Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
SD1, SD3 = "stable-diffusion-v1", "stable-diffusion-3"


def pair(rank=4, alpha=2.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 6, generator=generator), torch.randn(8, rank, generator=generator)
    return LoraPair(down.to(dtype), up.to(dtype), alpha)


def adapter(architecture=SD1, dtype=torch.float32, **extra):
    component = "unet" if architecture == SD1 else "transformer"
    generator = torch.Generator().manual_seed(1)
    kernel, out = torch.randn(3, 3, 3, 3, generator=generator), torch.randn(6, 3, 1, 1, generator=generator)
    conv = LoraPair(kernel.to(dtype), out.to(dtype), 3.0)
    modules = {f"{component}.{Q}": pair(dtype=dtype), f"{component}.{CONV}": conv}
    return Adapter(modules, AdapterMetadata(architecture, "v_prediction", "Test ü", dict(extra)))


def raw_header(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", [SD1, SD3])
def test_a_written_adapter_is_read_as_it_was(architecture, dtype, tmp_path):
    original = adapter(architecture, dtype, base_fingerprint="0123", **{"modelspec.author": "someone"})
    path = write_adapter(original, tmp_path / "new" / "adapter.safetensors")
    back = read_adapter(path)
    assert back.metadata == original.metadata
    assert back.modules.keys() == original.modules.keys()
    for name, theirs in original.modules.items():
        ours = back.modules[name]
        assert torch.equal(ours.down, theirs.down) and ours.down.dtype == dtype
        # Folding alpha into B rounds in the file's own type; the kohya layout keeps alpha apart.
        rounding = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
        tolerance = rounding if architecture == SD3 else 0.0
        assert torch.allclose(ours.delta(), theirs.delta(), rtol=tolerance, atol=tolerance)
    if architecture == SD1:
        assert {name: ours.alpha for name, ours in back.modules.items()} == {f"unet.{Q}": 2.0, f"unet.{CONV}": 3.0}


def test_equal_adapters_give_equal_bytes(tmp_path):
    original = adapter(base_fingerprint="0123", seed="1")
    reordered = Adapter(
        dict(reversed(original.modules.items())),
        AdapterMetadata(SD1, "v_prediction", "Test ü", dict(reversed(original.metadata.extra.items()))),
    )
    first = write_adapter(original, tmp_path / "a.safetensors").read_bytes()
    assert write_adapter(reordered, tmp_path / "b.safetensors").read_bytes() == first
    again = write_adapter(read_adapter(tmp_path / "a.safetensors"), tmp_path / "c.safetensors").read_bytes()
    assert again == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.safetensors" for name in "abc"]


def test_the_header_says_what_user_interfaces_ask_for(tmp_path, monkeypatch):
    path = write_adapter(adapter(base_model="tiny"), tmp_path / "a.safetensors")
    header, data = raw_header(path)
    metadata = header["__metadata__"]
    digest = hashlib.sha256(data).hexdigest()
    assert list(metadata) == sorted(metadata)
    assert metadata["sshs_model_hash"] == digest and metadata["modelspec.hash_sha256"] == f"0x{digest}"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert metadata["modelspec.prediction_type"] == "v"
    for key in ("sai_model_spec", "implementation", "title", "resolution"):
        assert metadata[f"modelspec.{key}"]
    assert metadata["ss_base_model_version"] == "sd_v1_v"
    assert metadata["ss_network_dim"] == "Dynamic" and metadata["ss_network_alpha"] == "Dynamic"
    assert metadata["spo.base_model"] == "tiny"
    assert "modelspec.date" not in metadata
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    write_adapter(adapter(), path)
    assert raw_header(path)[0]["__metadata__"]["modelspec.date"] == "1970-01-02T00:00:00Z"
    assert "modelspec.date" not in read_adapter(path).metadata.extra


@pytest.mark.parametrize(("layout", "alpha"), [("native", "4.0"), ("diffusers", "3.0")])
def test_the_header_states_the_alpha_that_the_layout_leaves(layout, alpha, tmp_path):
    """The native layout folds alpha into B, which leaves one equal to the rank."""
    one = Adapter({f"transformer.{Q}": pair(alpha=3.0)}, AdapterMetadata(SD3))
    header, _ = raw_header(write_adapter(one, tmp_path / "a.safetensors", layout))
    assert header["__metadata__"]["ss_network_alpha"] == alpha and header["__metadata__"]["ss_network_dim"] == "4"


def test_every_tensor_of_a_written_file_is_aligned(tmp_path):
    header, data = raw_header(write_adapter(adapter(dtype=torch.float16), tmp_path / "a.safetensors"))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    ends = sorted(entry["data_offsets"] for entry in entries.values())
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])] and ends[-1][1] == len(data)
    assert {entry["dtype"] for entry in entries.values()} == {"F16", "F32"}
    assert all(entry["data_offsets"][0] % {"F16": 2, "F32": 4}[entry["dtype"]] == 0 for entry in entries.values())


def test_safetensors_reads_every_tensor_of_a_written_file(tmp_path):
    path = write_adapter(adapter(dtype=torch.float16), tmp_path / "a.safetensors")
    tensors = load_file(path)
    flat = "lora_unet_" + Q.replace(".", "_")
    assert torch.equal(tensors[f"{flat}.lora_down.weight"], pair(dtype=torch.float16).down)
    assert float(tensors[f"{flat}.alpha"]) == 2.0
    native = load_file(write_adapter(adapter(SD3), tmp_path / "b.safetensors"))
    assert set(native) == {f"transformer.{name}.lora_{letter}.weight" for name in (Q, CONV) for letter in "AB"}


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({}, "no module"),
        ({Q: pair()}, "starts with one of"),
        ({"unet": pair()}, "starts with one of"),
        ({f"unet.{Q}": pair(alpha=0.0)}, "alpha 0.0"),
        ({f"unet.{Q}": pair(alpha=-1.0)}, "alpha -1.0"),
        ({f"unet.{Q}": pair(alpha=float("nan"))}, "alpha nan"),
        ({f"unet.{Q}": pair(alpha=float("inf"))}, "alpha inf"),
        ({f"unet.{Q}": pair(alpha=4000.1)}, "alpha 4000.1 is out of range for rank 4; .* at most 1000 times the rank"),
        ({f"unet.{Q}": LoraPair(torch.full((4, 6), float("nan")), torch.ones(8, 4), 4)}, "NaN or Inf"),
        ({f"unet.{Q}": LoraPair(torch.ones(4, 6), torch.ones(8, 4).half() * 65504 * 2, 4)}, "NaN or Inf"),
        ({f"unet.{Q}": LoraPair(torch.zeros(4, 6), torch.full((8, 4), float("nan")), 4)}, "NaN or Inf"),
        (
            {f"unet.{Q}": pair(), f"unet.{CONV}": LoraPair(torch.ones(4, 6) * float("nan"), torch.zeros(8, 4), 4)},
            "NaN",
        ),
        ({f"unet.{Q}": LoraPair(torch.ones(4, 6), torch.zeros(8, 4), 4)}, "all weights are zero"),
        ({f"unet.{Q}": LoraPair(torch.ones(4, 6).int(), torch.ones(8, 4), 4)}, "floating point"),
    ],
)
def test_invalid_adapters_are_refused(modules, reason, tmp_path):
    bad = Adapter(modules, AdapterMetadata(SD1))
    with pytest.raises(AdapterError, match=reason):
        bad.validate()
    with pytest.raises(AdapterError, match=reason):
        write_adapter(bad, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_rank_of_an_adapter_is_that_of_most_modules():
    ranks = {f"unet.mid_block.{n}": rank for n, rank in enumerate((8, 4, 4, 2))}
    modules = {name: LoraPair(torch.ones(rank, 6), torch.ones(8, rank), 1.0) for name, rank in ranks.items()}
    assert Adapter(modules).rank == 4


@pytest.mark.parametrize("alpha", [1e-6, 4000.0])
def test_an_alpha_at_the_end_of_its_range_is_accepted(alpha):
    assert Adapter({f"unet.{Q}": pair(alpha=alpha)}).validate().rank == 4


def test_an_adapter_may_have_a_module_without_effect():
    good = pair()
    zero = LoraPair(good.down, torch.zeros_like(good.up), 4)
    assert Adapter({f"unet.{Q}": good, f"unet.{CONV}": zero}).validate().rank == 4


def test_metadata_are_checked(tmp_path):
    with pytest.raises(AdapterError, match="prediction_type"):
        AdapterMetadata(SD1, "velocity")
    with pytest.raises(AdapterError, match="metadata are text"):
        AdapterMetadata(SD1, extra={"steps": 3})
    for key in ("base_architecture", "format", "modelspec.title", "modelspec.hash_sha256"):
        with pytest.raises(AdapterError, match=f"{key} is written from the adapter itself and cannot be given"):
            write_adapter(adapter(**{key: "other"}), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="must name its base architecture"):
        write_adapter(Adapter({f"unet.{Q}": pair()}), tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="written as .safetensors"):
        write_adapter(adapter(), tmp_path / "a.bin")


def test_headers_of_other_programs_are_understood(tmp_path):
    flat = "lora_unet_" + Q.replace(".", "_")
    tensors = {f"{flat}.lora_down.weight": pair().down, f"{flat}.lora_up.weight": pair().up}
    save_file(tensors, tmp_path / "a.safetensors", {"ss_base_model_version": "sdxl_base_v1-0", "other": "x"})
    metadata = read_adapter(tmp_path / "a.safetensors").metadata
    assert metadata.base_architecture == "stable-diffusion-xl-v1-base" and metadata.extra == {}
    header = {"modelspec.architecture": "stable-diffusion-v2-768-v/lora", "modelspec.prediction_type": "v"}
    save_file(tensors, tmp_path / "a.safetensors", header)
    metadata = read_adapter(tmp_path / "a.safetensors").metadata
    assert (metadata.base_architecture, metadata.prediction_type) == ("stable-diffusion-v2", "v_prediction")
    save_file(tensors, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").metadata.base_architecture == ""


def test_an_architecture_of_a_header_is_short_and_printable(tmp_path):
    flat = "lora_unet_" + Q.replace(".", "_")
    tensors = {f"{flat}.lora_down.weight": pair().down, f"{flat}.lora_up.weight": pair().up}
    for name in ("x" * 101, "stable\x1b[31m", "two\nlines"):
        save_file(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": name})
        with pytest.raises(InvalidAdapterError, match="the name of its architecture is invalid"):
            read_adapter(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": "x" * 100})
    assert read_adapter(tmp_path / "a.safetensors").metadata.base_architecture == "x" * 100


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was opened')",)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.ckpt", "a.pth", "a.PT", "a.safetensors"])
def test_reading_opens_no_pickle(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Bomb()))
    reason = "not a readable safetensors" if name.endswith("safetensors") else "pickle, which can run code"
    with pytest.raises(AdapterError, match=reason):
        read_adapter(path)
    if not name.endswith("safetensors"):
        with pytest.raises(AdapterError, match="no safetensors file"):
            read_adapter(tmp_path)


def test_a_folder_is_searched_for_the_one_adapter_file(tmp_path):
    with pytest.raises(AdapterError, match="no file"):
        read_adapter(tmp_path / "missing.safetensors")
    with pytest.raises(AdapterError, match="not a .safetensors file"):
        read_adapter(tmp_path / "missing.zip")
    one = write_adapter(adapter(), tmp_path / "one.safetensors")
    assert find_adapter_file(tmp_path) == one
    write_adapter(adapter(), tmp_path / "two.safetensors")
    with pytest.raises(AdapterError, match="one.safetensors, two.safetensors"):
        find_adapter_file(tmp_path)
    usual = write_adapter(adapter(), tmp_path / "pytorch_lora_weights.safetensors")
    assert find_adapter_file(tmp_path) == usual


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_reading_refuses_a_damaged_file(damage, tmp_path):
    path = write_adapter(adapter(), tmp_path / "a.safetensors")
    data = path.read_bytes()
    changed = {"truncated": data[:-7], "header": struct.pack("<Q", 10**12) + data[8:], "empty": b""}
    path.write_bytes(changed[damage])
    with pytest.raises(AdapterError, match="not a readable safetensors file"):
        read_adapter(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_adapter(adapter(), tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(AdapterError):
        write_adapter(Adapter({}, AdapterMetadata(SD1)), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
