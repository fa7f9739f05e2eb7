"""The commands about adapter files, and the doctor: files in, files out, plain words."""

import importlib
import importlib.metadata
import json

import pytest
import torch
from support.pipelines import fresh, random_adapter

from t2i_spo_plugin import cli, sticker
from t2i_spo_plugin.adapters import read_adapter, write_adapter
from t2i_spo_plugin.cli import doctor


@pytest.fixture
def files(tmp_path, sd1):
    return [
        write_adapter(random_adapter(sd1, seed=seed), tmp_path / f"{name}.safetensors")
        for seed, name in enumerate(("knives", "blood"))
    ]


def test_inspect_prints_one_json_object_when_asked(files, capsys):
    assert cli.main(["inspect", str(files[0]), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["layout"], printed["ranks"], printed["alphas"], printed["loads"]) == ("kohya", [4], [2.0], True)
    assert printed["block_norms"].keys() >= {"unet.mid_block.attentions.0"}


def test_inspect_prints_warnings(files, capsys, tmp_path):
    text = random_adapter(fresh("sd1"), components=("unet", "text_encoder"))
    assert cli.main(["inspect", str(write_adapter(text, tmp_path / "text.safetensors"))]) == 0
    printed = capsys.readouterr().out
    assert "warning: it changes text_encoder too" in printed and "unet.down_blocks.1" in printed


def test_merge_writes_one_adapter(files, tmp_path, capsys):
    out = tmp_path / "all.safetensors"
    paths = [str(path) for path in files]
    assert cli.main(["merge", *paths, "--weights", "1", "0.5", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: " in printed and "rank 8" in printed and "relative error 0.00e+00" in printed
    merged = read_adapter(out)
    first, second = (read_adapter(path) for path in files)
    for name, pair in merged.modules.items():
        expected = first.modules[name].delta() + 0.5 * second.modules[name].delta()
        assert torch.allclose(pair.delta(), expected, atol=1e-5)
    assert json.loads(merged.metadata.extra["merged_from"]) == ["knives", "blood"]
    assert cli.main(["merge", *paths, "--method", "svd", "--rank", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "rank 2" in printed and "  unet." in printed
    assert cli.main(["merge", *paths, "--weights", "1", "-1", "--out", str(out)]) == 2
    assert "at least 0, got -1.0" in capsys.readouterr().err


def test_extract_writes_an_adapter_and_says_what_it_cannot_hold(tmp_path, capsys):
    pipe, adapter = fresh("sd1"), random_adapter(fresh("sd1"))
    pipe.unet.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, pair in adapter.modules.items():
            pipe.unet.get_submodule(name.removeprefix("unet.")).weight.add_(pair.delta())
        pipe.unet.conv_norm_out.weight.mul_(2.0)
    pipe.unet.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out.safetensors"
    words = ["extract", str(tmp_path / "base"), str(tmp_path / "tuned"), "--rank", "4", "--out", str(out)]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    assert "rank 4" in captured.out and "relative error" in captured.out and "comparing" in captured.err
    assert "1 weights changed that no LoRA can change" in captured.out and "unet.conv_norm_out.weight" in captured.out
    back = read_adapter(out)
    assert back.modules.keys() == adapter.modules.keys()
    assert all(torch.allclose(back.modules[name].delta(), p.delta(), atol=1e-4) for name, p in adapter.modules.items())


def test_convert_writes_another_layout(files, tmp_path, capsys):
    adapter = read_adapter(files[0])
    for layout, out in (("diffusers", "d.safetensors"), ("peft", "folder"), ("native", "n.safetensors")):
        assert cli.main(["convert", str(files[0]), "--layout", layout, "--out", str(tmp_path / out)]) == 0
        assert str(tmp_path / out) in capsys.readouterr().out
        back = read_adapter(tmp_path / out)
        assert all(torch.allclose(back.modules[n].delta(), p.delta(), atol=1e-6) for n, p in adapter.modules.items())
    words = ["convert", str(files[0]), "--layout", "kohya", "--out", str(tmp_path / "k.safetensors")]
    assert cli.main([*words, "--architecture", "flux-1-dev"]) == 2
    assert "made for stable-diffusion-v1, not for flux-1-dev" in capsys.readouterr().err


def test_every_writing_command_takes_a_type(files, tmp_path, capsys):
    base, tuned = fresh("sd1"), fresh("sd1")
    base.unet.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.unet.conv_in.weight.add_(0.1)
    tuned.unet.save_pretrained(tmp_path / "tuned")
    sources = {
        "merge": [str(path) for path in files],
        "convert": [str(files[0]), "--layout", "kohya"],
        "extract": [str(tmp_path / "base"), str(tmp_path / "tuned")],
    }
    for command, words in sources.items():
        out = tmp_path / f"{command}.safetensors"
        assert cli.main([command, *words, "--dtype", "bfloat16", "--out", str(out)]) == 0, command
        assert {pair.up.dtype for pair in read_adapter(out).modules.values()} == {torch.bfloat16}
        with pytest.raises(SystemExit):
            cli.main([command, *words, "--dtype", "int8", "--out", str(out)])


def check_named(checks, name):
    (check,) = [check for check in checks if check.name == name]
    return check


def failing(broken, message="no such operator"):
    def import_module(name):
        if name == broken:
            raise RuntimeError(message)
        return importlib.import_module(name)

    return import_module


@pytest.fixture
def versions(monkeypatch):
    """Versions of distributions that a test may invent or take away."""
    invented, original = {}, importlib.metadata.version

    def version(name):
        if name in invented and invented[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return invented.get(name) or original(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return invented


def test_the_doctor_reports_no_fault_in_this_environment(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    names = {check["name"] for check in checks}
    assert names >= {"python", "torch", "diffusers", "tyro", "torchvision", "xformers", "cpu", "[nudenet]", "[train]"}
    assert cli.main(["doctor"]) == 0
    assert "torch " in capsys.readouterr().out


def test_the_doctor_names_what_is_missing_too_old_or_does_not_import(versions):
    versions |= {"tyro": None, "peft": "0.9.1"}
    checks = doctor.examine(failing("transformers", "a bad build\nmore"))
    assert check_named(checks, "tyro").detail == "not installed; needed is 0.9 or newer"
    assert check_named(checks, "peft").detail == "0.9.1 is too old; needed is 0.15 or newer"
    assert check_named(checks, "transformers").detail.endswith("does not import: RuntimeError: a bad build")
    assert {check.name for check in doctor.broken(checks)} == {"tyro", "peft", "transformers"}


def test_the_doctor_passes_over_requirements_whose_marker_does_not_apply(monkeypatch):
    never, always = "python_version < '3.0'", "python_version >= '3.0'"
    lines = [
        f"no-such-package-1>=1.0; {never}",
        f"no-such-package-2>=1.0; {always}",
        f"no-such-package-3>=1.0; {never} and extra == 'owen'",
        f"numpy>=1.24; {always} and extra == 'owen'",
        "no-such-package-4<9,>=2; extra == 'ray'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    checks = doctor.examine()
    details = {check.name: check.detail for check in checks}
    assert "no-such-package-1" not in details
    assert details["no-such-package-2"] == "not installed; needed is 1.0 or newer"
    assert details["[owen]"] == "installed"
    assert details["[ray]"].startswith("no-such-package-4 not installed")
    assert [check.name for check in doctor.broken(checks)] == ["no-such-package-2"]


def test_the_doctor_takes_builds_and_pre_releases_for_what_they_are(versions):
    versions |= {"torch": "2.4.0+cpu", "peft": "0.15.0.dev0", "diffusers": "0.34.0.dev0"}
    statuses = {check.name: check.status for check in doctor.examine()}
    assert (statuses["torch"], statuses["peft"], statuses["diffusers"]) == ("ok", "broken", "ok")


@pytest.mark.parametrize("name", ["torchvision", "xformers"])
def test_the_doctor_advises_on_packages_that_break_the_libraries(name, versions):
    versions[name] = "0.1"
    check = check_named(doctor.examine(failing(name)), name)
    assert check.status == "broken" and "no such operator" in check.detail and "Uninstall it" in check.detail
    versions[name] = None
    assert check_named(doctor.examine(failing(name)), name).status == "ok"


def test_the_doctor_reports_bundled_files_that_are_missing(tmp_path, monkeypatch):
    assert check_named(doctor.examine(), "sticker world").status == "ok"
    monkeypatch.setattr(sticker, "FOLDER", tmp_path)
    check = check_named(doctor.examine(), "sticker world")
    assert check.status == "broken" and "lacks the bundled pipeline" in check.detail


def test_an_extra_that_is_not_there_is_a_note_with_its_cure(versions):
    versions["nudenet"] = None
    check = check_named(doctor.examine(), "[nudenet]")
    assert check.status == "note" and "pip install 't2i_spo_plugin[nudenet]'" in check.detail


def test_a_broken_environment_has_exit_code_2(versions, capsys):
    versions["tyro"] = "0.1"
    assert cli.main(["doctor", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "spo: broken: tyro\n" and json.loads(captured.out)
