"""`load_spo_lora` against `load_lora_weights` on one file: interleaved in one process, as a ratio.

The UNet has the depth and the module names of Stable Diffusion 1.5 and is narrower, so that the time is spent on
what both have to do for every module. Unloading is timed apart.

    python benchmarks/bench_load.py [--rounds 9] [--width 64] [--rank 16]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from t2i_spo_plugin import Adapter, LoraPair, adapter_metadata, load_spo_lora, unload_spo_lora, write_adapter
from t2i_spo_plugin.adapters.architecture import weight_shapes


LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")


def random_pipeline(width: int) -> Any:
    """A StableDiffusionPipeline of the real depth with random weights; `width` are the channels of its first block."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    symbols = [chr(code) for code in range(33, 127)]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=numbers, merges=[], model_max_length=32)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(width, 2 * width, 4 * width, 4 * width), cross_attention_dim=128
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderTiny(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_adapter(pipe: Any, rank: int) -> Adapter:
    modules = {}
    for path, (out, *inner) in weight_shapes(pipe.unet).items():
        if path.endswith(LAYERS):
            up = torch.randn(out, rank, *(1,) * (len(inner) - 1))
            modules[f"unet.{path}"] = LoraPair(torch.randn(rank, *inner).half(), up.half(), rank / 2)
    return Adapter(modules, adapter_metadata(pipe))


def timed(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    diffusers_logging.set_verbosity_error()
    pipe = random_pipeline(options.width)
    adapter = random_adapter(pipe, options.rank)
    times: dict[str, list[float]] = {
        "load_lora_weights": [],
        "load_spo_lora": [],
        "unload_lora_weights": [],
        "unload_spo_lora": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(adapter, Path(folder) / "adapter.safetensors")
        for number in range(options.rounds + 1):
            taken = {
                "load_lora_weights": timed(lambda: pipe.load_lora_weights(path)),
                "unload_lora_weights": timed(pipe.unload_lora_weights),
                "load_spo_lora": timed(lambda: load_spo_lora(pipe, path)),
                "unload_spo_lora": timed(lambda: unload_spo_lora(pipe)),
            }
            if number:
                for name, seconds in taken.items():
                    times[name].append(seconds)
    print(f"{len(adapter.modules)} modules of rank {options.rank}, median of {options.rounds} rounds")
    for ours, theirs in (("load_spo_lora", "load_lora_weights"), ("unload_spo_lora", "unload_lora_weights")):
        ratio = statistics.median(own / ref for own, ref in zip(times[ours], times[theirs], strict=True))
        print(f"{ours:<17}{statistics.median(times[ours]):8.3f} s   {ratio:6.3f} x {theirs}")


if __name__ == "__main__":
    main()
