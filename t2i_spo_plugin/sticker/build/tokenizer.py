"""A CLIP tokenizer of words that the sticker world needs: byte-level BPE, lower case, end-of-word mark."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer


MAX_LENGTH = 32
# As CLIP's own tokenizer parts a text.
_PARTS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def learn_tokenizer(captions: Sequence[str], vocabulary: Sequence[str], limit: int = 30_000) -> CLIPTokenizer:
    """A BPE in which the words of `captions` and of `vocabulary` are whole tokens, as far as `limit` allows."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PARTS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    counts = Counter(part for caption in captions for part in caption.lower().split())
    # Misspellings are rare words; as whole tokens they would teach nothing about other misspellings.
    corpus = [word for word, n in counts.items() if n >= 8 for _ in range(4)] + list(vocabulary)
    trainer = trainers.BpeTrainer(
        vocab_size=limit,
        min_frequency=1,
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


def token_texts(tokenizer: CLIPTokenizer) -> list[str]:
    """The text of every token, by its id; empty for the special tokens and for bytes that are no text of their own."""
    from tokenizers.decoders import ByteLevel

    decoder = ByteLevel()
    special = {tokenizer.bos_token, tokenizer.eos_token}
    texts = [""] * len(tokenizer)
    for token, n in tokenizer.get_vocab().items():
        text = decoder.decode([token.removesuffix("</w>")])
        texts[n] = "" if token in special or "\ufffd" in text else text
    return texts


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
