"""A training step here against the arrangement of the public Diffusion-DPO examples, interleaved in one process.

The public arrangement (DiffusionDPO, SafetyDPO): images are decoded, encoded by the autoencoder and captions by the
text encoder in every step, and the reference is a second UNet. Here latents and text embeddings are cached and the
reference is the same UNet with its adapter switched off; `stored errors` also stores the errors of the reference. Same
weights, LoRA, batch and optimiser; random weights in the shape of the bundled pipeline (`sticker-shape`), or of Stable
Diffusion 1.5 at a quarter of its width (`sd15-shape`), where autoencoder and text encoder weigh what they really do.

    python benchmarks/bench_train_step.py
    python benchmarks/bench_train_step.py --pipeline sd15-shape --resolution 256 --batch 1 --rounds 5
"""

from __future__ import annotations

import argparse
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from t2i_spo_plugin.data import PAIR_COLUMNS, write_table
from t2i_spo_plugin.registry import load_pipeline
from t2i_spo_plugin.training.data.batches import Batches, Sampling
from t2i_spo_plugin.training.data.caches import (
    ShardStore,
    build_latents,
    build_text,
    decode_square,
    encode_latents,
    posterior_sample,
)
from t2i_spo_plugin.training.data.dataset import images
from t2i_spo_plugin.training.families import Family, family_of
from t2i_spo_plugin.training.lora import fresh_adapter
from t2i_spo_plugin.training.objectives import DPOOptions, make_objective
from t2i_spo_plugin.training.objectives.losses import diffusion_dpo_loss, per_sample_error
from t2i_spo_plugin.training.predictor import Predictor, StoredErrors
from t2i_spo_plugin.training.step import TrainingStep


BETA = 500.0
WINNER_ERROR = 3
"""Its place among what a step logs."""


def random_pipeline(shape: str) -> Any:
    """A pipeline of random weights: `sticker-shape` or `sd15-shape`."""
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    small = shape == "sticker-shape"
    length, width = (32, 128) if small else (77, 192)
    symbols = [chr(code) for code in range(33, 127)]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=length)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2 if small else 12,
        num_attention_heads=4, max_position_embeddings=length, projection_dim=width,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if small:
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=8, out_channels=8, block_out_channels=(96, 192), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=width,
            attention_head_dim=32, norm_num_groups=16, use_linear_projection=True,
        )  # fmt: skip
        vae: Any = AutoencoderTiny(
            latent_channels=8, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
            num_encoder_blocks=(0, 1, 2, 2), num_decoder_blocks=(2, 2, 1, 1),
        )  # fmt: skip
    else:
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=(80, 160, 320, 320), cross_attention_dim=width, norm_num_groups=16
        )
        vae = AutoencoderKL(
            block_out_channels=(32, 64, 128, 128), down_block_types=("DownEncoderBlock2D",) * 4, layers_per_block=2,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
        )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2" if small else "scaled_linear", clip_sample=False, steps_offset=1,
        prediction_type="v_prediction" if small else "epsilon", rescale_betas_zero_snr=small,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer, unet=unet.eval(),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def make_pairs(path: Path, count: int, size: int) -> Path:
    """A pair table of random images."""
    random = np.random.default_rng(0)

    def png() -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    rows = [
        {
            "caption": f"an image of thing number {number}",
            "jpg_0": png(),
            "jpg_1": png(),
            "label_0": 1.0,
            "label_1": 0.0,
            "safety_cost_0": 0.1,
            "safety_cost_1": 0.9,
            "quality_0": 0.8,
            "quality_1": 0.5,
            "pair_kind": "harmful_safe_over_unsafe",
        }  # fmt: skip
        for number in range(count)
    ]
    return write_table(rows, path, PAIR_COLUMNS)


class PublicStep:
    """The public examples' step over the pairs that ours draws at the same place."""

    def __init__(
        self, pipe: Any, family: Family, reference: Any, batches: Batches, files: dict[str, bytes], resolution: int
    ) -> None:
        self.pipe, self.family, self.reference = pipe, family, reference
        self.batches, self.files, self.resolution = batches, files, resolution

    def __call__(self, step: int, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
        batch, examples, family = self.batches.at(step, positions), self.batches.examples, self.family
        keys = [side[number] for side in examples.images for number in batch.examples]
        pixels = torch.cat([decode_square(self.files[key], self.resolution) for key in keys])
        latents = family.scaled(posterior_sample(encode_latents(self.pipe.vae, pixels), None))
        text = family.encode_prompts(self.pipe, [examples.captions[number] for number in batch.examples], "cpu")
        text = {name: torch.cat((values, values)) for name, values in text.items()}
        noise, index = batch.noise.flatten(0, 1), batch.index.flatten()
        noisy, target = family.schedule.noised(latents, noise, index), family.schedule.target(latents, noise, index)
        prediction = family.predict(family.module, noisy, index, text, self.resolution)
        with torch.no_grad():
            base = family.predict(self.reference, noisy, index, text, self.resolution)
        err_w, err_l = per_sample_error(prediction, target).chunk(2)
        ref_w, ref_l = per_sample_error(base, target).chunk(2)
        return diffusion_dpo_loss(err_w, err_l, ref_w, ref_l, BETA).mean(), err_w.detach().mean()


def timed(step: Callable[..., Any], optimizer: torch.optim.Optimizer, number: int, size: int) -> tuple[float, float]:
    start = time.perf_counter()
    loss, _ = step(number, range(number * size, (number + 1) * size))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="sticker-shape", help="or sd15-shape, sticker, a folder")
    parser.add_argument("--batch", type=int, default=12, help="pairs a step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--resolution", type=int, default=64)
    args = parser.parse_args()
    pipe = random_pipeline(args.pipeline) if args.pipeline.endswith("-shape") else load_pipeline(args.pipeline)
    pipe.unet.requires_grad_(False)
    reference = copy.deepcopy(pipe.unet)
    with tempfile.TemporaryDirectory() as folder:
        pairs = make_pairs(Path(folder) / "pairs.parquet", 4 * args.batch, args.resolution)
        objective = make_objective(DPOOptions(beta=BETA))
        examples = objective.read(pairs)
        family, device = family_of(pipe), torch.device("cpu")
        latents, text = ShardStore(Path(folder) / "latents"), ShardStore(Path(folder) / "text")
        build_latents(latents, images(pairs), pipe.vae, args.resolution, progress=False)
        prompts = ["", *examples.captions]
        build_text(text, prompts, lambda some: family.encode_prompts(pipe, some, device), progress=False)
        files = {image.key: image.data for image in images(pairs)}
        with fresh_adapter(pipe.unet, "bench", family.targets, 8, 8.0, 0):
            optimizer = torch.optim.AdamW([v for v in pipe.unet.parameters() if v.requires_grad], lr=1e-6)

            def ours(draws_per_pair: int) -> TrainingStep:
                sampling = Sampling(0, (0, len(family.schedule)), draws_per_pair=draws_per_pair)
                batches = Batches(sampling, examples, latents, text, family, device)
                predictor = Predictor(family, family.module, args.resolution, nullcontext)
                stored = StoredErrors(len(examples), draws_per_pair, 2) if draws_per_pair else None
                return TrainingStep(objective, {}, batches, predictor, stored)

            fresh = ours(0)
            steps: dict[str, Callable[..., Any]] = {
                "public arrangement": PublicStep(pipe, family, reference, fresh.batches, files, args.resolution),
                "ours": fresh,
                "ours, stored errors": ours(1),
            }
            _check_equal(steps, args.batch)
            times: dict[str, list[float]] = {name: [] for name in steps}
            # Four rounds walk through all pairs: from then on the reference's errors are known.
            for number in range(4 + args.rounds):
                for name, step in steps.items():
                    seconds, _ = timed(step, optimizer, number, args.batch)
                    if number >= 4:
                        times[name].append(seconds)
    first = times["public arrangement"]
    print(f"{args.batch} pairs a step, {args.rounds} rounds, {torch.get_num_threads()} thread(s), medians")
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(first, values, strict=True))
        print(f"{name:20s} {statistics.median(values):7.3f} s/step   x{ratio:.2f}")


def _check_equal(steps: dict[str, Callable[..., Any]], size: int) -> None:
    """Both arrangements see the same pairs with the same noise: their winners' errors must agree, up to the
    autoencoder's own noise, which only ours draws."""
    (_, public), (_, stats) = (steps[name](0, range(size)) for name in ("public arrangement", "ours"))
    if abs(float(public) - float(stats[WINNER_ERROR])) > 1e-2 * float(public):
        raise SystemExit(f"the arrangements differ: winners' error {float(public)} and {float(stats[WINNER_ERROR])}")


if __name__ == "__main__":
    main()
