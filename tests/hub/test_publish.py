"""The folder that would be sent, and what is refused before anything is."""

import hashlib
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from support.pipelines import base_image, fresh, images, random_adapter
from support.publishing import BASE, DATASET, REPO, TOKEN, dry_run

from t2i_spo_plugin import cli
from t2i_spo_plugin.adapters import Adapter, read_adapter, write_adapter
from t2i_spo_plugin.errors import AdapterError, ConfigError, ImageError, InvalidAdapterError
from t2i_spo_plugin.pipelines import load_spo_lora, unload_spo_lora


def test_a_dry_run_writes_what_would_be_sent_and_equal_input_gives_equal_bytes(file, summary, image, tmp_path):
    options = {"results": summary, "dataset": DATASET, "images": [("a street", image)], "title": "Safe streets"}
    runs = [dry_run(file, tmp_path / name, **options) for name in ("a", "b", "a")]
    assert runs[0].files == runs[1].files == runs[2].files and not runs[0].commit
    paths = {path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert paths == {item.path for item in runs[0].files}
    assert paths == {"README.md", "safe-sd1.safetensors", "images/0.jpg", ".eval_results/t2i_spo_plugin.yaml"}
    for item in runs[0].files:
        content = (tmp_path / "a" / item.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (item.size, item.sha256)
        assert f"{item.sha256}  {item.size:>12,}  {item.path}" in str(runs[0])
    with Image.open(tmp_path / "a" / "images" / "0.jpg") as sent:
        assert max(sent.size) == 1024 and not sent.getexif() and "exif" not in sent.info


def test_a_dry_run_of_the_command_prints_files_and_card(file, image, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["publish", str(file), REPO, "--base-model", BASE, "--license", "apache-2.0", "--dry-run"]
    words += ["--out", str(out), "--images", "a street", str(image), "a lake", str(image)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "nothing was sent" in printed and "images/1.jpg" in printed
    assert (out / "README.md").read_text(encoding="utf-8") in printed
    assert cli.main([word for word in words if word not in ("--license", "apache-2.0")]) == 2
    assert "under which licence" in capsys.readouterr().err


def test_a_published_file_does_the_same_in_diffusers_alone(family, pipe, tmp_path):
    adapter = random_adapter(pipe, alpha=3.0)
    load_spo_lora(pipe, adapter)
    expected = images(pipe)
    unload_spo_lora(pipe)
    dry_run(adapter, tmp_path / "out", pipe=pipe)
    pipe.load_lora_weights(tmp_path / "out", weight_name="safe-sd1.safetensors")
    assert torch.allclose(images(pipe), expected, atol=1e-4)
    assert not torch.allclose(expected, base_image(family), atol=1e-2)
    with safe_open(tmp_path / "out" / "safe-sd1.safetensors", "pt") as opened:
        keys = list(opened.keys())
    kohya = family in ("sd1", "sdxl")
    assert all(key.startswith("lora_unet_" if kohya else "transformer.") for key in keys)
    assert sum(key.endswith(".alpha") for key in keys) == (len(adapter.modules) if kohya else 0)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "`models/loras`" in card


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
        ({"summary": "runs in /home/somebody/runs/x"}, ConfigError, "would publish an absolute path"),
        ({"summary": "runs on Lonely-Host, alone"}, ConfigError, "this machine's name"),
        ({"title": f"key {TOKEN}"}, ConfigError, "title would publish a token"),
        ({"token": "plain-words-secret", "summary": "plain-words-secret"}, ConfigError, "would publish a token"),
    ],
)
def test_publishing_refuses_options_out_of_range_and_private_text(file, tmp_path, monkeypatch, options, kind, message):
    monkeypatch.setattr("socket.gethostname", lambda: "lonely-host.example.org")
    with pytest.raises(kind, match=message):
        dry_run(file, tmp_path / "out", **options)


def test_publishing_refuses_adapters_that_loading_would_refuse(file, tmp_path, sd1):
    adapter = random_adapter(sd1)
    with pytest.raises(InvalidAdapterError, match="which architecture"):
        dry_run(Adapter(adapter.modules), tmp_path)
    with pytest.raises(InvalidAdapterError, match="text encoders only"):
        dry_run(random_adapter(sd1, components=("text_encoder",)), tmp_path)
    with pytest.raises(AdapterError, match="cut off"):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(file.read_bytes()[:-10])
        dry_run(cut, tmp_path)
    with pytest.raises(AdapterError, match="another base"):
        dry_run(file, tmp_path / "out", pipe=fresh("sd1", width=64))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt"):
        dry_run(file, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_results_are_those_of_the_file_that_was_measured(file, summary, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / file.name).write_bytes(file.read_bytes())
    dry_run(folder, tmp_path / "by-folder", results=summary)
    other = write_adapter(random_adapter(fresh("sd1"), seed=3), tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="this adapter is not among them"):
        dry_run(other, tmp_path / "out", results=summary)
    with pytest.raises(ConfigError, match="dpo is not this adapter there"):
        dry_run(file, tmp_path / "out", results=summary, system="dpo")
    with pytest.raises(ConfigError, match="results belong to a file"):
        dry_run(read_adapter(file), tmp_path / "out", results=summary)
    content = json.loads(summary.read_text(encoding="utf-8"))
    content["metadata"]["systems"]["half"] = content["metadata"]["systems"]["spo"]
    summary.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="measured this adapter as spo, half; say which"):
        dry_run(file, tmp_path / "out", results=summary)
    for broken in ("[]", "{}", json.dumps(content | {"systems": {}}), "{"):
        summary.write_text(broken, encoding="utf-8")
        with pytest.raises(ConfigError, match="summary.json"):
            dry_run(file, tmp_path / "out", results=summary, system="spo")
