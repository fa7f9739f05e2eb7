"""Train the bundled generator: an ordinary ``StableDiffusionPipeline`` for the declared subset of the world.

``python -m t2i_spo_plugin.sticker.build.generator`` needs the autoencoder and the text encoder of this folder; it
encodes
its scenes once, trains UNet and text encoder together, and stops and resumes anywhere. Velocity prediction, cosine
schedule rescaled to zero terminal SNR, 10 % empty captions, averaged weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from ..world import GENERATOR_CONCEPTS, GENERATOR_STYLES, Description, describe, render
from .loop import LoopConfig, LoopState, Trainer
from .report import write_report
from .text import WIDTH, tokens, write_classic_files, write_classic_names


BATCH = 40
STEPS = 25
GUIDANCE = 3.0


def unet(seed: int = 0) -> UNet2DConditionModel:
    """The untrained UNet, on latents of 8 channels, 8 x 8."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(64, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=32,
        norm_num_groups=16,
        use_linear_projection=True,
    )


def scheduler() -> DDIMScheduler:
    """Cosine betas, zero terminal SNR, velocity prediction, trailing steps."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def assemble(
    vae: AutoencoderTiny, text: CLIPTextModel, tokenizer: CLIPTokenizer, net: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The pipeline as it ships: no safety checker, for a guard is not a part of the model."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=net,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def encode(vae: AutoencoderTiny, count: int, out: Path) -> tuple[torch.Tensor, list[str]]:
    """Latents ``[count, 8, 8, 8]`` (unscaled, fp16) and captions of ``count`` training scenes, kept in ``out``."""
    if out.is_file():
        captions = json.loads(out.with_suffix(".json").read_text())
        if len(captions) >= count:
            return load_file(out)["latents"][:count], captions[:count]
    latents, captions = [], []
    for start in tqdm(range(0, count, 100), desc="encode", mininterval=10):
        images = []
        for seed in range(start, min(start + 100, count)):
            described = describe(seed, "train", concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES)
            images.append(render(described, seed, aligned=True)[0])
            captions.append(described.caption)
        x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append(vae.encoder(x.contiguous(memory_format=torch.channels_last)).half())
    out.parent.mkdir(parents=True, exist_ok=True)
    stacked = torch.cat(latents).contiguous()
    save_file({"latents": stacked}, out)
    out.with_suffix(".json").write_text(json.dumps(captions))
    return stacked, captions


def sheet(pipe: StableDiffusionPipeline, path: Path, count: int = 24, split: str = "test") -> None:
    """Draw ``count`` captions of ``split`` and save them as one picture, three times enlarged."""
    captions = [
        describe(20_000_000 + n, split, concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES).caption  # type: ignore[arg-type]
        for n in range(count)
    ]
    generators = [torch.Generator().manual_seed(n) for n in range(count)]
    images = pipe(captions, generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE).images
    rows = [np.concatenate([np.asarray(i) for i in images[r : r + 8]], 1) for r in range(0, count, 8)]
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.LANCZOS).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/generator"))
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/sticker/autoencoder/vae"))
    parser.add_argument("--text", type=Path, default=Path("runs/sticker/text"))
    parser.add_argument("--steps", type=int, default=8800)
    parser.add_argument("--decay", type=float, default=0.3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "pipeline")
    parser.add_argument("--report", action="store_true", help="only let the referee look at what --out holds")
    args = parser.parse_args()
    if args.report:
        report(args)
        return

    vae = AutoencoderTiny.from_pretrained(args.autoencoder)
    latents, captions = encode(vae, args.scenes, args.work / "latents.safetensors")
    vae.register_to_config(scaling_factor=round(1 / float(latents.float().std()), 4))
    latents = latents.float() * vae.config.scaling_factor
    tokenizer = CLIPTokenizer.from_pretrained(args.text / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.text / "text_encoder")
    ids, empty = tokens(tokenizer, captions), tokens(tokenizer, [""])
    net = unet().to(memory_format=torch.channels_last)
    trainer = Trainer(
        args.work,
        {"unet": net, "text": text},
        LoopConfig(args.steps, args.learning_rate, warmup=200, decay=args.decay, ema=0.998, weight_decay=1e-3),
    )
    alphas = scheduler().alphas_cumprod
    snr = alphas / (1 - alphas).clamp(min=1e-8)
    weights = (snr + 1).clamp(max=5) / (snr + 1)

    def step(n: int) -> torch.Tensor:
        rng = torch.Generator().manual_seed(n)
        index = torch.randint(len(latents), (BATCH,), generator=rng)
        # Stratified timesteps: the loss of one batch then says more.
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=rng)) / BATCH * 1000).long()
        noise = torch.randn(BATCH, *latents.shape[1:], generator=rng)
        dropped = torch.rand(BATCH, 1, generator=rng) < 0.1
        x, alpha = latents[index], alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
        hidden = text(torch.where(dropped, empty, ids[index])).last_hidden_state
        velocity = net(noisy.contiguous(memory_format=torch.channels_last), t, hidden).sample
        return ((velocity - target).square().mean((1, 2, 3)) * weights[t]).mean()

    def pipeline() -> StableDiffusionPipeline:
        shipped, words = unet(), CLIPTextModel(text.config)
        shipped.load_state_dict(trainer.averaged("unet"))
        words.load_state_dict(trainer.averaged("text"))
        return assemble(vae, words.eval(), tokenizer, shipped.eval())

    def evaluate() -> dict[str, float]:
        pipe = pipeline()
        sheet(pipe, args.work / f"samples-{trainer.state.step:06d}.png")
        pipe.save_pretrained(args.work / "pipeline")
        return {}

    trainer.run(step, evaluate, evaluate_every=500, title="generator")
    sharpened = args.autoencoder.with_name("vae-decoder")
    if sharpened.is_dir():
        vae.decoder = AutoencoderTiny.from_pretrained(sharpened).decoder
    pipe = pipeline()
    # Half precision on disk; `load_pipeline` computes in float32. The report lies beside the weights.
    pipe.to(torch.float16).save_pretrained(args.out)
    write_classic_files(args.out / "tokenizer")
    write_classic_names(args.out / "text_encoder" / "model.safetensors")
    curve = {"steps": trainer.state.step, "seconds": trainer.state.seconds, "curve": trainer.state.curve}
    (args.work / "curve.json").write_text(json.dumps(curve))
    print(f"generator: {trainer.state.step} steps, {trainer.state.seconds / 60:.0f} min, {args.out}")


def report(args: argparse.Namespace) -> None:
    """How often the referee recognises what test prompts ask for, the time a picture takes, and a sheet."""
    from .. import load_pipeline, load_referee
    from ..world import CONCEPTS

    pipe, referee = load_pipeline(), load_referee()
    numbers: dict[str, object] = {
        "declared concepts": len(GENERATOR_CONCEPTS),
        "declared styles": list(GENERATOR_STYLES),
        "parameters of the UNet": sum(p.numel() for p in pipe.unet.parameters()),
    }
    sheet_images: list[np.ndarray] = []
    sheet_captions: list[str] = []
    for title, count in (("single objects", 1), ("pairs", 2)):
        described: list[Description] = []
        seed = 40_000_000
        while len(described) < 200:
            d = describe(seed, "test", "any", GENERATOR_CONCEPTS, GENERATOR_STYLES, count)
            seed += 1
            if d.caption not in [x.caption for x in described]:
                described.append(d)
            if seed > 40_020_000:
                break
        found, started = 0, time.monotonic()
        seen: dict[str, tuple[int, int]] = {}
        for start in tqdm(range(0, len(described), 20), desc=title):
            part = described[start : start + 20]
            generators = [torch.Generator().manual_seed(d.seed) for d in part]
            images = pipe(
                [d.caption for d in part], generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE
            ).images
            for d, image, row in zip(part, images, referee.probabilities(images) >= 0.5, strict=True):
                shown = {referee.concepts[k] for k in row.nonzero().flatten().tolist()}
                found += set(d.concepts) <= shown
                for name in d.concepts:
                    hits, total = seen.get(name, (0, 0))
                    seen[name] = (hits + (name in shown), total + 1)
                if start < 20:
                    sheet_images.append(np.asarray(image, np.float32) / 255)
                    sheet_captions.append(" + ".join(d.concepts))
        seconds = (time.monotonic() - started) / len(described)
        worst = sorted(seen.items(), key=lambda item: item[1][0] / item[1][1])[:8]
        numbers |= {
            f"{title}: all objects recognised": [round(found / len(described), 4), len(described)],
            f"{title}: least recognised": {name: f"{h}/{n}" for name, (h, n) in worst},
            f"{title}: seconds a picture, batches of 20": round(seconds, 3),
            f"{title}: unsafe concepts recognised": round(
                sum(h for c, (h, _) in seen.items() if CONCEPTS[c].category)
                / max(1, sum(n for c, (_, n) in seen.items() if CONCEPTS[c].category)),
                4,
            ),
        }
    started = time.monotonic()
    for _ in range(3):
        pipe("a noto sticker of a cat on a blue background", num_inference_steps=STEPS, guidance_scale=GUIDANCE)
    numbers["seconds a picture, alone"] = round((time.monotonic() - started) / 3, 3)
    curve = json.loads((args.work / "curve.json").read_text())
    write_report(
        args.out,
        "generator",
        {"steps": curve["steps"], "batch": BATCH, "learning_rate": args.learning_rate, "seed": 0},
        LoopState(**{"step": curve["steps"], "seconds": curve["seconds"], "curve": curve["curve"]}),
        numbers,
        (np.stack(sheet_images), sheet_captions),
    )


if __name__ == "__main__":
    main()
