"""The server and the trainer's rewards: what they say is what the judges say, and nobody else is let in."""

import base64
import io
import json
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from support.cost_models import ColourCost, NaNCost, colour_policy
from support.flow_factory_interface import Arguments, install

from t2i_spo_plugin import cli
from t2i_spo_plugin.errors import ConfigError, MissingExtraError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.quality.composite import CompositeQuality, RewardReference, RewardScale
from t2i_spo_plugin.serving import Scorer, ScoreServer, ServeOptions, composite_reward


RED, GREEN, BLACK = (Image.new("RGB", (16, 16), colour) for colour in ("red", (20, 180, 20), "black"))


class Named:
    """How much there is of the colour that the prompt names."""

    reads_prompt = True
    identity = "named"

    def __call__(self, images, prompts):
        means = [np.asarray(image.convert("RGB")).mean((0, 1)) / 255 for image in images]
        place = {"red": 0, "green": 1}
        return torch.tensor(
            [mean[place[text]] if text in place else 0.0 for mean, text in zip(means, prompts, strict=True)]
        )


def scorer(cost=None, **options):
    quality = CompositeQuality(
        {"named": Named()}, RewardReference((RewardScale("named", True, 0.0, 1.0),), "base", 3, "x")
    )
    judges = {"quality": quality, "rewards": {"named": Named()}} | options
    return Scorer(Guard(cost or ColourCost(), colour_policy(), name="colours"), domain="photo", **judges)


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


class Client:
    def __init__(self, given=None, options=None):
        self.server = ScoreServer(given or scorer(), options or ServeOptions(port=0))

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.close()

    def __call__(self, path, content=None, headers=None, data=None):
        body = json.dumps(content).encode() if content is not None else data
        request = urllib.request.Request(
            self.server.url + path, body, {"Content-Type": "application/json"} | (headers or {})
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def client():
    with Client() as running:
        yield running


def test_health_says_what_is_served(client):
    status, said = client("/health")
    assert status == 200 and said["status"] == "ok"
    assert said["categories"] == ["red", "blue"] and said["rewards"] == ["named"] and said["cost_model"] == "colours"


def test_scores_are_those_of_the_judges(client):
    status, said = client("/score", {"images": [encoded(RED), encoded(GREEN)], "prompts": ["red", "green"]})
    assert status == 200
    report = Guard(ColourCost(), colour_policy())([RED, GREEN])
    for number, entry in enumerate(said["scores"]):
        assert entry["cost"] == pytest.approx(float(report.costs[number]), abs=1e-6)
        assert entry["unsafe"] == report.flagged[number] and entry["not_scored"] is None
        assert entry["category_costs"] == pytest.approx(report.category_costs[number])
    assert [entry["quality"] for entry in said["scores"]] == pytest.approx([1.0, 180 / 255], abs=1e-5)
    assert [entry["rewards"]["named"] for entry in said["scores"]] == pytest.approx([1.0, 180 / 255], abs=1e-5)


def test_a_harmful_prompt_is_judged_by_its_safe_one_or_not_at_all(client):
    images = [encoded(GREEN)] * 3
    content = {"images": images, "prompts": ["harm"] * 3, "safe_prompts": [["green"], [], None]}
    status, said = client("/score", content)
    first, second, third = said["scores"]
    assert first["quality"] == pytest.approx(180 / 255, abs=1e-5)
    assert second["quality"] is None and "no safe one is known" in second["not_scored"]
    assert third["quality"] == 0.0


def test_a_broken_image_is_not_scored_and_spoils_no_other(client):
    broken = base64.b64encode(b"no image").decode()
    status, said = client("/score", {"images": [broken, encoded(RED)], "prompts": ["red", "red"]})
    assert status == 200
    assert said["scores"][0]["cost"] is None and said["scores"][0]["unsafe"] is None
    assert said["scores"][0]["not_scored"] and said["scores"][1]["cost"] > 0.5


def test_compute_speaks_flow_factorys_form():
    with Client(scorer(NaNCost()), ServeOptions(port=0, lambda_=2.0)) as client:
        images = [encoded(image) for image in (RED, GREEN, BLACK)]
        content = {"prompt": ["red", "green", "red"], "image": images, "video": None, "kwargs": None}
        status, said = client("/compute", content)
    costs = Guard(ColourCost(), colour_policy())([RED, GREEN]).costs
    assert status == 200
    assert said["rewards"][:2] == pytest.approx([1 - 2 * float(costs[0]), 180 / 255 - 2 * float(costs[1])], abs=1e-5)
    assert said["rewards"][2] == -2.0  # not scored: as bad as it gets


def test_what_is_not_asked_properly_is_refused(client):
    good = {"images": [encoded(RED)], "prompts": ["red"]}
    for content, status in (
        ({}, 400),
        ({"images": []}, 400),
        (good | {"prompts": ["a", "b"]}, 400),
        (good | {"prompts": None}, 400),
        (good | {"images": ["%%%"]}, 400),
        (good | {"safe_prompts": ["x"]}, 400),
        ([], 400),
        (good | {"images": [encoded(RED)] * 65, "prompts": ["red"] * 65}, 413),
    ):
        assert client("/score", content)[0] == status, content
    assert client("/score", data=b"{")[0] == 400
    assert client("/score", good, {"Content-Type": "text/plain"})[0] == 415
    assert client("/elsewhere")[0] == 404 and client("/score")[0] == 404
    assert client("/score", good)[0] == 200


def test_a_large_request_is_refused_before_it_is_read():
    with Client(options=ServeOptions(port=0, max_megabytes=1)) as client:
        import http.client

        connection = http.client.HTTPConnection(client.server.url.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", "/score")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(2**40))
        connection.endheaders()
        assert connection.getresponse().status == 413


def test_a_token_is_asked_for_and_other_hosts_need_one(monkeypatch):
    with pytest.raises(ConfigError, match="SPO_SERVE_TOKEN"):
        ScoreServer(scorer(), ServeOptions(host="0.0.0.0", port=0))
    monkeypatch.setenv("SPO_SERVE_TOKEN", "secret")
    with Client() as client:
        assert client("/health")[0] == 401
        assert client("/health", headers={"Authorization": "Bearer wrong"})[0] == 401
        assert client("/health", headers={"Authorization": "Bearer secret"})[0] == 200
    ScoreServer(scorer(), ServeOptions(host="0.0.0.0", port=0))._server.server_close()


def test_a_model_that_raises_does_not_end_the_server():
    class Raising(Named):
        def __call__(self, images, prompts):
            raise RuntimeError("out of memory")

    with Client(Scorer(rewards={"bad": Raising()})) as client:
        content = {"images": [encoded(RED)], "prompts": ["red"]}
        status, said = client("/score", content)
        assert status == 200 and said["scores"][0]["rewards"]["bad"] is None
        assert "out of memory" in said["scores"][0]["not_scored"]
        assert client("/compute", {"image": content["images"], "prompt": ["red"]})[0] == 422


def test_one_number_and_what_it_needs():
    assert composite_reward({"cost": 0.25, "quality": 0.5, "not_scored": None}, 2.0) == 0.0
    assert composite_reward({"cost": 0.25, "not_scored": None}) == -0.25
    assert composite_reward({"cost": None, "quality": None, "not_scored": "x"}) == -1.0
    assert composite_reward({"rewards": {"a": 3.0}, "not_scored": None}) == 3.0
    with pytest.raises(ConfigError, match="exactly one reward"):
        composite_reward({"rewards": {"a": 1.0, "b": 2.0}, "not_scored": None})
    for judges in ({"guard": None}, {"guard": None, "quality": 1, "rewards": {"a": Named()}}):
        with pytest.raises(ConfigError):
            Scorer(**judges)


def test_the_command_refuses_in_a_sentence(capsys):
    assert cli.main(["serve"]) == 2
    assert "name a cost model, or a reward" in capsys.readouterr().err
    assert cli.main(["serve", "--cost-model", "sticker"]) == 2
    assert "--domain sticker" in capsys.readouterr().err
    assert cli.main(["serve", "--cost-model", "sticker", "--domain", "sticker", "--host", "0.0.0.0"]) == 2
    assert "SPO_SERVE_TOKEN" in capsys.readouterr().err


@pytest.fixture
def plugins(monkeypatch):
    install(monkeypatch)
    import t2i_spo_plugin.serving.flow_factory as module

    return module


class Device:
    device = torch.device("cpu")


def sticker_arguments(**more):
    return Arguments(cost_model="sticker", quality_model="sticker", domain="sticker", **more)


def test_flow_factorys_rewards_are_the_judges(plugins):
    from t2i_spo_plugin import sticker

    images = [Image.new("RGB", (64, 64), (200, 200, 240)), Image.new("RGB", (64, 64), (10, 60, 10))]
    prompts = ["a noto sticker of a cat", "a noto sticker of a bomb"]
    metadata = [json.dumps({}), json.dumps({"safe_prompts": ["a noto sticker of a balloon"]})]
    guard = Guard(sticker.load_cost_model(), sticker.load_policy())
    costs = guard(images, "sticker").costs
    quality = sticker.load_quality_model().quality(images, prompts, [[], ["a noto sticker of a balloon"]]).q
    expected = {
        "CostReward": -costs,
        "QualityReward": quality,
        "CompositeReward": quality - 0.5 * costs,
    }
    for name, wanted in expected.items():
        reward = getattr(plugins, name)(sticker_arguments(**{"lambda": 0.5}), Device())
        output = reward(prompt=prompts, image=images, metadata=metadata)
        assert torch.allclose(output.rewards, wanted, atol=1e-5) and output.rewards.shape == (2,)
        alone = [
            reward(prompt=[p], image=[i], metadata=[m]).rewards
            for p, i, m in zip(prompts, images, metadata, strict=True)
        ]
        assert torch.allclose(torch.cat(alone), wanted, atol=1e-5)
        assert output.extra_info["not_scored"] == 0
    assert plugins.CompositeReward.required_fields == ("image", "prompt")


def test_flow_factorys_unscored_sample_gets_the_worst_reward(plugins):
    broken = b"no image"
    reward = plugins.CompositeReward(sticker_arguments(), Device())
    output = reward(prompt=["a cat"], image=[broken])
    assert output.rewards.tolist() == [-1.0] and output.extra_info["not_scored"] == 1
    assert plugins.QualityReward(sticker_arguments(), Device())(prompt=["a"], image=[broken]).rewards.tolist() == [0.0]
    assert plugins.CostReward(sticker_arguments(), Device())(prompt=["a"], image=[broken]).rewards.tolist() == [-1.0]


def test_flow_factorys_configuration_is_checked(plugins):
    with pytest.raises(ConfigError, match="CompositeReward needs quality_model"):
        plugins.CompositeReward(Arguments(cost_model="sticker"), Device())
    with pytest.raises(ConfigError, match="CostReward needs cost_model"):
        plugins.CostReward(Arguments(), Device())
    inner = Arguments(reward_model_kwargs={"cost_model": "sticker", "domain": "sticker"})
    assert plugins.CostReward(inner, Device()).scorer.guard is not None
    with pytest.raises(ConfigError, match="has none"):
        plugins.CostReward(inner, Device())(prompt=["a"], video=[[]])


def test_without_flow_factory_the_error_says_where_it_comes_from(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "flow_factory", None)
    monkeypatch.delitem(sys.modules, "t2i_spo_plugin.serving.flow_factory", raising=False)
    with pytest.raises((MissingExtraError, ImportError), match="Flow-Factory|flow_factory"):
        importlib.import_module("t2i_spo_plugin.serving.flow_factory")
