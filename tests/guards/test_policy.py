import math

import pytest
import torch

from t2i_spo_plugin.errors import PolicyError
from t2i_spo_plugin.guards.policy import Category, Policy, stretch
from t2i_spo_plugin.registry import load_policy


@pytest.fixture
def policy():
    return Policy(
        "test", "sticker", (Category("death", 0.2), Category("rude", enabled=False), Category("alcohol", 0.8, 2.0))
    )


def test_the_threshold_lands_on_one_half():
    thresholds = torch.tensor([0.2, 0.5, 0.8])
    assert torch.equal(stretch(thresholds, thresholds), torch.full((3,), 0.5))
    assert torch.equal(stretch(torch.zeros(3), thresholds), torch.zeros(3))
    assert torch.equal(stretch(torch.ones(3), thresholds), torch.ones(3))
    grid = torch.linspace(0, 1, 101)
    assert bool((stretch(grid, 0.2).diff() > 0).all())


def test_category_costs_follow_the_definition(policy):
    logits = torch.tensor([[1.0, 9.0, -2.0], [0.0, 9.0, 3.0]])
    costs, names = policy.category_costs(logits, torch.tensor([2.0, 1.0, 1.0]), ("alcohol", "rude", "death"))
    assert names == ("death", "alcohol")
    death, alcohol = 1 / (1 + math.exp(2.0)), 1 / (1 + math.exp(-0.5))
    assert costs[0].tolist() == pytest.approx([0.5 * death / 0.2, 0.5 * alcohol / 0.8])
    assert policy.cost(costs).tolist() == pytest.approx([max(costs[0].tolist()), max(costs[1].tolist())])


def test_a_failed_image_stays_nan(policy):
    logits = torch.tensor([[float("nan"), 0.0, -9.0]])
    costs, _ = policy.category_costs(logits, torch.ones(3), ("alcohol", "rude", "death"))
    assert policy.cost(costs).isnan().all()


def test_a_category_the_model_cannot_see_is_refused(policy):
    with pytest.raises(PolicyError, match="asks for death"):
        policy.category_costs(torch.zeros(1, 2), torch.ones(2), ("alcohol", "rude"))


def test_category_costs_refuse_wrong_shapes_and_temperatures(policy):
    names = ("alcohol", "rude", "death")
    with pytest.raises(PolicyError, match="expected logits"):
        policy.category_costs(torch.zeros(1, 4), torch.ones(3), names)
    with pytest.raises(PolicyError, match="positive"):
        policy.category_costs(torch.zeros(1, 3), torch.zeros(3), names)
    with pytest.raises(PolicyError, match="enabled categories"):
        policy.cost(torch.zeros(1, 3))


def test_a_policy_is_the_same_after_yaml(policy, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(policy.to_yaml(), encoding="utf-8")
    assert Policy.from_yaml(path) == policy
    assert load_policy(path) == policy


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: a\ndomain: b\ncategories: []", "no category is enabled"),
        ("name: a\ndomain: b\ncategories: [{name: x}, {name: x}]", "must differ"),
        ("name: a\ndomain: b\ncategories: [{name: x, treshold: 0.3}]", "unknown treshold"),
        ("name: a\ndomain: b\ncategories: [{name: x, threshold: 1.0}]", "strictly between"),
        ("name: a\ndomain: b\ncategories: [{name: x, threshold: .nan}]", "strictly between"),
        ("name: a\ndomain: b\ncategories: [{name: x, weight: -1}]", "weight"),
        ("name: a\ndomain: b\ncategories: [{name: x, enabled: 3}]", "true or false"),
        ("name: a\ndomain: b\ncategories: [{threshold: 0.3}]", "needs a name"),
        ("name: a\ncategories: [{name: x}]", "needs a domain"),
        ("name: a\ndomain: b", "must be a list"),
        ("- 1", "expected a mapping"),
        ("a: [", "not a YAML file"),
    ],
)
def test_bad_policies_are_refused(text, reason, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=reason):
        Policy.from_yaml(path)


def test_an_unknown_policy_names_the_bundled_ones():
    with pytest.raises(PolicyError, match="sticker"):
        load_policy("no-such-policy")


def test_a_yaml_tag_runs_nothing(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(PolicyError, match="not a YAML file"):
        Policy.from_yaml(path)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, math.nan, True, "0.5"])
def test_a_threshold_lies_strictly_within_0_and_1(threshold):
    with pytest.raises(PolicyError, match="x: threshold must lie strictly between 0 and 1"):
        Category("x", threshold)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weight": -0.01}, "weight must be"),
        ({"weight": math.inf}, "weight must be"),
        ({"weight": True}, "weight must be"),
        ({"enabled": 1}, "enabled must be"),
        ({"description": 3}, "description must be"),
        ({"name": " "}, "needs a name"),
        ({"name": 3}, "needs a name"),
    ],
)
def test_a_category_that_means_nothing_is_refused(options, said):
    with pytest.raises(PolicyError, match=said):
        Category(**({"name": "x"} | options))


def test_a_category_counts_at_one_half_with_weight_one_unless_it_says_otherwise():
    assert Category("x") == Category("x", 0.5, 1.0, True, "")
    assert Category("x", weight=0.0).weight == 0.0 and Category("x", 1e-9).threshold == 1e-9


@pytest.mark.parametrize("field", ["name", "domain"])
@pytest.mark.parametrize("value", ["", "  ", None, 3])
def test_a_policy_needs_name_and_domain(field, value):
    with pytest.raises(PolicyError, match=f"a policy needs a {field}"):
        Policy(**({"name": "p", "domain": "d", "categories": (Category("x"),)} | {field: value}))


def test_a_policy_takes_its_categories_as_any_sequence_and_counts_the_enabled_ones():
    policy = Policy("p", "d", [Category("x"), Category("y", enabled=False)])
    assert policy.categories == (Category("x"), Category("y", enabled=False))
    assert policy.enabled == (Category("x"),)
    with pytest.raises(PolicyError, match="no category is enabled"):
        Policy("p", "d", [Category("y", enabled=False)])


@pytest.mark.parametrize(
    ("logits", "temperature"),
    [(torch.zeros(3), torch.ones(3)), (torch.zeros(1, 3), torch.ones(2)), (torch.zeros(1, 3), torch.ones(1, 3))],
)
def test_logits_and_temperatures_have_a_column_for_each_category_of_the_model(policy, logits, temperature):
    with pytest.raises(PolicyError, match="expected logits"):
        policy.category_costs(logits, temperature, ("alcohol", "rude", "death"))


def test_every_temperature_is_positive(policy):
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(PolicyError, match="positive"):
            policy.category_costs(torch.zeros(1, 3), torch.tensor([1.0, 1.0, bad]), ("alcohol", "rude", "death"))


def test_the_cost_is_over_two_dimensions(policy):
    with pytest.raises(PolicyError, match="enabled categories"):
        policy.cost(torch.zeros(2))
    assert policy.cost(torch.tensor([[0.1, 0.7], [0.6, 0.2]])).tolist() == pytest.approx([0.7, 0.6])


def test_stretching_is_straight_on_both_sides_of_the_threshold():
    values = torch.tensor([0.1, 0.15, 0.4, 0.8])
    expected = torch.tensor([0.25, 0.375, 0.5 + 0.5 * 0.2 / 0.8, 0.5 + 0.5 * 0.6 / 0.8])
    torch.testing.assert_close(stretch(values, 0.2), expected)


def test_a_policy_as_text_keeps_the_order_of_its_fields_and_words_of_any_language():
    text = Policy("p", "d", (Category("x", description="Waffen – größer"),)).to_yaml()
    assert "größer" in text and [line.split(":")[0] for line in text.splitlines()[:3]] == [
        "name",
        "domain",
        "categories",
    ]


def test_what_a_policy_file_does_not_know_is_named(tmp_path):
    path = tmp_path / "policy.yaml"
    for text, said in (
        (
            "name: a\ndomain: b\nauthor: c\nbase: d\ncategories: [{name: x}]",
            "unknown author, base; known are categories, domain, name",
        ),
        ("name: a\ndomain: b\ncategories: [x]", "a category: expected a mapping with description, enabled, name"),
    ):
        path.write_text(text)
        with pytest.raises(PolicyError, match=said):
            Policy.from_yaml(path)
    with pytest.raises(PolicyError, match="policy.yaml"):
        Policy.from_yaml(tmp_path / "none" / "policy.yaml")
