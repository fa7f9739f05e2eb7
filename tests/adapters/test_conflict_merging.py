"""Merging where adapters contradict each other: against PEFT's functions, written out by hand, and by properties."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from support.pipelines import fresh, random_adapter

from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, LoraPair
from t2i_spo_plugin.adapters.comerge import Activity, norms, select_elements, winners
from t2i_spo_plugin.adapters.merging import CONFLICT_METHODS, MERGE_METHODS, MergeOptions, merge_adapters
from t2i_spo_plugin.adapters.task_vectors import dare, dare_ties, drop_mask, magnitude, ties
from t2i_spo_plugin.errors import ConfigError, IncompatibleAdapterError


WEIGHTS = [1.0, 0.5, 0.8]
UNITS = ("row", "rank", "element", "factor")


def pair(seed: int, rank: int = 3, out: int = 6, into: int = 5) -> LoraPair:
    place = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, into, generator=place), torch.randn(out, rank, generator=place), 2.0)


def experts(count: int = 3, **shape: int) -> list[Adapter]:
    metadata = AdapterMetadata("stable-diffusion-v1", "epsilon", "expert")
    return [
        Adapter({"unet.a": pair(seed, **shape), "unet.b": pair(10 + seed, **shape)}, metadata) for seed in range(count)
    ]


def changes(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {name: one.delta() for name, one in adapter.modules.items()}


def merged(adapters, method, weights=None, rank=None, **options):
    return changes(merge_adapters(adapters, weights, method, rank, options=MergeOptions(**options)).adapter)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.3, 0.7])
@pytest.mark.parametrize("name", ["ties", "magnitude", "dare", "dare-ties"])
def test_methods_over_values_are_pefts(name, density, monkeypatch):
    from peft.utils import merge_utils

    deltas = torch.stack([pair(seed).delta() for seed in range(3)])
    weights = torch.tensor(WEIGHTS)
    masks = [drop_mask(delta, density, seed=4) for delta in deltas]
    drawn = iter(masks)
    monkeypatch.setattr(torch, "bernoulli", lambda *args, **kwargs: next(drawn))
    theirs = {
        "ties": merge_utils.ties,
        "magnitude": merge_utils.magnitude_prune,
        "dare": merge_utils.dare_linear,
        "dare-ties": merge_utils.dare_ties,
    }[name](list(deltas), weights, density)
    if name in ("ties", "magnitude"):
        ours = {"ties": ties, "magnitude": magnitude}[name](deltas, weights, density)
    else:
        ours = {"dare": dare, "dare-ties": dare_ties}[name](deltas, weights, masks, density)
    torch.testing.assert_close(ours, theirs)
    monkeypatch.undo()
    through = merged(experts(), name, WEIGHTS, density=density, seed=4)["unet.a"]
    torch.testing.assert_close(through, theirs, rtol=1e-4, atol=1e-5)


def test_the_exact_sum_is_what_pefts_cat_gives():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraModel

    base = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 6, bias=False), "b": torch.nn.Linear(5, 6, bias=False)})
    parents = experts()
    model = LoraModel(base, {"e0": LoraConfig(r=3, lora_alpha=2, target_modules=["a", "b"])}, "e0")
    for number in (1, 2):
        inject_adapter_in_model(LoraConfig(r=3, lora_alpha=2, target_modules=["a", "b"]), model.model, f"e{number}")
        model.peft_config[f"e{number}"] = LoraConfig(r=3, lora_alpha=2, target_modules=["a", "b"])
    for number, parent in enumerate(parents):
        for name in "ab":
            layer = model.model[name]
            layer.lora_A[f"e{number}"].weight.data = parent.modules[f"unet.{name}"].down.clone()
            layer.lora_B[f"e{number}"].weight.data = parent.modules[f"unet.{name}"].up.clone()
    model.add_weighted_adapter([f"e{number}" for number in range(3)], WEIGHTS, "sum", combination_type="cat")
    ours = merged(parents, "concat", WEIGHTS)
    for name in "ab":
        torch.testing.assert_close(ours[f"unet.{name}"], model.model[name].get_delta_weight("sum"))


def variants() -> list[tuple[str, dict]]:
    plain = [(method, {}) for method in MERGE_METHODS if method != "comerge"]
    return plain + [
        ("comerge", {"unit": unit, "score": score}) for unit in UNITS for score in ("frequency", "magnitude")
    ]


@pytest.mark.parametrize(("method", "options"), variants(), ids=str)
def test_one_expert_is_itself(method, options):
    (alone,) = experts(1)
    close(merged([alone], method, **options), changes(alone))
    close(merged([alone], method, [0.5], **options), {name: 0.5 * one for name, one in changes(alone).items()})
    # Beside one of weight 0, too.
    close(merged(experts(2), method, [1.0, 0.0], **options), changes(alone))


@pytest.mark.parametrize(("method", "options"), variants(), ids=str)
def test_the_order_of_experts_plays_no_part(method, options):
    parents, expected = experts(), merged(experts(), method, WEIGHTS, **options)
    for order in itertools.permutations(range(3)):
        got = merged([parents[n] for n in order], method, [WEIGHTS[n] for n in order], **options)
        close(got, expected)


@pytest.mark.parametrize(
    ("method", "options"), [one for one in variants() if one[1].get("unit") in (None, "row", "element")], ids=str
)
def test_changes_do_not_depend_on_how_factors_are_written(method, options):
    """Any invertible matrix between the two factors leaves the change as it is, and so the result."""
    parents = experts()
    turned = []
    for number, parent in enumerate(parents):
        turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(number)))[0] * 2.0
        modules = {
            name: LoraPair(turn @ one.down, one.up @ torch.linalg.inv(turn), one.alpha)
            for name, one in parent.modules.items()
        }
        turned.append(Adapter(modules, parent.metadata))
    if method in ("dare", "dare-ties"):
        # What is dropped follows the change itself, whose last bits the turn changes: the same values, drawn alike.
        options = {**options, "density": 1.0}
    close(merged(turned, method, WEIGHTS, **options), merged(parents, method, WEIGHTS, **options))


@pytest.mark.parametrize(("method", "options"), variants(), ids=str)
def test_a_rank_is_kept_to_and_the_error_says_what_it_costs(method, options):
    if method == "concat":
        return
    whole = merge_adapters(experts(), method=method, rank=9, options=MergeOptions(**options))
    cut = merge_adapters(experts(), method=method, rank=2, options=MergeOptions(**options))
    assert {one.rank for one in cut.adapter.modules.values()} == {2} and whole.error < 1e-5
    apart, size = 0.0, 0.0
    for name, full in changes(whole.adapter).items():
        apart += float((full - cut.adapter.modules[name].delta()).square().sum())
        size += float(full.square().sum())
    assert cut.error == pytest.approx((apart / size) ** 0.5, rel=1e-3)


def test_what_only_one_expert_has_is_left_as_it_is():
    parents = experts(2)
    more = Adapter({**parents[0].modules, "unet.c": pair(99)}, parents[0].metadata)
    for method in CONFLICT_METHODS:
        torch.testing.assert_close(merged([more, parents[1]], method)["unet.c"], pair(99).delta())


# --- Co-Merge ---


def test_each_row_comes_from_the_expert_whose_row_is_largest():
    parents = experts()
    got = merged(parents, "comerge", unit="row", score="magnitude")["unet.a"]
    deltas = torch.stack([one.modules["unet.a"].delta() for one in parents])
    expected = torch.stack([deltas[deltas[:, row].norm(dim=1).argmax(), row] for row in range(6)])
    torch.testing.assert_close(got, expected)
    assert len({int(deltas[:, row].norm(dim=1).argmax()) for row in range(6)}) > 1


def test_each_value_is_the_largest_in_magnitude():
    parents = experts()
    got = merged(parents, "comerge", unit="element")["unet.a"]
    deltas = torch.stack([one.modules["unet.a"].delta() for one in parents])
    expected = torch.tensor([[max(deltas[:, i, j].tolist(), key=abs) for j in range(5)] for i in range(6)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    opposite = torch.tensor([[2.0, -1.0], [-2.0, -3.0]])
    assert select_elements(opposite).tolist() == select_elements(opposite.flip(0)).tolist() == [2.0, -3.0]


def test_ranks_and_factors_compete_by_components():
    parents = experts()
    pairs = [one.modules["unet.a"] for one in parents]
    size = torch.stack([one.scale * one.down.norm(dim=1) * one.up.norm(dim=0) for one in pairs])
    best = size.argmax(0).tolist()
    down = torch.stack([pairs[k].down[r] for r, k in enumerate(best)])
    up = torch.stack([pairs[k].up[:, r] * pairs[k].scale for r, k in enumerate(best)], 1)
    result = merge_adapters(parents, method="comerge", options=MergeOptions(unit="rank", score="magnitude"))
    torch.testing.assert_close(result.adapter.modules["unet.a"].delta(), up @ down)
    assert result.adapter.rank == 3 and result.error == 0.0
    rows = torch.stack([one.delta().norm(dim=1) for one in pairs]).argmax(0).tolist()
    mixed = torch.stack([pairs[k].up[i] * pairs[k].scale for i, k in enumerate(rows)])
    factor = merged(parents, "comerge", unit="factor", score="magnitude")["unet.a"]
    torch.testing.assert_close(factor, mixed @ down)
    assert float((factor - merged(parents, "comerge", unit="row", score="magnitude")["unet.a"]).norm()) > 0.1
    with pytest.raises(IncompatibleAdapterError, match="ranks 2 and 3 have no components in common"):
        merged([experts(1)[0], experts(1, rank=2)[0]], "comerge", unit="rank")


def test_activities_decide_before_norms_and_frequency_before_size():
    parents = experts(2)
    wins, sizes = torch.tensor([[3.0] * 6, [1.0] * 6]), torch.tensor([[1.0] * 6, [9.0] * 6])
    wins[0, 0], wins[1, 0] = 2.0, 2.0
    active = Activity(wins, sizes, wins[:, :3], sizes[:, :3])
    deltas = [one.modules["unet.a"].delta() for one in parents]
    for score, expected in (
        ("frequency", torch.cat((deltas[1][:1], deltas[0][1:]))),  # a tie goes by size
        ("magnitude", deltas[1]),
    ):
        result = merge_adapters(
            parents, method="comerge", options=MergeOptions(score=score), activities={"unet.a": active}
        )
        torch.testing.assert_close(result.adapter.modules["unet.a"].delta(), expected)
    assert winners(wins, sizes, "frequency").tolist() == [1, 0, 0, 0, 0, 0]


def test_activities_stand_in_the_order_of_all_adapters_whoever_has_the_module():
    parents = experts(3)
    without = Adapter({"unet.b": parents[0].modules["unet.b"]}, parents[0].metadata)
    wins = torch.tensor([[9.0] * 6, [0.0] * 6, [5.0] * 6])
    active = Activity(wins, wins, wins[:, :3], wins[:, :3])
    result = merge_adapters([without, *parents[1:]], method="comerge", activities={"unet.a": active})
    torch.testing.assert_close(result.adapter.modules["unet.a"].delta(), parents[2].modules["unet.a"].delta())


def test_norms_without_data_are_those_of_rows_and_components():
    pairs = [pair(0), pair(1)]
    active = norms(pairs)
    torch.testing.assert_close(active.row_sizes, torch.stack([one.delta().norm(dim=1) for one in pairs]))
    assert active.row_wins.sum() == 6 and active.rank_wins.sum() == 3


# --- options, and whole adapters ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\]"),
        ({"density": 1.5}, "density"),
        ({"unit": "column"}, "unit must be one of row, rank, element, factor"),
        ({"score": "mean"}, "score must be one of"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MergeOptions(**options)


def test_what_is_dropped_follows_the_seed_and_the_change():
    one, two = pair(0).delta(), pair(1).delta()
    assert torch.equal(drop_mask(one, 0.5, 0), drop_mask(one.clone(), 0.5, 0))
    assert not torch.equal(drop_mask(one, 0.5, 0), drop_mask(one, 0.5, 1))
    assert not torch.equal(drop_mask(one, 0.5, 0), drop_mask(two, 0.5, 0))
    big = torch.randn(200, 200)
    assert float(drop_mask(big, 0.3, 0).mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(drop_mask(one, 1.0, 0), torch.ones_like(one))


@pytest.mark.parametrize("method", CONFLICT_METHODS)
def test_whole_adapters_of_a_unet_merge_and_say_how(method):
    pipe = fresh("sd1")
    parents = [random_adapter(pipe, seed=seed, layers=("to_q", "conv1"), components=("unet",)) for seed in range(2)]
    result = merge_adapters(parents, method=method)
    extra = result.adapter.metadata.extra
    assert extra["merge_method"] == method and ("merge_unit" in extra) == (method == "comerge")
    assert ("merge_density" in extra) == (method != "comerge")
    assert any(one.down.ndim == 4 for one in result.adapter.modules.values())
    assert {name: one.shape for name, one in result.adapter.modules.items()} == {
        name: one.shape for name, one in parents[0].modules.items()
    }
    assert copy.deepcopy(result.adapter).validate()
