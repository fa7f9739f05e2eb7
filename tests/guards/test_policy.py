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
