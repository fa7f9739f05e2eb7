"""Publishing and loading by id, with the real clients against a Hub in this process."""

import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import torch
from huggingface_hub import ModelCard
from support.hub import READ, WRITE, HubServer, client_environment
from support.pipelines import base_image, fresh, images, random_adapter
from support.publishing import BASE, DATASET, READ_TOKEN, REPO, TOKEN, dry_run, run_client

from t2i_spo_plugin.adapters import write_adapter
from t2i_spo_plugin.errors import HubError, UnreadableAdapterError
from t2i_spo_plugin.hub import ModelCardInfo, publish_adapter
from t2i_spo_plugin.pipelines import load_spo_lora


def test_the_test_hub_keeps_the_rules_of_the_hub():
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


@pytest.fixture
def hub():
    """A Hub that cuts large files into parts, with accounts and with repositories of others."""
    with HubServer(chunk_size=20_000) as server:
        server.tokens = {TOKEN: ("anna", WRITE), READ_TOKEN: ("anna", READ)}
        yield server


@pytest.fixture
def weights(tmp_path):
    """The bytes of somebody's adapter."""
    return write_adapter(random_adapter(fresh("sd1"), rank=8), tmp_path / "of-others.safetensors").read_bytes()


CARD = {"base_model": BASE, "license": "mit"}


def publishing(name, file, **options):
    """A step of a client: the adapter `file` is published."""
    return name, "publish", {"adapter": str(file), "card": CARD, "token": TOKEN} | options


def loading(name, src, **options):
    return name, "load", {"src": src} | options


def test_an_adapter_is_published_read_back_and_loaded_by_id(hub, file, summary, image, tmp_path):
    card = CARD | {"results": str(summary), "dataset": DATASET, "images": [["a street", str(image)]]}
    steps = [
        ("first", "publish", {"adapter": str(file), "card": card, "token": TOKEN, "repo_id": REPO, "with_pipe": True}),
        publishing("again", file, card=card, repo_id=REPO),
        loading("by id", REPO),
        loading("from the cache", REPO, local_files_only=True),
        ("inspect", "command", {"words": ["inspect", REPO]}),
    ]
    answers = run_client(hub, tmp_path / "home", steps)

    repo, first = hub.repos[REPO], answers["first"]
    sent = repo.files(first["commit"])
    planned = dry_run(file, None, results=summary, dataset=DATASET, images=[("a street", image)])
    assert {name: hashlib.sha256(sent[name]).hexdigest() for name in sent.keys() - {".gitattributes"}} == {
        item.path: item.sha256 for item in planned.files
    }
    assert first["url"].endswith(f"/{REPO}/commit/{first['commit']}") and "published and read back" in first["text"]
    assert answers["again"]["commit"] == first["commit"] == repo.branches["main"]
    commits = [[json.loads(line) for line in body.splitlines()] for body in hub.sent("POST", f"{REPO}/commit/main")]
    assert len(commits) == 1 and commits[0][0]["value"]["parentCommit"] in repo.commits
    assert hub.sent("POST", "/complete"), "the adapter was to be sent in parts"
    assert ModelCard(sent["README.md"].decode()).data.base_model == BASE
    generated = torch.tensor(answers["by id"]["image"])
    assert not torch.allclose(generated, base_image("sd1"), atol=1e-2)
    assert answers["from the cache"] == answers["by id"]
    assert answers["inspect"]["code"] == 0 and "kohya" in answers["inspect"]["text"]
    check_nothing_private_was_sent(hub, tmp_path)

    # This process is offline: the cache that the client filled is all there is.
    pipe, cache = fresh("sd1"), tmp_path / "home" / "hub"
    record = load_spo_lora(pipe, REPO, cache_dir=cache)
    assert record.source == REPO and images(pipe).tolist() == answers["by id"]["image"]
    with pytest.raises(UnreadableAdapterError, match="not in the local cache and the Hub cannot be reached"):
        load_spo_lora(pipe, "ben/other", cache_dir=cache, adapter_name="other")
    with pytest.raises(HubError, match="offline mode is on"):
        publish_adapter(file, REPO, ModelCardInfo(**CARD), token=TOKEN)


def check_nothing_private_was_sent(hub, tmp_path):
    stored = [
        content for repo in hub.repos.values() for name in repo.branches for content in repo.files(name).values()
    ]
    for body in [*stored, *(body for _, _, body in hub.log)]:
        for secret in (TOKEN, READ_TOKEN, str(tmp_path), "/home/somebody", "/data/runs", "drawn by somebody"):
            assert secret.encode() not in body


def test_refusals_of_the_hub_become_one_sentence_with_its_cure(hub, file, weights, tmp_path):
    hub.add("anna/race").before_commit = lambda repo: repo.commit({"other.txt": b"someone was faster"})
    hub.add("anna/changed").before_commit = lambda repo: repo.objects.update(
        {oid: content[:-1] + b"x" for oid, content in repo.objects.items()}
    )
    hub.add("anna/full", {"old.safetensors": weights})
    hub.add("ben/two", {"a.safetensors": weights, "b.safetensors": weights})
    hub.add("ben/gated", {"a.safetensors": weights}, gated=True)
    hub.add("ben/private", {"a.safetensors": weights}, private=True)
    hub.add("ben/pickle", {"a.bin": b"\x80"})
    sending = {
        "stale": ({"repo_id": "anna/race"}, "anna/race was changed by someone else in the meantime"),
        "changed": ({"repo_id": "anna/changed"}, "is not what was sent; do not use it"),
        "full": ({"repo_id": "anna/full"}, "anna/full already holds old.safetensors"),
        "wrong token": ({"repo_id": REPO, "token": "hf_wrong"}, "the Hub does not know this token"),
        "no token": ({"repo_id": REPO, "token": None}, "no token: log in"),
        "read token": ({"repo_id": REPO, "token": READ_TOKEN}, f"this token may not write to {REPO}"),
        "foreign": ({"repo_id": "ben/mine"}, "this token may not write to ben/mine"),
    }
    several = "ben/two holds 2 safetensors files (a.safetensors, b.safetensors); pass one of them as weight"
    reading = {
        "ambiguous": ({"repo": "ben/two"}, several),
        "no revision": ({"repo": "ben/two", "revision": "nowhere"}, "ben/two has no revision nowhere"),
        "no file": ({"repo": "ben/two", "weight_name": "x.safetensors"}, "ben/two does not hold that file"),
        "missing": ({"repo": "ben/nothing"}, "the Hub has no such repository, or it is private"),
        "gated": ({"repo": "ben/gated"}, "ben/gated is gated: accept its terms"),
        "gated, account": ({"repo": "ben/gated", "token": READ_TOKEN}, "ben/gated is gated: accept its terms"),
        "private": ({"repo": "ben/private"}, "the Hub has no such repository, or it is private"),
        "pickle": ({"repo": "ben/pickle"}, "a.bin is a pickle, which can run code and is never opened"),
    }
    steps = [publishing(name, file, **options) for name, (options, _) in sending.items()]
    steps += [(name, "download", options) for name, (options, _) in reading.items()]
    answers = run_client(hub, tmp_path / "home", steps)
    for name, (_, message) in sending.items():
        assert answers[name]["error"] == "HubError" and message in answers[name]["message"], answers[name]
        assert name in ("changed", "full") or "(no commit was confirmed)" in answers[name]["message"]
    for name, (_, message) in reading.items():
        assert answers[name].get("error") == "UnreadableAdapterError" and message in answers[name]["message"], name
    assert all(len(answer["message"].splitlines()) == 1 for answer in answers.values())
    for name in ("anna/race", "anna/full"):
        assert "README.md" not in hub.repos[name].files()


@pytest.mark.slow
def test_an_interrupted_upload_is_taken_up_again(hub, file, tmp_path):
    hub.add("anna/flaky").drops = 6
    steps = [publishing(name, file, repo_id="anna/flaky") for name in ("broken off", "again")]
    answers = run_client(hub, tmp_path / "home", steps)
    assert answers["broken off"]["error"] == "HubError"
    assert "the connection to the Hub broke off" in answers["broken off"]["message"]
    flaky = hub.repos["anna/flaky"]
    assert answers["again"]["commit"] == flaky.branches["main"] and "README.md" in flaky.files()


@pytest.mark.slow
def test_branches_private_repositories_and_subfolders_are_chosen_by_their_options(hub, file, weights, tmp_path):
    hub.add("ben/two", {"a.safetensors": weights, "b.safetensors": weights, "experts/c.safetensors": weights})
    steps = [
        publishing("main", file, repo_id=REPO),
        publishing("branch", file, repo_id=REPO, revision="next/one", card=CARD | {"title": "Another"}),
        publishing("secret", file, repo_id="anna/secret", private=True),
        loading("ours", REPO),
        loading("ours, branch", REPO, revision="next/one"),
        loading("subfolder", "ben/two", subfolder="experts"),
        loading("named", "ben/two", weight_name="b.safetensors"),
        ("diffusers", "diffusers", {"pretrained_model_name_or_path_or_dict": REPO}),
    ]
    answers = run_client(hub, tmp_path / "home", steps)
    repo = hub.repos[REPO]
    assert answers["branch"]["commit"] == repo.branches["next/one"] != repo.branches["main"]
    assert b"Another" in repo.files("next/one")["README.md"] and b"Another" not in repo.files()["README.md"]
    assert hub.repos["anna/secret"].private and not repo.private
    for name in ("ours, branch", "subfolder", "named"):
        assert answers[name].get("image") == answers["ours"]["image"], answers[name]
    ours, plain = (torch.tensor(answers[name]["image"]) for name in ("ours", "diffusers"))
    assert torch.allclose(ours, plain, atol=1e-4)


@pytest.mark.slow
def test_the_hf_command_downloads_and_uploads_what_was_published(hub, file, tmp_path):
    run_client(hub, tmp_path / "home", [publishing("first", file, repo_id=REPO)])
    environment, folder = client_environment(hub.url, tmp_path / "home"), tmp_path / "by-hf"
    hf(environment, "download", REPO, "--local-dir", str(folder))
    sent = hub.repos[REPO].files()
    assert all((folder / name).read_bytes() == content for name, content in sent.items())
    hf(environment | {"HF_TOKEN": TOKEN}, "upload", "anna/by-hand", str(folder), ".")
    assert hub.repos["anna/by-hand"].files().keys() == sent.keys()


def hf(environment, *words):
    command = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
