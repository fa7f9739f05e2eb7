"""DPO, SPO and SFT alone: who wins, what the loss is, and what options allow."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest
import torch
from support.pairs import pair_row, pair_table, png
from support.toy_family import SHAPE, ToyFamily, toy_batches, toy_predictor
from torch.nn.functional import logsigmoid

from t2i_spo_plugin.data import PAIR_COLUMNS, write_table
from t2i_spo_plugin.errors import ConfigError, TableError
from t2i_spo_plugin.training.data.caches import content_key
from t2i_spo_plugin.training.objectives import make_objective
from t2i_spo_plugin.training.objectives.augmentations import augmented
from t2i_spo_plugin.training.objectives.base import Predictions
from t2i_spo_plugin.training.objectives.dpo import DPO, DPOOptions
from t2i_spo_plugin.training.objectives.preference import PAIR_STATISTICS
from t2i_spo_plugin.training.objectives.sft import SFT, SFTOptions
from t2i_spo_plugin.training.objectives.spo import SPO, SPOOptions


class Step:
    """What a step offers an objective: batches and evaluations of the toy denoiser."""

    def __init__(self, folder):
        family = ToyFamily()
        self.batches, self.predictor = toy_batches(folder, family), toy_predictor(family)

    def evaluate(self, batch):
        return self.predictor.evaluate(batch)


@pytest.fixture
def step(tmp_path):
    return Step(tmp_path)


@pytest.fixture
def batch(step):
    return step.batches.at(0, range(4))


@pytest.fixture
def predictions(step, batch):
    return step.predictor.train(batch)[0]


def logit_of(predictions: Predictions, beta: float):
    winner, loser = predictions.errors
    ref_w, ref_l = predictions.reference_errors
    return -0.5 * beta * ((winner - loser) - (ref_w - ref_l))


@pytest.mark.parametrize(
    ("options", "name", "low"),
    [
        (DPOOptions, "beta", 0.0),
        (SPOOptions, "beta", 0.0),
        (SPOOptions, "tau_soft", 0.0),
        (SPOOptions, "lambda_", -1e-9),
        (SPOOptions, "tau", -1e-9),
        (SPOOptions, "eta", -1e-9),
        (SPOOptions, "focusing_momentum", -1e-9),
        (SPOOptions, "focusing_momentum", 1.0),
        (DPOOptions, "labels", "cost"),
        (DPOOptions, "safe_pairs", "keep"),
        (SPOOptions, "mode", "sum"),
        (SPOOptions, "focusing", "hard"),
        (SPOOptions, "augmentations", ("flip", "blur")),
        (SPOOptions, "reduction", "min"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, name, low):
    with pytest.raises(ConfigError, match=name.strip("_")):
        options(**{name: low})


def test_options_at_the_ends_of_their_range_are_taken():
    zero = SPOOptions(beta=1e-9, lambda_=0.0, tau=0.0, tau_soft=1e-9, eta=0.0, focusing_momentum=0.0)
    assert zero.focusing_momentum == 0.0 and DPOOptions(beta=1e-9).beta == 1e-9


def test_the_defaults_are_the_documented_ones():
    assert DPOOptions() == DPOOptions(beta=5000.0, labels="safety", safe_pairs="drop")
    assert SPOOptions() == SPOOptions(
        beta=5000.0,
        lambda_=1.0,
        mode="relabel+margin",
        tau=0.0,
        tau_soft=0.1,
        eta=0.0,
        focusing="additive",
        augmentations=(),
        reduction="mean",
        focusing_momentum=0.9,
    )


@pytest.fixture
def table(tmp_path):
    """Writes a table with these values of each row beside those of `pair_row`, and gives its path."""

    def write(*rows):
        content = [pair_row(number) | row for number, row in enumerate(rows)]
        return write_table(content, tmp_path / "table.parquet", PAIR_COLUMNS)

    return write


def winners(examples):
    """By number of row, which of its two images wins."""
    first = {content_key(png(2 * number)): 0 for number in range(10)}
    return {row: first.get(key, 1) for row, key in zip(examples.rows, examples.images[0], strict=True)}


def costs(first, second):
    return {"safety_cost_0": first, "safety_cost_1": second}


def test_dpo_takes_the_tables_labels_where_they_are_asked_for(table):
    labels = (1.0, 0.0, 0.5, 1.0, 0.48, 0.52)
    rows = [{"label_0": label, "label_1": 1.0 - label} | costs(0.1, 0.9) for label in labels]
    rows[3] |= costs(0.6, 0.5)
    examples = DPO(DPOOptions(labels="table")).read(table(*rows))
    assert winners(examples) == {0: 0, 1: 1, 4: 1, 5: 0}, "ties and pairs unsafe on both sides are left out"
    assert not examples.columns["margin"].any() and torch.equal(examples.columns["target"], torch.ones(4))


@pytest.mark.parametrize(
    ("safe_pairs", "expected"), [("drop", {0: 0}), ("cost", {0: 0, 1: 1}), ("quality", {0: 0, 1: 0})]
)
def test_dpo_puts_safe_over_unsafe_and_orders_safe_pairs_as_asked(safe_pairs, expected, table):
    path = table(
        costs(0.1, 0.9) | {"quality_0": 0.1, "quality_1": 0.9}, costs(0.3, 0.1) | {"quality_0": 0.9, "quality_1": 0.1}
    )
    assert winners(DPO(DPOOptions(safe_pairs=safe_pairs)).read(path)) == expected


def test_only_the_tables_labels_can_do_without_costs(tmp_path):
    table = pq.read_table(pair_table(tmp_path / "pairs.parquet", 4))
    path = tmp_path / "bare.parquet"
    pq.write_table(table.drop_columns(["safety_cost_0", "safety_cost_1", "quality_0", "quality_1"]), path)
    assert len(DPO(DPOOptions(labels="table")).read(path)) == 4
    for objective in (DPO(DPOOptions()), SPO(SPOOptions())):
        with pytest.raises(TableError, match="lacks safety_cost_0"):
            objective.read(path)


def test_the_dpo_loss_is_the_mean_preference_loss_at_its_beta(step, batch, predictions):
    loss, statistics = DPO(DPOOptions(beta=3.0)).loss(batch, predictions, step)
    margin = batch.columns["margin"]
    assert margin.any()
    torch.testing.assert_close(loss, -logsigmoid(logit_of(predictions, 3.0) - margin).mean())
    assert tuple(statistics) == PAIR_STATISTICS


def test_sft_is_the_mean_error_over_all_images(step, batch, predictions):
    loss, statistics = SFT(SFTOptions()).loss(batch, predictions, step)
    torch.testing.assert_close(loss, ((predictions.model - predictions.target) ** 2).mean())
    assert statistics == {}


@pytest.mark.parametrize("mode", ["relabel", "margin", "soft"])
def test_spo_without_focusing_is_the_loss_of_its_mode_with_the_margins_and_targets_of_the_batch(
    mode, step, batch, predictions
):
    loss, statistics = SPO(SPOOptions(beta=3.0, mode=mode)).loss(batch, predictions, step)
    logit, margin, target = logit_of(predictions, 3.0), batch.columns["margin"], batch.columns["target"]
    each = {
        "relabel": -logsigmoid(logit - margin),
        "margin": -logsigmoid(logit - margin),
        "soft": -(target * logsigmoid(logit) + (1.0 - target) * logsigmoid(-logit)),
    }[mode]
    torch.testing.assert_close(loss, each.mean())
    assert tuple(statistics) == (*PAIR_STATISTICS, "difficulty", "weight") == SPO.logged
    assert torch.equal(statistics["weight"], torch.ones(4))
    torch.testing.assert_close(statistics["difficulty"], torch.sigmoid(-logit.detach()))


@pytest.mark.parametrize(("reduction", "over"), [("mean", torch.mean), ("max", torch.amax)])
def test_spo_weighs_each_pair_by_its_difficulty_over_its_augmentations(reduction, over, step, batch, predictions):
    options = SPOOptions(
        beta=3.0, mode="relabel", eta=2.0, augmentations=("flip", "noise"), reduction=reduction, focusing_momentum=0.5
    )
    objective = SPO(options)
    loss, statistics = objective.loss(batch, predictions, step)
    logits = [logit_of(predictions, 3.0)]
    for name in options.augmentations:
        logits.append(logit_of(step.evaluate(augmented(name, batch, step.batches)), 3.0))
    raw = 1.0 + 2.0 * over(torch.sigmoid(-torch.stack(logits).detach()), 0)
    margin = batch.columns["margin"]
    torch.testing.assert_close(statistics["weight"], raw / 2.0)
    torch.testing.assert_close(loss, (raw / 2.0 * -logsigmoid(logits[0] - margin)).mean())
    torch.testing.assert_close(statistics["difficulty"], torch.sigmoid(-logits[0].detach()))

    objective.end_step(lambda total: 2 * total)  # two ranks with the same pairs
    assert objective.state_dict()["focusing_mean"] == pytest.approx(0.5 * 2.0 + 0.5 * float(raw.mean()))
    resumed = SPO(options)
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(resumed.loss(batch, predictions, step)[0], objective.loss(batch, predictions, step)[0])


def test_spo_without_focusing_asks_no_other_rank_and_evaluates_nothing(step, batch, predictions):
    objective = SPO(SPOOptions(augmentations=("flip",)))
    asked = step.predictor.passes.forward
    objective.loss(batch, predictions, step)

    def fail(total):
        raise AssertionError("there is nothing to sum")

    objective.end_step(fail)
    assert step.predictor.passes.forward == asked


def test_spo_orders_pairs_by_the_reward_of_its_options():
    quality = torch.tensor([[0.9, 0.5], [0.52, 0.5]], dtype=torch.float64)
    cost = torch.tensor([[0.8, 0.1], [0.1, 0.1]], dtype=torch.float64)
    label = torch.tensor([0.0, 0.0])
    made = SPO(SPOOptions(lambda_=0.5, mode="relabel", tau=0.03)).prefer(quality, cost, label)
    assert (made.winner[0].item(), made.keep.tolist()) == (0, [True, False])
    assert SPO(SPOOptions(lambda_=0.7)).prefer(quality, cost, label).winner[0].item() == 1
    soft = SPO(SPOOptions(lambda_=0.5, mode="soft", tau_soft=0.2)).prefer(quality, cost, label)
    torch.testing.assert_close(soft.target, torch.sigmoid(torch.tensor([0.05, 0.02], dtype=torch.float64) / 0.2))


def test_the_header_states_what_the_adapter_was_trained_with():
    convention = "one half, mean over dims"
    assert DPO(DPOOptions(beta=20.0)).header() == {"beta": "20.0", "beta_convention": convention}
    assert SPO(SPOOptions(beta=20.0, lambda_=2.0, mode="soft", eta=0.5)).header() == {
        "beta": "20.0",
        "beta_convention": convention,
        "lambda": "2.0",
        "reward_mode": "soft",
        "eta": "0.5",
    }


def test_sft_reads_captioned_images_and_leaves_bad_ones_out_only_when_it_may(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.png").write_bytes(png(1))
    objective = SFT(SFTOptions())
    with pytest.raises(TableError, match="has no caption"):
        objective.read(tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        assert objective.read(tmp_path, skip_bad_rows=True).captions == ["one"]


@pytest.mark.parametrize("options", [DPOOptions(beta=2.0), SPOOptions(beta=2.0), SFTOptions()])
def test_an_objective_has_the_options_that_it_was_made_with(options):
    assert make_objective(options).options is options


def test_what_an_objective_needs_and_its_shapes(predictions):
    assert DPO.needs == SPO.needs == {"pairs", "reference"} and SFT.needs == {"images"}
    assert predictions.model.shape == (2, 4, *SHAPE)
