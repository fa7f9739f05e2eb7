"""Published heads: pickles stay closed without a word, and the converted model computes what the original does."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from support.clip import saved_model
from support.photographs import HARMLESS
from torch import nn

from t2i_spo_plugin import cli, load_cost_model
from t2i_spo_plugin.errors import ConfigError, UnreadableFileError
from t2i_spo_plugin.images import to_tensor
from t2i_spo_plugin.networks.pickles import read_foreign_tensors


IMAGES = list(HARMLESS.values())
WIDTH = 20  # of the tiny CLIP's embedding


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    network = saved_model("clip", folder)
    pixels = (to_tensor(IMAGES, 32) - torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )[:, None, None]
    with torch.no_grad():
        output = network.get_image_features(pixel_values=pixels)
    return folder, getattr(output, "pooler_output", output)


def convert(kind, clip, out, *files, trust=True):
    words = ["convert-head", *map(str, files), "--kind", kind, "--clip", str(clip[0]), "--out", str(out)]
    return cli.main([*words, *(["--trust"] if trust else [])])


def random_state(module, seed=0):
    torch.manual_seed(seed)
    for name, value in module.state_dict().items():
        value.copy_(torch.rand(value.shape) + 0.5 if "var" in name else torch.randn(value.shape) * 0.5)
    return module.eval()


def test_q16_is_the_softmax_at_scale_100_of_the_two_prompts(clip, tmp_path):
    prompts = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(prompts.numpy()))
    assert convert("q16", clip, tmp_path / "q16", tmp_path / "prompts.p") == 0
    model = load_cost_model(tmp_path / "q16")
    image, text = (nn.functional.normalize(value, dim=-1) for value in (clip[1], prompts))
    expected = (100.0 * image @ text.T).softmax(-1)[:, 1]
    assert model.categories == ("inappropriate",)
    assert torch.allclose(model(IMAGES).logits[:, 0].sigmoid(), expected, atol=1e-4)


def test_mhsc_is_its_own_network_a_head_each(clip, tmp_path):
    heads = {}
    for seed, name in enumerate(("sexual", "violent")):
        layers = nn.Sequential(nn.Linear(WIDTH, 9), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(9), nn.Linear(9, 1))
        heads[name] = random_state(layers, seed)
        torch.save(heads[name].state_dict(), tmp_path / f"{name}.pt")
    assert convert("mhsc", clip, tmp_path / "mhsc", tmp_path / "sexual.pt", tmp_path / "violent.pt") == 0
    model = load_cost_model(tmp_path / "mhsc")
    expected = torch.cat([head(clip[1]) for head in heads.values()], 1).detach()
    batch = model(IMAGES)
    assert model.categories == ("sexual", "violent") and batch.logit_map is None
    assert torch.allclose(batch.logits, expected, atol=1e-4)
    assert torch.allclose(torch.cat([model(one).logits for one in IMAGES[::-1]]).flip(0), batch.logits, atol=1e-5)
    assert model.score_tensor(to_tensor(IMAGES, 32).requires_grad_()).logits.requires_grad


def test_laions_detector_is_its_own_network_on_the_unit_embedding(clip, tmp_path):
    layers = nn.Sequential(
        nn.Linear(WIDTH, 12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 6), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(6, 4), nn.Linear(4, 1),
    )  # fmt: skip
    random_state(layers)
    layers[-1].bias.data += 0.5 - layers(nn.functional.normalize(clip[1], dim=-1)).mean()
    save_file({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}, tmp_path / "h.safetensors")
    # Safetensors need no trust.
    assert convert("laion-nsfw", clip, tmp_path / "laion", tmp_path / "h.safetensors", trust=False) == 0
    expected = layers(nn.functional.normalize(clip[1], dim=-1)).detach().clamp(1e-4, 1 - 1e-4)
    assert torch.allclose(load_cost_model(tmp_path / "laion")(IMAGES).logits.sigmoid(), expected, atol=1e-4)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_no_pickle_is_opened_without_a_word_and_none_ever_runs(clip, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.p").write_bytes(pickle.dumps(torch.zeros(2, WIDTH).numpy()))
    assert convert("q16", clip, tmp_path / "out", tmp_path / "prompts.p", trust=False) == 2
    message = capsys.readouterr().err
    assert "is a pickle" in message and "--trust" in message and not (tmp_path / "out").exists()
    (tmp_path / "bomb.p").write_bytes(pickle.dumps({"x": _Bomb()}))
    torch.save({"x": _Bomb()}, tmp_path / "bomb.pt")
    for name in ("bomb.p", "bomb.pt"):
        assert convert("q16", clip, tmp_path / "out", tmp_path / name) == 2
        message = capsys.readouterr().err
        assert "posix.mkdir, which no tensor needs" in message and len(message.splitlines()) == 1
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ConfigError, match="say --trust"):
        read_foreign_tensors(tmp_path / "bomb.p")


def test_what_is_no_such_head_is_refused(clip, tmp_path, capsys):
    save_file({"0.weight": torch.zeros(1, 7), "0.bias": torch.zeros(1)}, tmp_path / "sexual.safetensors")
    for kind, file, message in (
        ("mhsc", "sexual.safetensors", "name the CLIP model that the heads were trained on"),
        ("q16", "sexual.safetensors", "holds no two prompts"),
        ("mhsc", "nothing.pt", "there is no file"),
    ):
        assert convert(kind, clip, tmp_path / "out", tmp_path / file) == 2
        assert message in capsys.readouterr().err
    save_file({"0.weight": torch.zeros(2, 20), "0.bias": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(UnreadableFileError, match="no head with one output"):
        from t2i_spo_plugin.cost import convert_cost_head

        convert_cost_head("mhsc", [tmp_path / "two.safetensors"], clip[0])
