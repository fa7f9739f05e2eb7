"""Tiny random vision-language models of the real classes, saved as real ones lie in a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

import t2i_spo_plugin.cost.chat as chat


SPECIAL = ("<unk>", "<pad>", "<s>", "</s>", "<image>", "<boi>", "<eoi>")
EDGE, PATCH = 28, 14


def word_tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """A token for each word of the package's questions and policies."""
    files = sorted(chat.TEMPLATES.parent.glob("*.yaml"))
    text = " ".join(file.read_text(encoding="utf-8") for file in files)
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", text)) | {"Yes", "No", "yes", "no"})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=4096, **tokens, **special)


def tiny_llava(folder: Path, seed: int = 0) -> tuple[Any, Any]:
    """A LLaVA of two small layers in `folder`: the model and its processor."""
    tokenizer = word_tokenizer(additional_special_tokens=["<image>"])
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": EDGE, "patch_size": PATCH, **small},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, **small},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    size = {"height": EDGE, "width": EDGE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}Answer :{% endif %}",
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
