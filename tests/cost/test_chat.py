"""Vision-language models as cost models: a local server that answers by redness, and a tiny random LLaVA."""

import json
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from support.chat_server import ChatServer, redness, words_of
from support.photographs import HARMLESS
from support.vlm import tiny_llava

from t2i_spo_plugin import CostModel, cli, load_cost_model, load_policy
from t2i_spo_plugin.cost.chat import JudgeOptions, templates
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.registry import COST_MODELS, load_guard, name_with_revision


RED, GREEN = Image.new("RGB", (24, 16), (250, 10, 10)), Image.new("RGB", (24, 16), (10, 250, 10))
KEY = "sk-very-secret-0123456789"


def judge(server, tmp_path=None, **options):
    if not options:
        return load_cost_model(f"endpoint:{server.url}")
    file = tmp_path / f"judge{len(list(tmp_path.iterdir()))}.yaml"
    file.write_text(json.dumps({"kind": "endpoint", "source": server.url, "wait": 0.0, **options}))
    return load_cost_model(file)


def odds_of(image):
    return 8.0 * (np.asarray(image)[..., 0].mean() / 255 - 0.5)


def test_the_logit_is_the_servers_log_odds_of_yes_per_category():
    def odds(body):
        return 8.0 * (redness(body) - 0.5) + (3.0 if "sexual:" in words_of(body) else 0.0)

    with ChatServer(odds=odds) as server:
        model = judge(server)
        batch = model([RED, GREEN])
    assert isinstance(model, CostModel)
    assert model.categories == tuple(category.name for category in load_policy("photo-harms").categories)
    expected = torch.tensor(
        [[odds_of(one) + (3.0 if name == "sexual" else 0.0) for name in model.categories] for one in (RED, GREEN)]
    )
    assert torch.allclose(batch.logits, expected.float(), atol=1e-4)
    assert batch.logit_map is None
    assert batch.reasons == ("sexual: It is red.", "")
    asked = [words_of(body) for body in server.bodies if body.get("logprobs")]
    assert len(asked) == 2 * 7 and all(body["model"] == "tiny" for body in server.bodies)
    assert sum("Making, selling or taking illegal drugs" in text for text in asked) == 2


def test_answers_depend_neither_on_the_batch_nor_on_the_order():
    images = list(HARMLESS.values())
    with ChatServer() as server:
        model = judge(server)
        together = model(images).logits
        assert torch.equal(model(images[::-1]).logits.flip(0), together)
        assert torch.equal(torch.cat([model(image).logits for image in images]), together)


def test_the_guards_policy_decides_what_is_asked(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ndomain: photo\ncategories:\n"
        "- {name: red, description: Mostly red.}\n- {name: blue, enabled: false, description: Blue.}\n"
    )
    with ChatServer() as server:
        report = load_guard(f"endpoint:{server.url}", tmp_path / "mine.yaml")([RED, GREEN], "photo")
    assert report.flagged == [True, False] and set(report.category_costs[0]) == {"red"}
    assert all("Blue" not in words_of(body) for body in server.bodies)
    assert report.explanation(0) == "red: It is red." and not report.has_map(0)


def test_without_log_probabilities_a_verdict_in_json_counts(tmp_path):
    def words(body):
        value = 0.9 if redness(body) > 0.5 else False
        return (
            f'Sure. {{"violations": {{"red": {json.dumps(value)}, "loud": "no"}}, "reason": "a red {{thing}}"}} Done.'
        )

    with ChatServer(words=words, odds=None) as server:
        model = judge(server, tmp_path, policies={"red": "Mostly red.", "Loud": "Loud."})
        batch = model([RED, GREEN])
    assert torch.allclose(batch.logits.sigmoid(), torch.tensor([[0.9, 0.05], [0.05, 0.05]]), atol=1e-6)
    assert batch.reasons == ("a red {thing}", "a red {thing}")
    assert sum("violations" in words_of(body) for body in server.bodies) == 2


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("I cannot judge that.", "gave no verdict"),
        ('{"violations": {"red": 0.5}}', "says nothing of loud"),
        ('{"violations": {"red": 5, "loud": 0}}', "says nothing of red"),
        ('{"violations": [1]}', "gave no verdict"),
        ("{" * 5000, "gave no verdict"),
    ],
)
def test_what_is_no_verdict_is_not_scored(tmp_path, said, reason):
    with ChatServer(words=lambda body: said, odds=None) as server:
        model = judge(server, tmp_path, policies={"red": "Red.", "loud": "Loud."})
        batch = model([RED])
    assert batch.logits.isnan().all() and reason in batch.reasons[0]


def test_one_image_that_fails_spoils_no_other(tmp_path):
    def before(number, body):
        return (400, {}, '{"error": "no such image"}') if redness(body) < 0.5 else None

    with ChatServer(before=before) as server:
        report = load_guard(f"endpoint:{server.url}", "photo-harms")([RED, GREEN, RED], "photo")
    assert report.flagged == [True, None, True]
    assert "400" in report.reasons[1] and "no such image" in report.reasons[1]


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(tmp_path):
    busy = {0: (503, {}, "busy"), 1: (429, {"Retry-After": "0"}, "slow down")}
    with ChatServer(before=lambda number, body: busy.get(number)) as server:
        batch = judge(server, tmp_path, policies={"red": "Red."}, reasons=False)([GREEN])
        assert len(server.bodies) == 3 and batch.logits.isfinite().all()
    with ChatServer(before=lambda number, body: (401, {}, "who are you?")) as server:
        batch = judge(server, tmp_path, policies={"red": "Red."})([GREEN])
        assert len(server.bodies) == 1 and "401" in batch.reasons[0]
    with ChatServer(before=lambda number, body: (503, {}, "busy")) as server:
        batch = judge(server, tmp_path, policies={"red": "Red."}, retries=2)([GREEN])
        assert len(server.bodies) == 3 and "503" in batch.reasons[0]


def test_requests_go_at_the_same_time_and_answers_keep_their_order(tmp_path):
    meeting = threading.Barrier(2, timeout=20)

    def before(number, body):
        meeting.wait()  # a request that went alone would wait in vain
        return None

    with ChatServer(before=before) as server:
        model = judge(server, tmp_path, template="json", policies={"red": "Red."}, concurrency=2)
        server.words = lambda body: json.dumps({"violations": {"red": round(redness(body), 2)}})
        batch = model([RED, GREEN, GREEN, RED])
    found = batch.logits.sigmoid()[:, 0].tolist()
    assert found == pytest.approx([0.98, 0.04, 0.04, 0.98], abs=0.01)


def test_the_budget_bounds_the_requests_and_the_cache_saves_them(tmp_path):
    options = {"policies": {"red": "Red."}, "reasons": False, "concurrency": 1, "cache": str(tmp_path / "cache")}
    with ChatServer() as server:
        # The list of models counts too.
        first = judge(server, tmp_path, budget=3, **options)([RED, GREEN, HARMLESS["table"]])
        assert len(server.bodies) == 2
        assert first.logits[:2].isfinite().all() and "budget of 3 requests is spent" in first.reasons[2]
        again = judge(server, tmp_path, budget=2, **options)([RED, GREEN, HARMLESS["table"]])
        assert len(server.bodies) == 3
    assert torch.equal(again.logits[:2], first.logits[:2]) and again.logits.isfinite().all()


def test_the_key_is_sent_and_stands_nowhere_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPO_ENDPOINT_KEY", KEY)
    RED.save(tmp_path / "a.png")
    with ChatServer(before=lambda number, body: (400, {}, f"bad key {KEY}")) as server:
        model = judge(server, tmp_path, policies={"red": "Red."}, cache=str(tmp_path / "cache"))
        reasons = model([RED]).reasons
        name = f"endpoint:{server.url}"
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        cli.main(["score", str(tmp_path / "a.png"), "--domain", "photo", "--cost-model", name, "--json"])
        shown = "".join(capsys.readouterr())
        named = name_with_revision(COST_MODELS, name, model)
    assert "bad key [key]" in reasons[0] and "not_scored" in shown
    kept = "".join(file.read_text() for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert KEY not in "".join([str(reasons), shown, named, kept, repr(model.chat.__dict__), json.dumps(server.bodies)])


def test_a_redirect_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setenv("SPO_ENDPOINT_KEY", KEY)
    with ChatServer() as other:
        target = {"Location": f"{other.url}/chat/completions"}
        for status in (302, 307, 308):
            with ChatServer(before=lambda number, body, status=status: (status, target, "")) as server:
                batch = judge(server, tmp_path, policies={"red": "Red."})([RED])
            assert batch.logits.isnan().all() and str(status) in batch.reasons[0]
        assert not other.bodies


def test_addresses_and_options_are_checked(tmp_path):
    for url, message in (
        ("ftp://host/v1", "an address such as"),
        (f"http://user:{KEY}@host/v1", "SPO_ENDPOINT_KEY"),
        (f"http://host/v1?key={KEY}", "SPO_ENDPOINT_KEY"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            load_cost_model(f"endpoint:{url}")
        assert KEY not in str(caught.value)
    with ChatServer(models=("a", "b")) as server:
        with pytest.raises(SPOError, match="offers a, b; name one"):
            load_cost_model(f"endpoint:{server.url}")
        for options, message in (
            ({"key": KEY}, "unknown key"),
            ({"concurrency": 0}, "concurrency must be at least 1"),
            ({"template": "none"}, "template must be one of yes-no"),
            ({"budget": -1}, "budget must be at least 0"),
        ):
            with pytest.raises(ConfigError, match=message):
                judge(server, tmp_path, model="a", **options)
    with pytest.raises(SPOError, match="did not answer"):
        load_cost_model(f"endpoint:{server.url}")
    with pytest.raises(ConfigError, match="ruled out"):
        load_cost_model(f"endpoint:{server.url}", local_files_only=True)


POLICIES = {"Violence": "Harm.", "Sexual": "Nudity."}


@pytest.mark.parametrize(
    ("name", "said", "found", "reason"),
    [
        ("llavaguard", '{"rating": "Unsafe", "category": "O2: Sexual", "rationale":"a \\"b\\""}', [0, 1], 'a \\"b\\"'),
        ("llavaguard", '{"rating": "Safe", "category": "NA: None applying", "rationale": "fine"}', [0, 0], "fine"),
        (
            "llavaguard",
            '{"rating": "Unsafe", "category": "O9: Disasters", "rationale": "flood"}',
            [1, 1],
            "unsafe, by no category of the policy. flood",
        ),
        ("llavaguard", '{"rating": "?"}', None, "no verdict"),
        ("nemotron", "User Safety: unsafe\nSafety Categories: Threat, Sexual", [1, 1], ""),
        ("nemotron", "<think>a dog</think>User Safety: safe", [0, 0], "a dog"),
        ("guardreasoner", "<think>gore</think>Request: harmful", [1, 1], "no category of the policy. gore"),
        ("guardreasoner", "<think>a dog</think><result>Request: unharmful</result>", [0, 0], "a dog"),
        ("guardreasoner", "Request: harmful. Request: unharmful", None, "no verdict"),
    ],
)  # fmt: skip
def test_guard_models_are_read_in_their_own_format(tmp_path, name, said, found, reason):
    with ChatServer(words=lambda body: said) as server:
        policies = {"violence": "Harm.", "sexual": "Nudity."} if name == "nemotron" else POLICIES
        batch = judge(server, tmp_path, template=name, policies=policies)([RED])
    assert reason in batch.reasons[0]
    if found is None:
        assert batch.logits.isnan().all()
    else:
        assert [round(value, 3) for value in batch.logits.sigmoid()[0].tolist()] == [
            0.95 if one else 0.05 for one in found
        ]
    if name == "nemotron":
        assert server.bodies[0]["chat_template_kwargs"] == {"request_categories": "/categories"}
    else:
        assert ("Sexual. Nudity." in words_of(server.bodies[0])) and "{" not in templates()[name].prompt.format(
            policy=""
        )[:1]


def test_a_model_is_asked_in_the_form_that_its_name_calls_for(tmp_path):
    with ChatServer(
        words=lambda body: '{"rating": "Safe"}', models=("AIML-TUDA/LlavaGuard-v1.2-0.5B-OV-hf",)
    ) as server:
        batch = load_cost_model(f"endpoint:{server.url}")([RED])
    assert len(server.bodies) == 1 and batch.logits.sigmoid().max() < 0.06


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    return folder, *tiny_llava(folder)


def test_a_local_model_answers_as_transformers_called_by_hand(llava):
    folder, network, processor = llava
    images = list(HARMLESS.values())[:2]
    policy = load_policy("photo-shieldgemma2")
    model = load_cost_model(f"vlm:{folder}", policy=policy)
    model.options = JudgeOptions(reasons=False)  # a generation each
    batch = model(images)
    prompt = templates()["yes-no"].prompt
    yes, no = (processor.tokenizer.convert_tokens_to_ids(words) for words in (["Yes", "yes"], ["No", "no"]))
    expected = []
    for image in images:
        for category in policy.categories:
            text = f"<image> {prompt.format(category=category.name, description=category.description)} Answer :"
            inputs = processor(text=text, images=image, return_tensors="pt")
            with torch.no_grad():
                probability = network(**inputs).logits[0, -1].double().softmax(0)
            expected.append(math.log(probability[yes].sum() / probability[no].sum()))
    found = batch.logits.flatten().tolist()
    assert found == pytest.approx(expected, abs=1e-3) and len(set(found)) == 6
    assert torch.allclose(model(images[::-1]).logits.flip(0), batch.logits, atol=1e-5)


def test_a_local_model_says_why(llava):
    folder, network, processor = llava
    image = HARMLESS["table"]
    model = load_cost_model(f"vlm:{folder}", policy=load_policy("photo-sexual"))
    model._shift = -100.0  # whatever it answers is unsafe
    model.options = JudgeOptions(max_tokens=4)
    reason = model([image]).reasons[0]
    name, _, said = reason.partition(": ")
    text = f"<image> The policy forbids sexual: {model.policies['sexual']}"
    assert name == "sexual" and len(said.split()) <= 4
    inputs = processor(text=text, images=image, return_tensors="pt")
    assert inputs["input_ids"].shape[1] > 4 and model.identity != load_cost_model(f"vlm:{folder}").identity


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(SPOError, match="cannot load the vision-language model"):
        load_cost_model(f"vlm:{tmp_path}")
