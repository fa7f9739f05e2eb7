"""Several adapters into one: exact sums, best cuts, honest errors, one base."""

import json

import pytest
import torch
from support.pipelines import fresh, images, random_adapter

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair, read_adapter, write_adapter
from t2i_spo_plugin.adapters.merging import METHODS, merge_adapters, relative_error
from t2i_spo_plugin.errors import ConfigError, IncompatibleAdapterError, InvalidAdapterError
from t2i_spo_plugin.pipelines.architecture import base_fingerprint
from t2i_spo_plugin.pipelines.loading import load_spo_lora


WEIGHTS = [0.7, 1.3, 0.25]


def parents(pipe):
    """Three adapters of different rank, alpha and modules; one has convolutions where the model has any."""
    return [
        random_adapter(pipe, rank=4, alpha=2.0, seed=1),
        random_adapter(pipe, rank=3, alpha=7.0, seed=2, layers=("to_q", "to_k", "conv1")),
        random_adapter(pipe, rank=2, alpha=2.0, seed=3, layers=("to_v", "proj_in")),
    ]


def exact_sum(adapters, weights):
    total = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, pair in adapter.modules.items():
            total[name] = total.get(name, 0.0) + weight * pair.delta().double()
    return total


def distance(ours, theirs):
    """The largest relative Frobenius distance of any module."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def deltas(adapter):
    return {name: pair.delta().double() for name, pair in adapter.modules.items()}


def test_concatenation_is_the_weighted_sum(pipe, tmp_path):
    adapters = parents(pipe)
    merged = merge_adapters(adapters, WEIGHTS)
    expected = exact_sum(adapters, WEIGHTS)
    assert distance(deltas(merged.adapter), expected) < 1e-6
    assert merged.error == 0.0 and set(merged.module_errors.values()) == {0.0}
    assert all(pair.alpha == pair.rank for pair in merged.adapter.modules.values())
    assert {pair.rank for pair in merged.adapter.modules.values()} >= {7, 6}
    back = read_adapter(write_adapter(merged.adapter, tmp_path / "a.safetensors"))
    assert distance(deltas(back), expected) < 1e-6
    assert back.metadata == merged.adapter.metadata


def test_a_merged_adapter_generates_what_both_generate_together():
    pipe, other = fresh("sd1"), fresh("sd1")
    first, second = (random_adapter(pipe, seed=seed) for seed in (1, 2))
    load_spo_lora(pipe, first, strength=0.5, adapter_name="first")
    load_spo_lora(pipe, second, strength=0.25, adapter_name="second")
    load_spo_lora(other, merge_adapters([first, second], [0.5, 0.25]).adapter)
    assert torch.allclose(images(pipe), images(other), atol=1e-4)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_merging_one_adapter_alone_changes_nothing(sd1, method):
    adapter = random_adapter(sd1, layers=("to_q", "conv1"))
    merged = merge_adapters([adapter], method=method)
    assert distance(deltas(merged.adapter), deltas(adapter)) < 1e-6 and merged.error < 1e-6


@pytest.mark.parametrize(("method", "rank"), [("concat", None), ("svd", 3)])
def test_the_order_of_the_parents_makes_no_difference(pipe, method, rank):
    adapters = parents(pipe)
    there = merge_adapters(adapters, WEIGHTS, method, rank)
    back = merge_adapters(adapters[::-1], WEIGHTS[::-1], method, rank)
    assert distance(deltas(back.adapter), deltas(there.adapter)) < 1e-6
    assert abs(back.error - there.error) < 1e-6


def test_svd_is_the_best_approximation_and_states_its_error(pipe):
    adapters, rank = parents(pipe), 3
    merged = merge_adapters(adapters, WEIGHTS, "svd", rank)
    lost, whole = 0.0, 0.0
    for name, change in exact_sum(adapters, WEIGHTS).items():
        pair = merged.adapter.modules[name]
        assert pair.rank <= rank and pair.shape == tuple(change.shape)
        left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
        best = ((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(change.shape)
        assert float((pair.delta() - best).norm() / change.norm()) < 1e-5
        error = float((pair.delta() - change).norm() / change.norm())
        assert merged.module_errors[name] == pytest.approx(error, abs=1e-5)
        lost, whole = lost + float((pair.delta() - change).norm() ** 2), whole + float(change.norm() ** 2)
    assert merged.error == pytest.approx((lost / whole) ** 0.5, abs=1e-5) and 0.01 < merged.error < 1.0


def test_svd_at_the_full_rank_is_exact_and_drops_what_is_only_rounding(sd1):
    adapters = parents(sd1)
    merged = merge_adapters(adapters, WEIGHTS, "svd", 99)
    assert distance(deltas(merged.adapter), exact_sum(adapters, WEIGHTS)) < 1e-6 and merged.error < 1e-6
    twice = merge_adapters([adapters[0], adapters[0]], [0.5, 0.5], "svd", 8)
    assert {pair.rank for pair in twice.adapter.modules.values()} == {4}
    assert distance(deltas(twice.adapter), deltas(adapters[0])) < 1e-6


def test_svd_takes_the_largest_rank_of_the_parents_by_default(sd1):
    merged = merge_adapters(parents(sd1), method="svd")
    assert max(pair.rank for pair in merged.adapter.modules.values()) == 4


def test_the_header_of_a_merge_names_the_parents(sd1):
    adapters = [random_adapter(sd1, seed=seed, base_model="tiny", objective=str(seed)) for seed in (1, 2)]
    metadata = merge_adapters(adapters, [1.0, 0.5], names=["knives", "blood"]).adapter.metadata
    assert metadata.base_architecture == "stable-diffusion-v1" and metadata.prediction_type == "epsilon"
    assert json.loads(metadata.extra["merged_from"]) == ["knives", "blood"]
    assert json.loads(metadata.extra["merge_weights"]) == [1.0, 0.5] and metadata.extra["merge_method"] == "concat"
    assert metadata.extra["base_model"] == "tiny" and metadata.extra["base_fingerprint"] == base_fingerprint(sd1)
    assert "objective" not in metadata.extra


def test_an_adapter_of_weight_0_takes_no_part_and_no_room(sd1):
    adapters = parents(sd1)
    merged = merge_adapters(adapters, [1.0, 0.0, 0.0]).adapter
    assert distance(deltas(merged), deltas(adapters[0])) < 1e-6 and merged.rank == 4


def plain(architecture="stable-diffusion-v1", prediction="epsilon", size=6, value=1.0, **extra):
    pair = LoraPair(torch.full((2, size), value), torch.ones(8, 2), 2.0)
    return Adapter({"unet.mid_block.proj": pair}, AdapterMetadata(architecture, prediction, extra=extra))


@pytest.mark.parametrize(
    ("other", "kind", "reason"),
    [
        (
            plain("stable-diffusion-3"),
            IncompatibleAdapterError,
            "different architecture: stable-diffusion-3, stable-diffusion-v1",
        ),
        (plain(prediction="v_prediction"), IncompatibleAdapterError, "different prediction type"),
        (plain(base_fingerprint="1"), IncompatibleAdapterError, "different width or depth"),
        (plain(size=7), IncompatibleAdapterError, r"different models: .* weights of \[8, 6\] and \[8, 7\]"),
        (plain(value=float("nan")), InvalidAdapterError, "NaN"),
    ],
)
def test_adapters_of_different_models_are_refused(other, kind, reason):
    with pytest.raises(kind, match=reason):
        merge_adapters([plain(base_fingerprint="0"), other])


def test_a_merge_takes_metadata_from_the_parent_that_states_them():
    metadata = merge_adapters([plain(architecture="", prediction=""), plain()]).adapter.metadata
    assert (metadata.base_architecture, metadata.prediction_type) == ("stable-diffusion-v1", "epsilon")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": [1.0, -0.1]}, "at least 0, got -0.1"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, float("inf")]}, "finite"),
        ({"weights": [0.0, 0.0]}, "all weights are 0"),
        ({"weights": [1.0]}, "as many weights, got 1"),
        ({"names": ["a"]}, "as many names"),
        ({"method": "sum"}, "no method sum; there are concat, svd, ties"),
        ({"rank": 4}, "concat is exact"),
        ({"method": "svd", "rank": 0}, "at least 1"),
    ],
)
def test_merging_refuses_arguments_out_of_range(options, reason):
    with pytest.raises(ConfigError, match=reason):
        merge_adapters([plain(), plain()], **options)


def test_merging_nothing_is_refused():
    with pytest.raises(ConfigError, match="at least one"):
        merge_adapters([])
    minus = LoraPair(torch.full((2, 6), -1.0), torch.ones(8, 2), 2.0)
    with pytest.raises(InvalidAdapterError, match="all weights are zero"):
        opposite = Adapter({"unet.mid_block.proj": minus}, plain().metadata)
        merge_adapters([plain(), opposite], method="svd")


@pytest.mark.parametrize(("method", "rank"), [("concat", None), ("svd", 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_merged_adapter_counts_the_rounding_to_its_type(sd1, method, rank, dtype, tmp_path):
    adapters = parents(sd1)
    merged = merge_adapters(adapters, WEIGHTS, method, rank, dtype=dtype)
    back = read_adapter(write_adapter(merged.adapter, tmp_path / "a.safetensors"))
    assert {matrix.dtype for pair in back.modules.values() for matrix in (pair.down, pair.up)} == {dtype}
    for name, change in exact_sum(adapters, WEIGHTS).items():
        error = float((back.modules[name].delta() - change).norm() / change.norm())
        assert merged.module_errors[name] == pytest.approx(error, rel=0.05, abs=1e-5) and error > 0.0
    assert merged.error > merge_adapters(adapters, WEIGHTS, method, rank).error
    with pytest.raises(ConfigError, match="got torch.int8"):
        merge_adapters(adapters, WEIGHTS, dtype=torch.int8)


def scaled(down, up, rank=2):
    generator = torch.Generator().manual_seed(rank)
    matrices = torch.randn(rank, 6, generator=generator) * down, torch.randn(8, rank, generator=generator) * up
    return Adapter({"unet.mid_block.proj": LoraPair(*matrices, float(rank))}, plain().metadata)


@pytest.mark.parametrize("down", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("up", [1e-8, 1.0, 1e8])
def test_svd_drops_what_is_only_rounding_at_every_scale_of_the_matrices(down, up):
    adapter = scaled(down, up)
    merged = merge_adapters([adapter, adapter], [0.5, 0.5], "svd", 4).adapter
    assert merged.rank == 2 and distance(deltas(merged), deltas(adapter)) < 1e-5


def test_svd_keeps_a_small_part_of_a_change_that_is_more_than_rounding():
    small = scaled(1.0, 1e-5, rank=1)
    merged = merge_adapters([scaled(1.0, 1.0), small], method="svd", rank=4).adapter
    assert merged.rank == 3


@pytest.mark.parametrize(
    ("squared_error", "squared_norm", "error"), [(0.01, 0.04, 0.5), (9.0, 1.0, 3.0), (0.0, 0.0, 0.0)]
)
def test_a_relative_error_is_the_share_of_the_norm_and_0_of_nothing(squared_error, squared_norm, error):
    assert relative_error(squared_error, squared_norm) == pytest.approx(error)


def test_svd_cuts_to_rank_1():
    assert merge_adapters([scaled(1.0, 1.0)], method="svd", rank=1).adapter.rank == 1


def test_svd_of_parents_that_cancel_out_in_one_module_leaves_rank_1_of_zeros_there():
    plus, minus = (LoraPair(torch.full((2, 6), value), torch.ones(8, 2), 2.0) for value in (1.0, -1.0))
    metadata = plain().metadata
    first = Adapter({"unet.mid_block.proj": plus, "unet.mid_block.other": plus}, metadata)
    second = Adapter({"unet.mid_block.proj": minus, "unet.mid_block.other": plus}, metadata)
    result = merge_adapters([first, second], method="svd")
    pair = result.adapter.modules["unet.mid_block.proj"]
    assert pair.rank == 1 and not pair.delta().any() and result.module_errors["unet.mid_block.proj"] == 0.0


def test_svd_without_a_rank_keeps_the_whole_sum():
    pair = scaled(1.0, 1.0, rank=3).modules["unet.mid_block.proj"]
    whole = METHODS["svd"](pair.down, pair.up, None)
    assert whole.pair.rank == 3 and torch.allclose(whole.pair.delta(), pair.delta(), atol=1e-5)
    assert whole.squared_error == 0.0 and whole.squared_norm == pytest.approx(
        float(pair.delta().norm() ** 2), rel=1e-5
    )


def test_a_merge_of_models_with_different_names_states_none():
    same, other = plain(base_model="tiny"), plain(base_model="small")
    assert merge_adapters([same, same]).adapter.metadata.extra["base_model"] == "tiny"
    for pair in ([same, other], [plain(), plain()]):
        assert not {"base_model", "base_fingerprint"} & merge_adapters(pair).adapter.metadata.extra.keys()


def test_the_names_of_parents_stay_readable_in_the_header():
    extra = merge_adapters([plain(), plain()], names=["Gefühle", "刀"]).adapter.metadata.extra
    assert extra["merged_from"] == '["Gefühle", "刀"]'


def test_a_merge_lists_its_modules_by_name():
    pair = plain().modules["unet.mid_block.proj"]
    adapter = Adapter({f"unet.{name}": pair for name in ("up", "down", "mid")}, plain().metadata)
    assert list(merge_adapters([adapter]).adapter.modules) == ["unet.down", "unet.mid", "unet.up"]


def test_a_merge_carries_no_gradient():
    pair = LoraPair(torch.ones(2, 6, requires_grad=True), torch.ones(8, 2, requires_grad=True), 2.0)
    for method in METHODS:
        merged = merge_adapters([Adapter({"unet.proj": pair}, plain().metadata)], method=method).adapter
        assert not any(matrix.requires_grad for one in merged.modules.values() for matrix in (one.down, one.up))


def test_an_invalid_adapter_is_refused_even_at_weight_0():
    with pytest.raises(InvalidAdapterError, match="NaN"):
        merge_adapters([plain(), plain(value=float("nan"))], [1.0, 0.0])
