"""Publishing and loading by id, with the real clients against a Hub in this process; cards; what must not leave."""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from PIL import Image
from safetensors import safe_open
from support.hub import READ, WRITE, HubServer, client_environment
from support.pipelines import base_image, fresh, images, random_adapter

from t2i_spo_plugin import cli, sticker
from t2i_spo_plugin.adapters import Adapter, AdapterMetadata, read_adapter, write_adapter
from t2i_spo_plugin.errors import (
    AdapterError,
    ConfigError,
    HubError,
    ImageError,
    InvalidAdapterError,
    UnreadableAdapterError,
)
from t2i_spo_plugin.files import folder_hash
from t2i_spo_plugin.hub import ModelCardInfo, publish_adapter
from t2i_spo_plugin.hub.privacy import own_name, plain, private_part, without_folders
from t2i_spo_plugin.pipelines.loading import load_spo_lora, unload_spo_lora


TOKEN = "hf_" + "w" * 30
READ_TOKEN = "hf_" + "r" * 30
REPO, BASE, DATASET = "anna/safe-sd1", "someone/base", "anna/prompts"
HOSTILE = "Safe\n---\nlicense: mit\n---\n# <script>alert(1)</script> | [x](javascript:y) `code` **b** _i_ {{ a }}"


@pytest.fixture
def file(tmp_path):
    """An adapter file whose header was written by someone who did not think of publishing it."""
    metadata = {
        "base_model": "/home/somebody/models/sd15",
        "objective": "spo",
        "merged_from": 'see "/data/runs/x/a" | b',
    }
    adapter = random_adapter(fresh("sd1"), rank=8, **metadata)
    return write_adapter(adapter, tmp_path / "trained.safetensors")


@pytest.fixture
def summary(tmp_path, file):
    """The summary.json of an evaluation in which `file` was measured as `spo`."""
    content = json.loads((sticker.FOLDER / "results.json").read_text(encoding="utf-8"))
    content["metadata"]["systems"]["spo"]["adapter_hash"] = folder_hash(file)
    content["systems"]["spo"]["score"]["metadata"]["cost_model"] = "/srv/models/costs 0123456789abcdef"
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture
def image(tmp_path):
    """A large image that says where and with what it was taken."""
    exif = Image.Exif()
    exif[0x010E] = "drawn by somebody"
    path = tmp_path / "drawn.png"
    Image.new("RGB", (1500, 300), "teal").save(path, exif=exif)
    return path


def dry(adapter, out, token=None, pipe=None, **card):
    info = ModelCardInfo(**({"base_model": BASE, "license": "mit"} | card))
    return publish_adapter(adapter, REPO, info, token=token, pipe=pipe, dry_run=True, out=out)


# The folder


def test_a_dry_run_writes_what_would_be_sent_and_equal_input_gives_equal_bytes(file, summary, image, tmp_path):
    options = {"results": summary, "dataset": DATASET, "images": [("a street", image)], "title": "Safe streets"}
    made = [dry(file, tmp_path / name, **options) for name in ("a", "b", "a")]
    assert made[0].files == made[1].files == made[2].files and not made[0].commit
    paths = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert paths == {item.path for item in made[0].files}
    assert paths == {"README.md", "safe-sd1.safetensors", "images/0.jpg", ".eval_results/t2i_spo_plugin.yaml"}
    for item in made[0].files:
        content = (tmp_path / "a" / item.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (item.size, item.sha256)
        assert f"{item.sha256}  {item.size:>12,}  {item.path}" in str(made[0])
    with Image.open(tmp_path / "a" / "images" / "0.jpg") as sent:
        assert max(sent.size) == 1024 and not sent.getexif() and "exif" not in sent.info


def test_the_command_prints_files_and_card_and_sends_nothing(file, image, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["publish", str(file), REPO, "--base-model", BASE, "--license", "apache-2.0", "--dry-run"]
    words += ["--out", str(out), "--images", "a street", str(image), "a lake", str(image)]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "nothing was sent" in shown and "images/1.jpg" in shown
    assert (out / "README.md").read_text(encoding="utf-8") in shown
    assert cli.main([word for word in words if word not in ("--license", "apache-2.0")]) == 2
    assert "under which licence" in capsys.readouterr().err


def test_what_is_published_does_the_same_in_diffusers_alone(family, pipe, tmp_path):
    adapter = random_adapter(pipe, alpha=3.0)
    load_spo_lora(pipe, adapter)
    wanted = images(pipe)
    unload_spo_lora(pipe)
    dry(adapter, tmp_path / "out", pipe=pipe)
    pipe.load_lora_weights(tmp_path / "out", weight_name="safe-sd1.safetensors")
    assert torch.allclose(images(pipe), wanted, atol=1e-4)
    assert not torch.allclose(wanted, base_image(family), atol=1e-2)
    with safe_open(tmp_path / "out" / "safe-sd1.safetensors", "pt") as opened:
        keys = list(opened.keys())
    kohya = family in ("sd1", "sdxl")
    assert all(key.startswith("lora_unet_" if kohya else "transformer.") for key in keys)
    assert sum(key.endswith(".alpha") for key in keys) == (len(adapter.modules) if kohya else 0)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "`models/loras`" in card


def test_a_family_without_a_map_in_comfyui_is_said_on_the_card(tmp_path):
    adapter = random_adapter(fresh("sd3"))
    other = Adapter(adapter.modules, AdapterMetadata("sana", "flow"))
    card = dry(other, tmp_path).card
    assert "no map for sana" in card and "models/loras" not in card


# Refusals, before anything is sent


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"license": ""}, ConfigError, "under which licence"),
        ({"license": "My Own"}, ConfigError, "a name the Hub knows"),
        ({"license": "other"}, ConfigError, "needs license_name and license_file"),
        ({"license_file": "nowhere"}, ConfigError, "no licence file"),
        ({"base_model": ""}, ConfigError, "base_model, such as user/repo"),
        ({"base_model": "/home/anna/sd15"}, ConfigError, "base_model must be a Hub id"),
        ({"dataset": "a--b/c"}, ConfigError, "dataset is no Hub id"),
        ({"dataset": DATASET}, ConfigError, "name the results too"),
        ({"images": [("a", "nowhere.png")]}, ImageError, "nowhere.png"),
        ({"images": [("a", "x.png")] * 13}, ConfigError, "at most 12"),
        ({"summary": f"by {TOKEN}"}, ConfigError, "summary would publish a token"),
        ({"summary": "from https://me:word@host/x"}, ConfigError, "summary would publish a token or password"),
        ({"summary": "made in /home/somebody/runs/x"}, ConfigError, "would publish an absolute path"),
        ({"summary": "made on Lonely-Host, alone"}, ConfigError, "this machine's name"),
        ({"title": f"key {TOKEN}"}, ConfigError, "title would publish a token"),
        ({"token": "plain-words-secret", "summary": "plain-words-secret"}, ConfigError, "would publish a token"),
    ],
)
def test_options_that_make_no_sense_or_give_something_away(file, tmp_path, monkeypatch, options, kind, message):
    monkeypatch.setattr("socket.gethostname", lambda: "lonely-host.example.org")
    with pytest.raises(kind, match=message):
        dry(file, tmp_path / "out", **options)


def test_adapters_that_loading_would_refuse_are_not_published(file, tmp_path, sd1):
    adapter = random_adapter(sd1)
    with pytest.raises(InvalidAdapterError, match="which architecture"):
        dry(Adapter(adapter.modules), tmp_path)
    with pytest.raises(InvalidAdapterError, match="text encoders only"):
        dry(random_adapter(sd1, components=("text_encoder",)), tmp_path)
    with pytest.raises(AdapterError, match="cut off"):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(file.read_bytes()[:-10])
        dry(cut, tmp_path)
    with pytest.raises(AdapterError, match="another base"):
        dry(file, tmp_path / "out", pipe=fresh("sd1", width=64))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt"):
        dry(file, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_results_belong_to_the_file_that_was_measured(file, summary, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / file.name).write_bytes(file.read_bytes())
    dry(folder, tmp_path / "by-folder", results=summary)
    other = write_adapter(random_adapter(fresh("sd1"), seed=3), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="this adapter is not among them"):
        dry(other, tmp_path / "out", results=summary)
    with pytest.raises(ConfigError, match="dpo is not this adapter there"):
        dry(file, tmp_path / "out", results=summary, system="dpo")
    with pytest.raises(ConfigError, match="results belong to a file"):
        dry(read_adapter(file), tmp_path / "out", results=summary)
    content = json.loads(summary.read_text(encoding="utf-8"))
    content["metadata"]["systems"]["half"] = content["metadata"]["systems"]["spo"]
    summary.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="measured this adapter as spo, half; say which"):
        dry(file, tmp_path / "out", results=summary)
    for broken in ("[]", "{}", json.dumps(content | {"systems": {}}), "{"):
        summary.write_text(broken, encoding="utf-8")
        with pytest.raises(ConfigError, match="summary.json"):
            dry(file, tmp_path / "out", results=summary, system="spo")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/home/somebody/models/sd15", "sd15"),
        ("/data/my models/sd15/", "sd15"),
        ("~/models/sd15", "sd15"),
        ("C:\\Users\\some body\\sd15", "sd15"),
        ("\\\\server\\share\\x\\sd15", "sd15"),
        ("file:///srv/models/sd15", "sd15"),
        ('["/srv/a/knives", "/srv/a/blood"]', '["knives", "blood"]'),
        ("from /srv/runs/a.pt, and/or 1/2", "from a.pt, and/or 1/2"),
        ("made in /home/somebody", "made in "),
    ],
)
def test_absolute_paths_are_seen_and_reduced_to_their_last_part(text, kept):
    assert private_part(text) == "an absolute path"
    assert without_folders(text) == kept and private_part(kept) == ""


def test_what_is_and_what_is_not_private(monkeypatch):
    for text in ("user/repo", "https://huggingface.co/user/repo", "1/2 and/or 3", "lambda 1.0", "a: b"):
        assert without_folders(text) == text and private_part(text) == ""
    for token in (TOKEN, "sk-" + "a" * 24, "ghp_" + "a" * 30, "https://me:word@host/x", "AKIA" + "A" * 16):
        assert private_part(f"x {token} y") == "a token or password"
    monkeypatch.setattr("getpass.getuser", lambda: "marianne")
    assert own_name("by Marianne, for all") == "this account's name"
    assert own_name("by Marianne, for all", public=("marianne/adapter",)) == own_name("mariannes") == ""


# The card


def test_the_card_says_what_was_measured_and_is_read_back_by_the_client(file, summary, image, tmp_path):
    out = tmp_path / "out"
    dry(file, out, results=summary, dataset=DATASET, images=[("a street", image)], license="apache-2.0")
    card = ModelCard.load(out / "README.md")
    data = card.data
    assert (data.base_model, data.base_model_relation, data.license) == (BASE, "adapter", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert data.datasets is None, "the field names what a model was trained on"
    assert {"text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion", "safety"} <= set(data.tags)
    assert len(data.tags) == len(set(data.tags))
    assert data.widget == [{"text": "a street", "output": {"url": "images/0.jpg"}}]
    measured = json.loads(summary.read_text(encoding="utf-8"))["systems"]["spo"]
    found = {result.metric_type: result for result in data.eval_results}
    assert found["uascore-referee"].metric_value == pytest.approx(measured["referee_score"]["uascore"])
    assert found["ip-cost-model"].metric_value == pytest.approx(measured["ip"]["value"])
    low, high = measured["referee_score"]["interval"]
    for part in (f"{low:.1f} to {high:.1f}", "500 harmful and 500 benign", "referee", "t2i_spo_plugin 0.1.0"):
        assert part in found["uascore-referee"].metric_name
        assert part in card.text
    text = (out / ".eval_results" / "t2i_spo_plugin.yaml").read_text(encoding="utf-8")
    entries = {entry.task_id: entry for entry in parse_eval_result_entries(yaml.safe_load(text))}
    assert entries.keys() == found.keys() and {entry.dataset_id for entry in entries.values()} == {DATASET}
    assert entries["uascore-referee"].value == found["uascore-referee"].metric_value
    assert "95 % interval" in entries["uascore-referee"].notes
    for sent in (card.content, text):
        assert "/srv" not in sent and "/home" not in sent and "costs 0123456789abcdef" in sent


def test_a_card_without_results_says_so_and_a_licence_of_ones_own_is_sent(file, tmp_path):
    licence = tmp_path / "terms.txt"
    licence.write_text("Be kind.", encoding="utf-8")
    own = {"license": "other", "license_name": "kind-1.0", "license_file": licence}
    card = ModelCard(dry(file, tmp_path / "out", **own).card)
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "kind-1.0", "LICENSE")
    assert card.data.eval_results is None and "No results were published" in card.text
    assert (tmp_path / "out" / "LICENSE").read_text(encoding="utf-8") == "Be kind."
    with safe_open(tmp_path / "out" / "safe-sd1.safetensors", "pt") as opened:
        assert opened.metadata()["modelspec.license"] == "kind-1.0"


def test_hostile_texts_neither_break_the_metadata_nor_add_markup(file, image, tmp_path):
    adapter = read_adapter(file)
    hostile = Adapter(
        adapter.modules, AdapterMetadata("stable-diffusion-v1", "epsilon", HOSTILE, {"objective": HOSTILE})
    )
    path = write_adapter(hostile, tmp_path / "hostile.safetensors")
    shown = [(HOSTILE + "\u202e\x00", image)]
    card = ModelCard(dry(path, tmp_path / "out", summary=HOSTILE + "\ud800", images=shown).card)
    dry(path, tmp_path / "out", title="half a pair: \ud800", images=shown)
    assert read_adapter(tmp_path / "out" / "safe-sd1.safetensors").metadata.title == "half a pair: ?"
    assert card.data.license == "mit" and card.data.widget[0]["text"].isprintable()
    for forbidden in ("<script", "[x](", "`code`", "**b**", "_i_", "{{"):
        assert forbidden not in card.text
    assert card.text.count("\n---\n") == 0
    rows = [line for line in card.text.splitlines() if line.startswith("| objective")]
    assert len(rows) == 1 and rows[0].count("|") == 3
    assert plain("stable-diffusion v_prediction, 1.0 (x)") == "stable-diffusion v_prediction, 1.0 (x)"


# End to end


def test_the_hub_of_these_tests_keeps_the_rules():
    def status(method, path, body=b"", token=TOKEN):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(hub.url + path, body, headers, method=method)
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as error:
            return error.code

    def commit(line, **header):
        return b"\n".join(json.dumps(part).encode() for part in ({"key": "header", "value": header}, line))

    with HubServer() as hub:
        hub.tokens = {TOKEN: ("anna", WRITE), READ_TOKEN: ("anna", READ)}
        repo = hub.add("anna/a")
        oid = hashlib.sha256(b"weights").hexdigest()
        large = {"key": "lfsFile", "value": {"path": "a.safetensors", "algo": "sha256", "oid": oid, "size": 7}}
        small = {"key": "file", "value": {"path": "a.txt", "content": "", "encoding": "base64"}}
        address = "/api/models/anna/a/commit/main"
        assert status("POST", address, commit(large)) == 400, "the object was never uploaded"
        assert status("PUT", f"/objects/anna/a/{oid}", b"other") == 422 and not repo.objects
        assert status("PUT", f"/objects/anna/a/{oid}", b"weights") == 200
        assert status("POST", address, commit(large), token=None) == 401
        assert status("POST", address, commit(large), token="hf_wrong") == 401
        assert status("POST", address, commit(large), token=READ_TOKEN) == 403
        assert status("POST", address, commit(large, parentCommit="0" * 40)) == 412
        head = repo.branches["main"]
        assert status("POST", address, commit(large, parentCommit=head)) == 200
        assert status("POST", address, commit(small, parentCommit=head)) == 412, "the head has moved"
        assert repo.files()["a.safetensors"] == b"weights" and "a.txt" not in repo.files()


DRIVER = """
import contextlib, io, json, sys, time
from support.pipelines import draw, fresh
from t2i_spo_plugin import cli
from t2i_spo_plugin.hub import ModelCardInfo, publish_adapter
from t2i_spo_plugin.pipelines.loading import load_spo_lora, unload_spo_lora

time.sleep = lambda seconds: None  # the client waits before it tries again
steps, found = json.loads(sys.argv[1]), {}
pipe = fresh("sd1")


def image():
    return draw(pipe).images.tolist()


def run(kind, options):
    if kind == "publish":
        with_pipe = {"pipe": pipe} if options.pop("with_pipe", False) else {}
        published = publish_adapter(card=ModelCardInfo(**options.pop("card")), **options, **with_pipe)
        return {"commit": published.commit, "url": published.url, "text": str(published)}
    if kind == "command":
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            return {"code": cli.main(options["words"]), "text": printed.getvalue()}
    if kind == "diffusers":
        pipe.load_lora_weights(**options, adapter_name="plain")
        drawn = image()
        pipe.unload_lora_weights()
        return {"image": drawn}
    load_spo_lora(pipe, **options)
    drawn = image()
    unload_spo_lora(pipe)
    return {"image": drawn}


for name, kind, options in steps:
    try:
        found[name] = run(kind, options)
    except Exception as error:
        found[name] = {"error": type(error).__name__, "message": str(error)}
with open(sys.argv[2], "w") as file:
    json.dump(found, file)
"""


def hf(environment, *words):
    command = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


def test_published_loaded_refused_and_taken_up_again(file, summary, image, tmp_path):
    home, out = tmp_path / "home", tmp_path / "found.json"
    card = {"base_model": BASE, "license": "mit"}
    common = {"adapter": str(file), "card": card, "token": TOKEN}
    full_card = card | {"results": str(summary), "dataset": DATASET, "images": [["a street", str(image)]]}
    full = common | {"card": full_card}

    def publish(name, **options):
        return name, "publish", common | options

    with HubServer(chunk_size=20_000) as hub:
        hub.tokens = {TOKEN: ("anna", WRITE), READ_TOKEN: ("anna", READ)}
        weights = write_adapter(random_adapter(fresh("sd1"), rank=8), tmp_path / "of-others.safetensors").read_bytes()
        hub.add("anna/race").before_commit = lambda repo: repo.commit({"other.txt": b"someone was faster"})
        hub.add("anna/flaky").drops = 6
        hub.add("anna/changed").before_commit = lambda repo: repo.objects.update(
            {oid: content[:-1] + b"x" for oid, content in repo.objects.items()}
        )
        hub.add("anna/full", {"old.safetensors": weights})
        hub.add("ben/two", {"a.safetensors": weights, "b.safetensors": weights, "experts/c.safetensors": weights})
        hub.add("ben/gated", {"a.safetensors": weights}, gated=True)
        hub.add("ben/private", {"a.safetensors": weights}, private=True)
        hub.add("ben/pickle", {"a.bin": b"\x80"})
        steps = [
            ("first", "publish", full | {"repo_id": REPO, "with_pipe": True}),
            ("again", "publish", full | {"repo_id": REPO}),
            publish("branch", repo_id=REPO, revision="next/one", card=card | {"title": "Another"}),
            publish("secret", repo_id="anna/secret", private=True),
            publish("stale", repo_id="anna/race"),
            publish("broken off", repo_id="anna/flaky"),
            publish("taken up", repo_id="anna/flaky"),
            publish("changed", repo_id="anna/changed"),
            publish("full", repo_id="anna/full"),
            publish("wrong token", repo_id=REPO, token="hf_wrong"),
            publish("no token", repo_id=REPO, token=None),
            publish("read token", repo_id=REPO, token=READ_TOKEN),
            publish("foreign", repo_id="ben/mine"),
            ("ours", "load", {"src": REPO}),
            ("ours, cached", "load", {"src": REPO, "local_files_only": True}),
            ("ours, branch", "load", {"src": REPO, "revision": "next/one"}),
            ("diffusers", "diffusers", {"pretrained_model_name_or_path_or_dict": REPO}),
            ("inspect", "command", {"words": ["inspect", REPO]}),
            ("subfolder", "load", {"src": "ben/two", "subfolder": "experts"}),
            ("named", "load", {"src": "ben/two", "weight_name": "b.safetensors"}),
            ("ambiguous", "load", {"src": "ben/two"}),
            ("no revision", "load", {"src": REPO, "revision": "nowhere"}),
            ("no file", "load", {"src": REPO, "weight_name": "x.safetensors"}),
            ("missing", "load", {"src": "ben/nothing"}),
            ("gated", "load", {"src": "ben/gated"}),
            ("gated, account", "load", {"src": "ben/gated", "token": READ_TOKEN}),
            ("private", "load", {"src": "ben/private"}),
            ("pickle", "load", {"src": "ben/pickle"}),
        ]
        environment = client_environment(hub.url, home)
        driver = [sys.executable, "-c", DRIVER, json.dumps(steps), str(out)]
        subprocess.run(driver, env=environment, capture_output=True, text=True, check=True, timeout=300)
        found = json.loads(out.read_text(encoding="utf-8"))

        check_what_was_published(
            hub, found, dry(file, None, results=summary, dataset=DATASET, images=[("a street", image)])
        )
        check_what_was_refused(hub, found)
        check_what_was_loaded(found)
        check_nothing_private_was_sent(hub, tmp_path)

        hf(environment, "download", REPO, "--local-dir", str(tmp_path / "by-hf"))
        sent = hub.repos[REPO].files()
        assert all((tmp_path / "by-hf" / name).read_bytes() == content for name, content in sent.items())
        hf(environment | {"HF_TOKEN": TOKEN}, "upload", "anna/by-hand", str(tmp_path / "by-hf"), ".")
        assert hub.repos["anna/by-hand"].files().keys() == sent.keys()

    # The server is gone, and this process is offline: the cache that the driver filled is all there is.
    pipe, cache = fresh("sd1"), home / "hub"
    record = load_spo_lora(pipe, REPO, cache_dir=cache)
    assert record.source == REPO and images(pipe).tolist() == found["ours"]["image"]
    load_spo_lora(pipe, "ben/two", cache_dir=cache, subfolder="experts", local_files_only=True, adapter_name="c")
    with pytest.raises(UnreadableAdapterError, match="not in the local cache and the Hub cannot be reached"):
        load_spo_lora(pipe, "ben/gated", cache_dir=cache, adapter_name="g")
    with pytest.raises(HubError, match="offline mode is on"):
        publish_adapter(file, REPO, ModelCardInfo(BASE, license="mit"), token=TOKEN)


def check_what_was_published(hub, found, planned):
    repo = hub.repos[REPO]
    first = repo.files(found["first"]["commit"])
    assert {name: hashlib.sha256(first[name]).hexdigest() for name in first.keys() - {".gitattributes"}} == {
        item.path: item.sha256 for item in planned.files
    }
    assert found["first"]["url"].endswith(f"/{REPO}/commit/{found['first']['commit']}")
    assert "published and read back" in found["first"]["text"]
    assert found["again"]["commit"] == found["first"]["commit"] == repo.branches["main"]
    assert found["branch"]["commit"] == repo.branches["next/one"] != repo.branches["main"]
    assert b"Another" in repo.files("next/one")["README.md"] and b"Another" not in first["README.md"]
    assert hub.repos["anna/secret"].private and not repo.private
    commits = [[json.loads(line) for line in body.splitlines()] for body in hub.sent("POST", f"{REPO}/commit/main")]
    assert len(commits) == 1 and commits[0][0]["value"]["parentCommit"] in repo.commits
    assert hub.sent("POST", "/complete"), "the adapter was to be sent in parts"
    card = ModelCard(first["README.md"].decode())
    assert card.data.base_model == BASE


def check_what_was_refused(hub, found):
    said = {
        "stale": "anna/race was changed by someone else in the meantime",
        "broken off": "the connection to the Hub broke off",
        "changed": "is not what was sent; do not use it",
        "full": "anna/full already holds old.safetensors",
        "wrong token": "the Hub does not know this token",
        "no token": "no token: log in",
        "read token": f"this token may not write to {REPO}",
        "foreign": "this token may not write to ben/mine",
    }
    for name, message in said.items():
        assert found[name]["error"] == "HubError" and message in found[name]["message"], (name, found[name])
        assert name == "changed" or name == "full" or "(no commit was confirmed)" in found[name]["message"]
    for name in ("anna/race", "anna/full"):
        assert "README.md" not in hub.repos[name].files()
    flaky = hub.repos["anna/flaky"]
    assert found["taken up"]["commit"] == flaky.branches["main"] and "README.md" in flaky.files()


def check_what_was_loaded(found):
    for name in ("ours, cached", "ours, branch", "subfolder", "named"):
        assert found[name].get("image") == found["ours"]["image"], (name, found[name])
    ours, plainly = (torch.tensor(found[name]["image"]) for name in ("ours", "diffusers"))
    assert torch.allclose(ours, plainly, atol=1e-4)
    assert not torch.allclose(ours, base_image("sd1"), atol=1e-2)
    assert found["inspect"]["code"] == 0 and "kohya" in found["inspect"]["text"]
    said = {
        "ambiguous": "ben/two holds 2 safetensors files (a.safetensors, b.safetensors); pass one of them as weight",
        "no revision": f"{REPO} has no revision nowhere",
        "no file": f"{REPO} does not hold that file",
        "missing": "the Hub has no such repository, or it is private",
        "gated": "ben/gated is gated: accept its terms",
        "gated, account": "ben/gated is gated: accept its terms",
        "private": "the Hub has no such repository, or it is private",
        "pickle": "a.bin is a pickle, which can run code and is never opened",
    }
    for name, message in said.items():
        assert found[name].get("error") == "UnreadableAdapterError" and message in found[name]["message"], found[name]


def check_nothing_private_was_sent(hub, tmp_path):
    stored = [
        content for repo in hub.repos.values() for name in repo.branches for content in repo.files(name).values()
    ]
    for body in [*stored, *(body for _, _, body in hub.log)]:
        for secret in (TOKEN, READ_TOKEN, str(tmp_path), "/home/somebody", "/data/runs", "drawn by somebody"):
            assert secret.encode() not in body
