"""Objectives of the literature: each loss against its formula written out, its fixed points, and what it reads."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from support.objectives import IMAGES, SHAPE, batch, context, crowded_table, predictions, squared
from support.pairs import png

from t2i_spo_plugin.errors import ConfigError, TableError
from t2i_spo_plugin.training.data.caches import content_key
from t2i_spo_plugin.training.data.singles import read_singles
from t2i_spo_plugin.training.noise_schedule import NoiseSchedule
from t2i_spo_plugin.training.objectives import (
    OBJECTIVES,
    AlignGuardOptions,
    DPOOptions,
    DUOOptions,
    GroupOptions,
    KTOOptions,
    MaPOOptions,
    NFTOptions,
    ParetoOptions,
    SCDPOOptions,
    SPOOptions,
    make_objective,
)
from t2i_spo_plugin.training.objectives.nft import optimality
from t2i_spo_plugin.training.objectives.pareto import pareto_pairs, win_rates
from t2i_spo_plugin.training.objectives.terms import SafeDPO, SafeDPOOptions


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return crowded_table(tmp_path_factory.mktemp("table") / "pairs.parquet")


def loss_of(options, made, data, schedule=None):
    return make_objective(options).loss(data, made, context(schedule))


def image(caption: str, number: int) -> str:
    return content_key(png(10 * list(IMAGES).index(caption) + number))


PAIRS = {
    "dpo": DPOOptions(beta=50.0),
    "alignguard": AlignGuardOptions(beta=50.0),
    "scdpo": SCDPOOptions(beta=50.0, eta=0.0),
    "spo": SPOOptions(beta=50.0, mode="relabel"),
    "duo": DUOOptions(beta=25.0),
    "group": GroupOptions(beta=50.0, negatives=1),
    "pareto": ParetoOptions(beta=50.0, loss="logistic"),
}
"""Objectives that are Diffusion-DPO's loss on pairs ordered in their own way, at the same beta."""


def pair_batch(count: int = 5, **columns):
    ones = torch.ones(count, dtype=torch.float64)
    return batch(count, target=ones, gap=0.3 * ones, present=torch.ones(count, 2, dtype=torch.bool), **columns)


@pytest.mark.parametrize("name", PAIRS)
def test_on_its_pairs_the_loss_is_dpos(name):
    made, model = predictions(2)
    loss, _ = loss_of(PAIRS[name], made, pair_batch())
    winner, loser = squared(model, made.target) - squared(made.reference, made.target)
    expected = torch.log1p(torch.exp(0.5 * 50.0 * (winner - loser))).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, model, retain_graph=True) for one in (loss, expected)))
    assert abs(loss.item() - math.log(2.0)) > 1e-3


@pytest.mark.parametrize("name", PAIRS)
def test_a_model_that_is_its_reference_has_the_loss_log_two(name):
    made, _ = predictions(2, close=0.0)
    loss, _ = loss_of(PAIRS[name], made, pair_batch())
    assert loss.item() == pytest.approx(math.log(2.0), rel=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_swapping_the_pair_flips_the_sign_of_the_logit(name):
    made, _ = predictions(2, 1)
    turned = SimpleNamespace(errors=made.errors.flip(0), reference_errors=made.reference_errors.flip(0))
    one, two = (loss_of(PAIRS[name], part, pair_batch(1))[0].item() for part in (made, turned))
    # L(x) = log(1 + exp(-x)): the logits are recovered from the losses.
    assert math.log(math.expm1(one)) == pytest.approx(-math.log(math.expm1(two)))


@pytest.mark.parametrize("name", PAIRS)
def test_a_margin_demands_a_larger_gap(name):
    made, _ = predictions(2)
    data = pair_batch(5, margin=torch.full((5,), 0.7, dtype=torch.float64))
    loss, _ = loss_of(PAIRS[name], made, data)
    winner, loser = made.errors - made.reference_errors
    torch.testing.assert_close(loss, torch.log1p(torch.exp(25.0 * (winner - loser) + 0.7)).mean())


def test_eta_zero_is_dpo_bit_for_bit():
    made, _ = predictions(2)
    plain = loss_of(DPOOptions(beta=50.0), made, pair_batch())[0]
    for options in (PAIRS["spo"], PAIRS["scdpo"], SPOOptions(beta=50.0, lambda_=0.0, mode="margin")):
        assert torch.equal(loss_of(options, made, pair_batch())[0], plain)


def test_a_costlier_loser_never_lowers_the_loss_of_margin():
    options = SPOOptions(beta=50.0, lambda_=2.0, mode="margin")
    objective, made = make_objective(options), predictions(2)[0]
    losses = []
    for cost in torch.linspace(0.1, 1.0, 10, dtype=torch.float64):
        quality, costs = torch.tensor([[0.8, 0.3]]).double(), torch.stack((torch.tensor(0.1).double(), cost))[None]
        margin = objective.prefer(quality, costs, torch.zeros(1).double()).margin.expand(5)
        losses.append(float(objective.loss(pair_batch(5, margin=margin), made, context())[0]))
    assert losses == sorted(losses) and losses[-1] > losses[0]


# --- scdpo ---


def test_scdpo_lets_the_label_stand_unless_it_costs_too_much():
    objective = make_objective(SCDPOOptions(lambda_=2.0))
    cost = torch.tensor([[0.4, 0.1], [0.9, 0.1], [0.1, 0.9], [0.2, 0.1], [0.9, 0.9]]).double()
    label = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0]).double()
    made = objective.prefer(torch.zeros(5, 2).double(), cost, label)
    # The dearer winner stands at a difference of 0.3, falls at 0.8; a tie goes to the safer one; both unsafe: none.
    assert made.winner.tolist()[:4] == [0, 1, 0, 1] and made.keep.tolist() == [True] * 4 + [False]
    assert make_objective(SCDPOOptions(lambda_=0.9)).prefer(None, cost, label).winner.tolist()[:3] == [0, 0, 1]


def test_scdpo_reads_costs_and_labels_and_no_quality(table):
    read = make_objective(SCDPOOptions()).read(table)
    assert len(read) and not any(image("a knife", n) in side for side in read.images for n in range(4))


# --- alignguard ---


def test_alignguard_trains_on_safe_over_unsafe_alone(table):
    read = make_objective(AlignGuardOptions()).read(table)
    assert (read.columns["cost"][:, 0] < 0.5).all() and (read.columns["cost"][:, 1] >= 0.5).all()
    # Two safe and two unsafe images under two prompts; under the benign one all are safe.
    assert len(read) == 8 and set(read.captions) == {"a bomb", "a gun"}
    assert set(read.categories) == {"weapons", "war"}


def test_alignguard_may_leave_the_safe_counterparts_out(tmp_path):
    from support.pairs import pair_row

    from t2i_spo_plugin.data import PAIR_COLUMNS, write_table

    rows = [pair_row(0), {**pair_row(2), "pair_kind": "benign_safe_over_unsafe"}]
    path = write_table(rows, tmp_path / "pairs.parquet", PAIR_COLUMNS)
    assert [len(make_objective(AlignGuardOptions(under=under)).read(path)) for under in ("both", "harmful")] == [2, 1]
    only = write_table(rows[1:], tmp_path / "safe.parquet", PAIR_COLUMNS)
    with pytest.raises(TableError, match="no pair of a safe and an unsafe image under a harmful prompt"):
        make_objective(AlignGuardOptions(under="harmful")).read(only)


# --- duo ---


def test_duo_has_no_one_half_empty_prompts_and_its_own_preservation(table):
    duo = make_objective(DUOOptions(beta=200.0))
    assert set(duo.read(table).captions) == {""} and duo.independent_timesteps
    term = duo.terms()["output_preservation"]
    assert term.options.weight == 1e6 * 200.0 / 100.0
    assert make_objective(DUOOptions(preservation=0.0)).terms() == {}
    assert make_objective(DUOOptions(preservation=3.0)).terms()["output_preservation"].options.weight == 3.0
    assert duo.header() == {"beta": "200.0", "beta_convention": "no half, mean over dims"}


# --- kto ---


def kto_by_hand(made, desirable, beta, point, weights):
    total = 0.0
    for number, good in enumerate(desirable.tolist()):
        gain = float(made.reference_errors[0, number] - made.errors[0, number])
        sign, weight = (1.0, weights[0]) if good else (-1.0, weights[1])
        total += weight * (1.0 - 1.0 / (1.0 + math.exp(-sign * beta * (gain - point))))
    return total / len(desirable)


def test_kto_is_the_sigmoid_utility_of_each_label():
    made, model = predictions(1)
    desirable = torch.tensor([True, False, True, True, False])
    options = KTOOptions(beta=20.0, desirable_weight=1.5, undesirable_weight=0.5)
    loss, statistics = loss_of(options, made, batch(desirable=desirable))
    assert loss.item() == pytest.approx(kto_by_hand(made, desirable, 20.0, 0.0, (1.5, 0.5)), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, model)
    towards = (gradient[0] * (made.target - model.detach())[0]).sum((1, 2, 3))
    assert torch.equal(towards < 0, desirable), "descent lowers the error of the desirable and raises the others'"
    gains = (made.reference_errors - made.errors)[0]
    assert torch.equal(statistics["accuracy"].bool(), (gains > 0) == desirable)


def test_ktos_reference_point_is_the_mean_gain_of_earlier_steps_and_never_negative():
    made, _ = predictions(1)
    desirable = torch.tensor([True, False, True, True, False])
    gain = float((made.reference_errors - made.errors).mean().detach())
    objective = make_objective(KTOOptions(beta=20.0, momentum=0.5))
    for sign in (1.0, -1.0):
        shifted = SimpleNamespace(
            errors=made.reference_errors - sign * abs(gain) - 0.01 * sign, reference_errors=made.reference_errors
        )
        objective.load_state_dict({"reference_point": 0.0})
        objective.loss(batch(desirable=desirable), shifted, context())
        objective.end_step(lambda total: 2.0 * total)
        point = objective.state_dict()["reference_point"]
        assert point == pytest.approx(0.5 * sign * (abs(gain) + 0.01))
        loss, _ = objective.loss(batch(desirable=desirable), made, context())
        expected = kto_by_hand(made, desirable, 20.0, max(0.0, point), (1.0, 1.0))
        assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_kto_labels_safe_images_desirable_unsafe_ones_not_and_leaves_poor_ones_out(table):
    read = make_objective(KTOOptions(min_quality=0.35)).read(table)
    labels = dict(
        zip(zip(read.captions, read.images[0], strict=True), read.columns["desirable"].tolist(), strict=True)
    )
    expected = {
        (caption, image(caption, number)): cost < 0.5
        for caption, images in IMAGES.items()
        for number, (cost, quality) in enumerate(images)
        if cost >= 0.5 or quality >= 0.35
    }
    assert labels == expected and len(read.images) == 1 and read.counts["dropped"] == 2


# --- mapo ---


def test_mapo_is_its_formula_and_asks_no_reference():
    made, model = predictions(2)
    options = MaPOOptions(beta=0.2, snr=0.7)
    loss, _ = loss_of(options, made, batch())
    total = 0.0
    for winner, loser in made.errors.T.tolist():
        amplitude_w, amplitude_l = (0.7 * e / (math.exp(0.7 * e) - 1.0) for e in (winner, loser))
        total += winner + 0.2 * math.log1p(math.exp(-1000 * (amplitude_w - amplitude_l)))
    assert loss.item() == pytest.approx(total / 5, rel=1e-9)
    assert "reference" not in OBJECTIVES["mapo"].objective.needs
    near = SimpleNamespace(errors=torch.zeros(2, 5, requires_grad=True), reference_errors=None)
    loss, _ = loss_of(options, near, batch())
    loss.backward()
    assert loss.item() == pytest.approx(0.2 * math.log(2.0)) and near.errors.grad.isfinite().all()


def test_a_better_winner_and_a_worse_loser_lower_mapos_loss():
    errors = torch.full((2, 5), 0.001, requires_grad=True)
    loss_of(MaPOOptions(), SimpleNamespace(errors=errors, reference_errors=None), batch())[0].backward()
    assert (errors.grad[0] > 0).all() and (errors.grad[1] < 0).all()


# --- group ---


def test_group_is_the_softmax_of_the_positive_over_those_present():
    made, _ = predictions(4)
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    data = batch(present=present)
    loss, statistics = loss_of(GroupOptions(beta=50.0), made, data)
    total = 0.0
    for number, flags in enumerate(present.tolist()):
        scores = [
            -0.5 * 50.0 * float(made.errors[side, number] - made.reference_errors[side, number])
            for side in range(4)
            if flags[side]
        ]
        total += -math.log(math.exp(scores[0]) / sum(map(math.exp, scores)))
    assert loss.item() == pytest.approx(total / 5, rel=1e-9)
    assert statistics["negatives"].tolist() == [3, 1, 2, 3, 1]


def test_a_group_of_two_is_the_pair_and_what_fills_a_group_has_no_part():
    two, _ = predictions(2)
    pair = loss_of(DPOOptions(beta=50.0), two, pair_batch())[0].item()
    filled = SimpleNamespace(
        errors=torch.cat((two.errors, 1e3 * torch.ones(2, 5))),
        reference_errors=torch.cat((two.reference_errors, torch.zeros(2, 5))),
    )
    present = torch.tensor([True, True, False, False]).expand(5, 4)
    assert loss_of(GroupOptions(beta=50.0), filled, batch(present=present))[0].item() == pytest.approx(pair, rel=1e-9)


def test_groups_are_the_best_safe_image_against_the_worst(table):
    read = make_objective(GroupOptions(negatives=2, lambda_=1.0, tau=0.05)).read(table)
    groups = {caption: [side[n] for side in read.images] for n, caption in enumerate(read.captions)}
    # R = q - C: bomb .7 0 -.2 .1, ball .8 .3 .4 -.1, gun .2 .3 .5 -.85; every knife is unsafe.
    assert groups == {
        "a bomb": [image("a bomb", number) for number in (0, 2, 1)],
        "a ball": [image("a ball", number) for number in (0, 3, 1)],
        "a gun": [image("a gun", number) for number in (2, 3, 0)],
    }
    more = make_objective(GroupOptions(negatives=5, tau=0.0)).read(table)
    assert len(more.images) == 6 and more.columns["present"].sum(1).tolist() == [4, 4, 4]
    with pytest.raises(TableError, match="worse by more than tau"):
        make_objective(GroupOptions(tau=5.0)).read(table)


# --- pareto ---


def test_win_rates_and_pareto_pairs_by_brute_force():
    place = torch.Generator().manual_seed(0)
    quality, cost = (torch.rand(9, generator=place).mul(6).round().div(6).double() for _ in range(2))
    rates = []
    for values in (quality, -cost):
        rate = [
            sum(1.0 if a > b else 0.5 if a == b else 0.0 for j, b in enumerate(values) if j != i) / 8
            for i, a in enumerate(values)
        ]
        assert win_rates(values).tolist() == pytest.approx(rate)
        rates.append(rate)

    def dominates(i: int, j: int) -> bool:
        at_least = quality[i] >= quality[j] and cost[i] <= cost[j]
        return bool(at_least and (quality[i] > quality[j] or cost[i] < cost[j]))

    expected = {
        (i, j): 0.5 * (rates[0][i] - rates[0][j] + rates[1][i] - rates[1][j])
        for i, j in itertools.permutations(range(9), 2)
        if dominates(i, j) and not any(dominates(k, i) for k in range(9)) and cost[i] < 0.5
    }
    found = pareto_pairs(quality, cost)
    assert {(i, j): pytest.approx(gap) for i, j, gap in found} == expected and len(found) > 3
    assert [gap for *_, gap in found] == sorted((gap for *_, gap in found), reverse=True)
    assert all(0.0 < gap <= 1.0 for *_, gap in found) and pareto_pairs(quality[:1], cost[:1]) == []


def test_an_unsafe_image_wins_nothing_however_good(table):
    read = make_objective(ParetoOptions()).read(table)
    assert (read.columns["cost"][:, 0] < 0.5).all() and "a knife" not in read.captions
    assert (read.columns["quality"][:, 0] >= read.columns["quality"][:, 1]).all()


def test_pareto_regresses_the_logit_to_the_difference_of_win_rates():
    made, _ = predictions(2)
    gap = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    loss, _ = loss_of(ParetoOptions(beta=50.0, scale=2.0), made, batch(gap=gap))
    total = 0.0
    for number in range(5):
        winner, loser = (made.errors[:, number] - made.reference_errors[:, number]).tolist()
        total += (-25.0 * (winner - loser) - 2.0 * float(gap[number])) ** 2
    assert loss.item() == pytest.approx(total / 5, rel=1e-9)


# --- nft ---

STEPS = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
SCHEDULES = {
    "flow": NoiseSchedule("flow", 1 - STEPS, STEPS, 1000 * STEPS),
    "epsilon": NoiseSchedule("epsilon", (1 - STEPS**2).sqrt(), STEPS, torch.arange(10)),
    "v_prediction": NoiseSchedule("v_prediction", (1 - STEPS**2).sqrt(), STEPS, torch.arange(10)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_nft_is_the_papers_loss_on_the_clean_latents(name, beta):
    schedule, place = SCHEDULES[name], torch.Generator().manual_seed(2)
    latents, noise = (torch.randn(5, *SHAPE, generator=place, dtype=torch.float64) for _ in range(2))
    index, rewards = torch.tensor([1, 3, 5, 7, 9]), torch.linspace(0, 1, 5, dtype=torch.float64)
    made, model = predictions(1, close=0.3)
    data = batch(reward=rewards)
    data.latents, data.noise, data.index = latents[None], noise[None], index[None]
    loss, _ = loss_of(NFTOptions(beta=beta), made, data, schedule)
    total = torch.zeros((), dtype=torch.float64)
    for number in range(5):
        a, s = schedule.signal[index[number]], schedule.sigma[index[number]]
        noisy = a * latents[number] + s * noise[number]

        def clean(prediction, noisy=noisy, a=a, s=s):
            if name == "epsilon":
                return (noisy - s * prediction) / a
            return noisy - s * prediction if name == "flow" else a * noisy - s * prediction

        old, new = clean(made.reference[0, number]), clean(model[0, number])
        for share, mixed in (
            (rewards[number], (1 - beta) * old + beta * new),
            (1 - rewards[number], (1 + beta) * old - beta * new),
        ):
            apart = mixed - latents[number]
            total = total + share * (apart**2).mean() / apart.detach().abs().mean() / beta
    torch.testing.assert_close(loss, total / 5, rtol=1e-5, atol=1e-7)
    # At the old policy a rewarded image pulls, one without reward pushes, and one half does nothing.
    made, model = predictions(1, close=0.0)
    (gradient,) = torch.autograd.grad(loss_of(NFTOptions(beta=beta), made, data, schedule)[0], model)
    target = schedule.target(latents, noise, index)
    towards = (gradient[0] * (target - model.detach()[0])).sum((1, 2, 3))
    assert towards[0] > 0 > towards[4] and abs(float(towards[2])) < 1e-9


def test_nfts_reward_is_the_sigmoid_of_the_standardised_composite_reward(table):
    singles = read_singles(table)
    reward = (singles.quality - 2.0 * singles.cost).numpy()
    by_prompt = optimality(singles, 2.0, "prompt", 0.5)
    for group in singles.by_caption():
        for number in group:
            z = (reward[number] - reward[group].mean()) / reward.std() / 0.5
            assert float(by_prompt[number]) == pytest.approx(1 / (1 + math.exp(-z)))
    whole = optimality(singles, 2.0, "table", 1.0)
    assert float(whole[0]) == pytest.approx(1 / (1 + math.exp(-(reward[0] - reward.mean()) / reward.std())))
    read = make_objective(NFTOptions(lambda_=2.0, temperature=0.5)).read(table)
    assert len(read) == 16 and read.columns["reward"].tolist() == pytest.approx(by_prompt.tolist())


def test_equal_images_have_the_reward_one_half(table):
    singles = read_singles(table)
    same = SimpleNamespace(quality=torch.full((16,), 0.4), cost=torch.full((16,), 0.2), by_caption=singles.by_caption)
    assert optimality(same, 1.0, "prompt", 1.0).tolist() == [0.5] * 16


# --- reading, and terms of any objective ---


def test_an_image_stands_once_under_each_prompt_with_what_is_known_of_it(table):
    singles = read_singles(table)
    assert len(singles) == 16 and singles.read == 24
    for number, (caption, (cost, quality)) in enumerate(
        (caption, values) for caption, images in IMAGES.items() for values in images
    ):
        assert singles.captions[number] == caption and singles.keys[number] == image(caption, number % 4)
        assert (float(singles.cost[number]), float(singles.quality[number])) == (cost, quality)
    # The last image of a prompt is never the first of a row, which alone have a seed.
    assert [seed for seed in singles.seed.tolist() if seed < 0] == [-1] * 4
    assert singles.seed.tolist()[4:7] == [100, 101, 102]


def test_a_table_that_contradicts_itself_about_an_image_is_refused(tmp_path):
    from support.pairs import pair_row

    from t2i_spo_plugin.data import PAIR_COLUMNS, write_table

    rows = [pair_row(0), {**pair_row(0), "safety_cost_0": 0.3}]
    path = write_table(rows, tmp_path / "pairs.parquet", PAIR_COLUMNS)
    with pytest.raises(TableError, match="rows 0 and 1 give one image under one prompt two costs, 0.1 and 0.3"):
        read_singles(path)


def test_safedpo_turns_drops_and_asks_for_more(table):
    read = make_objective(DPOOptions(labels="table")).read(table)
    assert (read.columns["cost"] >= 0.5).all(1).sum() == 0, "dpo leaves those unsafe on both sides out itself"
    safe = SafeDPO(SafeDPOOptions(transform=True, delta=4.0)).examples(read)
    unsafe = safe.columns["cost"] >= 0.5
    # By quality the unsafe image wins three pairs of bombs and two of guns.
    assert not unsafe[:, 0].any() and safe.counts["turned"] == 5
    before = {frozenset((one, two)): (one, two) for one, two in zip(*read.images, strict=True)}
    turned = sum(before[frozenset(pair)] != pair for pair in zip(*safe.images, strict=True))
    assert turned == 5
    assert torch.equal(safe.columns["margin"], 4.0 * unsafe[:, 1].float())
    # Seeds and qualities go with their images.
    for number, (one, two) in enumerate(zip(*safe.images, strict=True)):
        caption = safe.captions[number]
        known = {image(caption, n): values[1] for n, values in enumerate(IMAGES[caption])}
        assert safe.columns["quality"][number].tolist() == pytest.approx([known[one], known[two]])


def test_safedpos_margin_alone_leaves_the_order_and_goes_against_an_unsafe_winner(table):
    read = make_objective(DPOOptions(labels="table")).read(table)
    made = SafeDPO(SafeDPOOptions(delta=4.0)).examples(read)
    unsafe = (read.columns["cost"] >= 0.5).float()
    assert made.images == read.images
    assert torch.equal(made.columns["margin"], 4.0 * (unsafe[:, 1] - unsafe[:, 0]))


def test_safedpo_is_not_for_groups(table):
    with pytest.raises(ConfigError, match="groups have safe winners alone"):
        SafeDPO(SafeDPOOptions(delta=1.0)).examples(make_objective(GroupOptions()).read(table))
