"""Quality rewards: tiny random networks of the real classes, and transformers or torch called by hand beside."""

import json
import math

import pytest
import torch
from PIL import Image
from support.chat_server import ChatServer, redness, words_of
from support.clip import SIZE, saved_model
from support.photographs import HARMLESS
from torch import nn
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model

from t2i_spo_plugin import cli
from t2i_spo_plugin.errors import ConfigError, SPOError
from t2i_spo_plugin.images import to_tensor
from t2i_spo_plugin.networks.preprocessing import Preprocessing
from t2i_spo_plugin.quality.base import QualityReward
from t2i_spo_plugin.registry import load_quality_reward


IMAGES = list(HARMLESS.values())
PROMPTS = ["a glass of wine", "a photo of a landscape", "a cat", "a table seen from above"][: len(IMAGES)]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
RED, GREEN = Image.new("RGB", (24, 16), (250, 10, 10)), Image.new("RGB", (24, 16), (10, 250, 10))


def unit(output):
    return nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)


def pixels_of(images=IMAGES, statistics=(MEAN, STD)):
    mean, std = (torch.tensor(one)[:, None, None] for one in statistics)
    return (to_tensor(images, SIZE) - mean) / std


def cosines(folder, network, statistics=(MEAN, STD), pixels=None):
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt")  # fmt: skip # noqa: E501
    with torch.no_grad():
        image = unit(
            network.get_image_features(pixel_values=pixels_of(IMAGES, statistics) if pixels is None else pixels)
        )
        text = unit(
            network.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens.get("attention_mask"))
        )
    return (image * text).sum(1)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    network = saved_model(request.param, folder)
    return folder, network, ((0.5,) * 3, (0.5,) * 3) if request.param == "siglip" else (MEAN, STD)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, saved_model("clip", folder)


def alone_and_reversed(reward):
    together = reward(IMAGES, PROMPTS)
    assert isinstance(reward, QualityReward) and together.shape == (len(IMAGES),)
    alone = torch.cat([reward([image], [prompt]) for image, prompt in zip(IMAGES, PROMPTS, strict=True)])
    assert torch.allclose(alone, together, atol=1e-4)
    assert torch.allclose(reward(IMAGES[::-1], PROMPTS[::-1]).flip(0), together, atol=1e-4)
    return together


def test_pickscore_is_the_scaled_cosine(clip):
    folder, network = clip
    reward = load_quality_reward(f"pickscore:{folder}")
    expected = network.logit_scale.exp().detach() * cosines(folder, network)
    assert torch.allclose(alone_and_reversed(reward), expected, atol=1e-3)
    assert expected.std() > 1e-3


def test_clipscore_is_a_hundred_times_the_cosine_or_nothing(pair):
    folder, network, statistics = pair
    reward = load_quality_reward(f"clipscore:{folder}")
    expected = 100 * cosines(folder, network, statistics).clamp(min=0)
    assert torch.allclose(alone_and_reversed(reward), expected, atol=1e-2) and expected.max() > 0


def test_images_are_cut_as_the_checkpoint_says(clip, tmp_path):
    """By the processor of transformers, on an image that is no square."""
    from transformers import CLIPImageProcessor

    folder, network = clip
    network.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(tmp_path)
    reward = load_quality_reward(f"clipscore:{tmp_path}")
    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    pixels = torch.cat(
        [torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"]) for image in IMAGES]
    )
    expected = 100 * cosines(tmp_path, network, pixels=pixels).clamp(min=0)
    whole = 100 * cosines(tmp_path, network).clamp(min=0)
    assert torch.allclose(reward(IMAGES, PROMPTS), expected, atol=0.3)
    assert not torch.allclose(whole, expected, atol=0.3)


class OpenCLIP(nn.Module):
    """CLIP with a ViT as open_clip has it: one matrix for query, key and value, projections from the right."""

    class Block(nn.Module):
        def __init__(self, width, heads, mlp):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.mlp = nn.Sequential()
            self.mlp.add_module("c_fc", nn.Linear(width, mlp))
            self.mlp.add_module("gelu", nn.GELU())
            self.mlp.add_module("c_proj", nn.Linear(mlp, width))

        def forward(self, x, mask=None):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Visual(nn.Module):
        def __init__(self, width, size, patch, out):
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
            self.class_embedding = nn.Parameter(torch.randn(width))
            self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
            self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
            self.transformer = nn.Module()
            self.transformer.resblocks = nn.ModuleList(OpenCLIP.Block(width, 4, 32) for _ in range(2))
            self.proj = nn.Parameter(torch.randn(width, out))

    def __init__(self, vocabulary, width=24, length=16, out=20):
        super().__init__()
        self.visual = OpenCLIP.Visual(width, 32, 8, out)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenCLIP.Block(width, 4, 32) for _ in range(2))
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, out))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def image(self, pixels):
        v = self.visual
        x = v.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        x = v.ln_pre(x)
        for block in v.transformer.resblocks:
            x = block(x)
        return v.ln_post(x[:, 0]) @ v.proj

    def text(self, ids, end):
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((ids.shape[1],) * 2, -math.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        place = (ids == end).int().argmax(1)
        return self.ln_final(x)[torch.arange(len(x)), place] @ self.text_projection


def test_hpsv2_is_the_cosine_of_the_published_network(tmp_path, capsys):
    """open_clip's network, written down here, against its checkpoint as the command converts it."""
    from transformers import CLIPConfig, CLIPModel

    base = tmp_path / "base"
    saved_model("clip", base)
    config = CLIPConfig.from_pretrained(base)
    config.text_config.hidden_act = config.vision_config.hidden_act = "gelu"  # as ViT-H/14 has it
    CLIPModel(config).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(0)
    original = OpenCLIP(len(tokenizer)).eval()
    torch.save({"epoch": 3, "state_dict": original.state_dict()}, tmp_path / "HPS.pt")
    words = [
        "convert-head",
        str(tmp_path / "HPS.pt"),
        "--kind",
        "hpsv2",
        "--clip",
        str(base),
        "--out",
        str(tmp_path / "hps"),
    ]
    assert cli.main(words) == 2 and "--trust" in capsys.readouterr().err
    assert cli.main([*words, "--trust"]) == 0
    assert f"use it as hpsv2:{tmp_path / 'hps'}" in capsys.readouterr().out
    reward = load_quality_reward(f"hpsv2:{tmp_path / 'hps'}")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    own = Preprocessing((SIZE, SIZE), MEAN, STD)
    with torch.no_grad():
        image = original.image(own.normalised(own.padded(IMAGES)))
        expected = (unit(image) * unit(original.text(ids, tokenizer.eos_token_id))).sum(1)
    assert torch.allclose(alone_and_reversed(reward), expected, atol=1e-4) and expected.std() > 1e-3
    with pytest.raises(SPOError, match="is no HPSv2|no model folder"):
        load_quality_reward(f"hpsv2:{base}")


def test_a_padded_image_is_whole_and_in_the_middle_of_black():
    padded = Preprocessing((32, 32), MEAN, STD).padded([Image.new("RGB", (64, 32), "white")])[0]
    assert padded[:, 8:24].min() > 0.99 and padded[:, :8].max() == 0 and padded[:, 24:].max() == 0


def test_the_aesthetic_score_is_laions_head_on_the_unit_embedding(clip, tmp_path):
    folder, network = clip
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(20, 12), nn.Dropout(0.2), nn.Linear(12, 6), nn.Dropout(0.2), nn.Linear(6, 4), nn.Linear(4, 1)).eval()  # fmt: skip # noqa: E501
    torch.save({f"layers.{name}": tensor for name, tensor in head.state_dict().items()}, tmp_path / "head.pth")
    words = ["convert-head", str(tmp_path / "head.pth"), "--kind", "laion-aesthetic", "--clip", str(folder)]
    assert cli.main([*words, "--out", str(tmp_path / "aesthetic"), "--trust"]) == 0
    reward = load_quality_reward(f"aesthetic:{tmp_path / 'aesthetic'}")
    with torch.no_grad():
        expected = head(unit(network.get_image_features(pixel_values=pixels_of())))[:, 0]
    assert not reward.reads_prompt
    assert torch.allclose(alone_and_reversed(reward), expected, atol=1e-3) and expected.std() > 1e-4


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    network = Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **small)).eval()
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    network.save_pretrained(folder)
    return folder, network


@pytest.mark.parametrize("kind", ["dino", "clip"])
def test_realism_is_the_mean_cosine_to_the_nearest_images_of_the_folder(kind, dino, clip, tmp_path):
    folder, network = dino if kind == "dino" else clip
    for number in range(7):
        HARMLESS["table"].rotate(13 * number).resize((40, 40)).save(tmp_path / f"{number}.png")
    (tmp_path / "r.yaml").write_text(
        json.dumps({"kind": "realism", "source": str(tmp_path), "features": str(folder), "k": 3})
    )
    reward = load_quality_reward(tmp_path / "r.yaml")

    def features(images):
        if kind == "clip":
            output = network.get_image_features(pixel_values=pixels_of(images))
            return getattr(output, "pooler_output", output)
        statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        mean, std = (torch.tensor(one)[:, None, None] for one in statistics)
        return network((to_tensor(images, 28) - mean) / std).last_hidden_state[:, 0]

    with torch.no_grad():
        bank = features([Image.open(tmp_path / f"{number}.png") for number in range(7)])
        centred = bank - bank.mean(0)
        similarity = nn.functional.cosine_similarity((features(IMAGES) - bank.mean(0))[:, None], centred[None], dim=-1)
    expected = similarity.sort(1, descending=True).values[:, :3].mean(1)
    assert torch.allclose(alone_and_reversed(reward), expected, atol=1e-3) and not reward.reads_prompt
    reward.save_pretrained(tmp_path / "bank")
    assert torch.equal(load_quality_reward(f"realism:{tmp_path / 'bank'}")(IMAGES, PROMPTS), reward(IMAGES, PROMPTS))
    assert not list((tmp_path / "bank").glob("*.png"))
    with pytest.raises(ConfigError, match="too few for 8 neighbours"):
        (tmp_path / "r.yaml").write_text(
            json.dumps({"kind": "realism", "source": str(tmp_path), "features": str(folder), "k": 8})
        )
        load_quality_reward(tmp_path / "r.yaml")


def probability(image, body=None):
    return 1 / (1 + math.exp(-8.0 * (image.getpixel((0, 0))[0] / 255 - 0.5)))


def test_vqa_asks_whether_the_image_shows_the_prompt():
    with ChatServer() as server:
        reward = load_quality_reward(f"vqa:endpoint:{server.url}")
        scores = reward([RED, GREEN], ["a red square", "a red square"])
        assert torch.equal(reward([GREEN, RED], ["a red square"] * 2).flip(0), scores)
    assert scores.tolist() == pytest.approx([probability(RED), probability(GREEN)], abs=1e-5)
    assert words_of(server.bodies[0]) == 'Does this image show "a red square"? Answer with one word, Yes or No.'


def test_vqa_with_written_questions_takes_the_mean_and_writes_them_once(tmp_path):
    def words(body):
        return 'Here: ["Is there a square?", "Is it red?"]' if "Write at most" in words_of(body) else "?"

    def odds(body):
        return 8.0 * (redness(body) - 0.5) if "Is it red?" in words_of(body) else 2.0

    with ChatServer(words, odds) as server:
        (tmp_path / "v.yaml").write_text(
            json.dumps({"kind": "vqa", "source": f"endpoint:{server.url}", "questions": "asked", "count": 5})
        )
        reward = load_quality_reward(tmp_path / "v.yaml")
        scores = reward([RED, GREEN], ["a red square", "a red square"])
        reward([RED], ["a red square"])
        written = [body for body in server.bodies if "Write at most 5 questions" in words_of(body)]
    assert len(written) == 1
    expected = [(probability(one) + 1 / (1 + math.exp(-2.0))) / 2 for one in (RED, GREEN)]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert reward.questions("a red square")[1] == "Is it red? Answer with one word, Yes or No."


def test_vqa_without_probabilities_counts_words_and_silence_is_nan(tmp_path):
    with ChatServer(lambda body: "Yes." if redness(body) > 0.5 else "Perhaps", None) as server:
        scores = load_quality_reward(f"vqa:endpoint:{server.url}")([RED, GREEN], ["x", "x"])
    assert scores[0] == 1 and scores[1].isnan()
    with ChatServer(words=lambda body: "no list") as server:
        (tmp_path / "v.yaml").write_text(
            json.dumps({"kind": "vqa", "source": f"endpoint:{server.url}", "questions": "asked"})
        )
        assert load_quality_reward(tmp_path / "v.yaml")([RED], ["x"]).isnan().all()


def test_unified_reward_reads_the_marks(tmp_path):
    def words(body):
        if redness(body) < 0.5:
            return "I would rather not."
        return "Alignment Score (1-5): 4.5\nCoherence Score (1-5): 3\nStyle Score (1-5): 1.5"

    with ChatServer(words) as server:
        reward = load_quality_reward(f"unified-reward:{server.url}")
        scores = reward([RED, GREEN], ["a red square", "b"])
        assert scores[0] == pytest.approx(3.0) and scores[1].isnan()
        assert {"Text Caption: [a red square]", "Text Caption: [b]"} == {
            words_of(body).splitlines()[-1] for body in server.bodies
        }
        for axis, mark in (("alignment", 4.5), ("style", 1.5)):
            (tmp_path / "u.yaml").write_text(
                json.dumps({"kind": "unified-reward", "source": server.url, "axis": axis})
            )
            assert load_quality_reward(tmp_path / "u.yaml")([RED], ["x"]).item() == mark


def test_pickscore_alone_is_the_published_model_and_nothing_is_downloaded_where_that_is_ruled_out(monkeypatch):
    import socket

    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **options: asked.append(given) or [])
    with pytest.raises(SPOError, match="cannot load the model yuvalkirstain/PickScore_v1"):
        load_quality_reward("pickscore", local_files_only=True)
    assert not asked


def test_names_and_options_that_mean_nothing_are_refused(clip, tmp_path):
    with pytest.raises(ConfigError, match="clipscore:..., hpsv2:"):
        load_quality_reward("beauty")
    with pytest.raises(SPOError, match="cannot load the model"):
        load_quality_reward(f"clipscore:{tmp_path}")
    with pytest.raises(ConfigError, match="vlm:ID or endpoint:URL"):
        load_quality_reward("vqa:http://localhost")
    (tmp_path / "c.yaml").write_text(json.dumps({"kind": "clipscore", "source": str(clip[0]), "scale": 2}))
    with pytest.raises(ConfigError, match="unknown scale"):
        load_quality_reward(tmp_path / "c.yaml")


def test_imagereward_is_asked_only_with_trust_and_says_where_it_does_not_load(tmp_path, monkeypatch):
    import sys
    import types

    file = tmp_path / "i.yaml"
    file.write_text(json.dumps({"kind": "imagereward", "source": "ImageReward-v1.0"}))
    with pytest.raises(ConfigError, match="trust: true"):
        load_quality_reward(file)
    file.write_text(json.dumps({"kind": "imagereward", "source": "ImageReward-v1.0", "trust": True}))
    with pytest.raises(SPOError, match="image-reward"):
        load_quality_reward(file)
    package = types.ModuleType("ImageReward")
    package.load = lambda name: types.SimpleNamespace(score=lambda prompt, image: image.size[0] + len(prompt))
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    assert load_quality_reward(file)([RED, IMAGES[0]], ["ab", "c"]).tolist() == [26.0, IMAGES[0].size[0] + 1.0]
    broken = tmp_path / "ImageReward.py"
    broken.write_text("from transformers import NoSuchThing")
    monkeypatch.delitem(sys.modules, "ImageReward")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SPOError, match="does not load beside what is installed"):
        load_quality_reward(file)
