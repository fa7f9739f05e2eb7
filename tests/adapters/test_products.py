"""LoHa and LoKr files, whose change is a product of factors, as low-rank adapters."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from t2i_spo_plugin.adapters import approximate_products, read_adapter
from t2i_spo_plugin.cli import main
from t2i_spo_plugin.errors import AdapterError, ConfigError, InvalidAdapterError, UnsupportedAdapterError


NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
RANK = 4


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(24, 32), nn.Conv2d(8, 16, 3)


CONFIGS = {
    "loha": LoHaConfig(r=RANK, alpha=2, init_weights=False, target_modules=["linear", "conv"]),
    "loha, effective convolution": LoHaConfig(
        r=RANK, alpha=2, init_weights=False, target_modules=["linear", "conv"], use_effective_conv2d=True
    ),
    "lokr": LoKrConfig(r=1, alpha=2, init_weights=False, target_modules=["linear", "conv"]),
    "lokr, both decomposed": LoKrConfig(
        r=1, alpha=2, init_weights=False, target_modules=["linear", "conv"], decompose_both=True
    ),
    "lokr, effective convolution": LoKrConfig(
        r=1, alpha=2, init_weights=False, target_modules=["linear", "conv"], use_effective_conv2d=True
    ),
}


def as_file(config, path):
    """A file with PEFT's own factors under kohya's names, and the changes that PEFT makes of them."""
    torch.manual_seed(0)
    model = get_peft_model(Layers(), config).base_model.model
    tensors, changes = {}, {}
    for layer, name in ((model.linear, NAME), (model.conv, CONV)):
        changes[name] = layer.get_delta_weight("default").detach()
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
        for part, matrix in layer.named_parameters():
            if part.endswith(".default"):
                tensors[f"{name}.{part.removesuffix('.default')}"] = matrix.detach().clone()
    save_file(tensors, path, {"modelspec.architecture": "stable-diffusion-v1/lora"})
    return changes


@pytest.fixture
def file(tmp_path):
    return tmp_path / "product.safetensors"


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_change_at_full_rank_is_that_of_peft(kind, file):
    changes = as_file(CONFIGS[kind], file)
    result = approximate_products(file, 100)
    conv, linear = (result.adapter.modules[name] for name in sorted(result.adapter.modules, reverse=True))
    assert result.error < 1e-5 and linear.rank <= 24
    assert torch.allclose(linear.delta(), changes[NAME], atol=1e-5)
    assert conv.shape == (16, 8, 3, 3) and torch.allclose(conv.delta(), changes[CONV], atol=1e-5)


def test_alpha_is_not_applied_where_both_factors_are_whole(file):
    # So LyCORIS trains and ComfyUI reads: such a file's alpha is the rank that was asked for, which it does not state.
    first, second = torch.randn(4, 4), torch.randn(8, 6)
    save_file({f"{NAME}.lokr_w1": first, f"{NAME}.lokr_w2": second, f"{NAME}.alpha": torch.tensor(2.0)}, file)
    (pair,) = approximate_products(file, 24).adapter.modules.values()
    assert torch.allclose(pair.delta(), torch.kron(first, second), atol=1e-4)


def test_a_lower_rank_is_the_nearest_and_its_error_is_stated(file):
    change = as_file(CONFIGS["loha"], file)[NAME]
    result = approximate_products(file, 3)
    (linear,) = (pair for name, pair in result.adapter.modules.items() if name.endswith("to_q"))
    values = torch.linalg.svdvals(change)
    expected = float(values[3:].norm() / values.norm())
    assert linear.rank == 3 and expected > 0.01
    assert result.module_errors[NAME] == pytest.approx(expected, rel=1e-3)
    assert float((linear.delta() - change).norm() / change.norm()) == pytest.approx(expected, rel=1e-3)


def test_the_command_that_loading_names_writes_an_adapter_and_prints_the_error(file, tmp_path, capsys):
    as_file(CONFIGS["lokr"], file)
    with pytest.raises(UnsupportedAdapterError, match=r"LoKr weights.*`spo convert FILE .*--rank RANK`"):
        read_adapter(file)
    out = tmp_path / "lora.safetensors"
    assert main(["convert", str(file), "--layout", "kohya", "--out", str(out), "--rank", "5"]) == 0
    assert "relative error" in capsys.readouterr().out
    assert {pair.rank for pair in read_adapter(out).modules.values()} == {5}


@pytest.mark.parametrize(
    "config",
    [
        LoHaConfig(r=RANK, alpha=2, alpha_pattern={"attn1.to_k": 3}, rank_pattern={"attn2.to_q": 2}),
        LoKrConfig(r=2, alpha=3, alpha_pattern={"attn1.to_k": 1}, decompose_both=True),
        LoKrConfig(r=RANK, alpha=2),
    ],
    ids=["loha", "lokr, decomposed", "lokr, whole factors"],
)
def test_a_peft_folder_becomes_the_change_that_peft_makes_of_it(config, sd1, tmp_path, capsys):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.target_modules, config.init_weights = ["to_q", "to_k"], False
    model = get_peft_model(sd1.unet, config)
    model.save_pretrained(tmp_path / "folder")
    with pytest.raises(UnsupportedAdapterError, match="`spo convert FILE .*--rank RANK`"):
        read_adapter(tmp_path / "folder")
    out = tmp_path / "lora.safetensors"
    options = ["--layout", "kohya", "--architecture", "stable-diffusion-v1", "--rank", "64"]
    assert main(["convert", str(tmp_path / "folder"), "--out", str(out), *options]) == 0
    assert "relative error" in capsys.readouterr().out
    modules = read_adapter(out).modules
    layers = {path: layer for path, layer in sd1.unet.named_modules() if hasattr(layer, "get_delta_weight")}
    assert layers and {name.removeprefix("unet.").replace(".", "_") for name in modules} == {
        path.replace(".", "_") for path in layers
    }
    by_name = {name.removeprefix("unet.").replace(".", "_"): pair for name, pair in modules.items()}
    for path, layer in layers.items():
        change = layer.get_delta_weight("default").detach()
        assert torch.allclose(by_name[path.replace(".", "_")].delta(), change, atol=1e-5)


def test_a_peft_configuration_without_a_rank_is_refused(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.down_blocks.0.to_q.lokr_w{n}": torch.ones(2, 2) for n in (1, 2)}, path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOKR", "alpha": 4, "r": 0}')
    with pytest.raises(InvalidAdapterError, match=r"alpha 4 and r 0 .* above 0"):
        approximate_products(path, 4)


def test_factors_that_do_not_fit_are_refused_and_so_is_what_is_no_product(file):
    save_file({f"{NAME}.lokr_w1": torch.ones(2, 2)}, file)
    with pytest.raises(InvalidAdapterError, match="do not fit"):
        approximate_products(file, 4)
    save_file({f"{NAME}.lokr_w1": torch.ones(2, 2), f"{NAME}.dora_scale": torch.ones(1)}, file)
    with pytest.raises(AdapterError, match="no factor"):
        approximate_products(file, 4)
    with pytest.raises(ConfigError, match="at least 1"):
        approximate_products(file, 0)
