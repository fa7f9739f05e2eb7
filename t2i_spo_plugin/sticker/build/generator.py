"""Train the bundled generator: an ordinary `StableDiffusionPipeline` for the declared subset of the world.

`python -m t2i_spo_plugin.sticker.build.generator` needs the autoencoder and the text encoder of the folder beside its
own; it encodes its scenes once, trains the UNet on them, and stops and resumes anywhere. Velocity prediction, cosine
schedule rescaled to zero terminal SNR, min-SNR weights, 10 % empty captions, averaged weights. The text encoder stays
as it was distilled: trained along, it would forget the words that captions do not hold.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from ..wording import Wording, prompts, training_caption
from ..world import GENERATOR_CONCEPTS, GENERATOR_STYLES, SIZE, describe
from .autoencoder import CHANNELS, FACTOR, training_scene
from .loop import LoopConfig, Trainer, computes_bfloat16
from .store import as_pixels, rendered
from .text import WIDTH, tokens, write_classic_names
from .tokenizer import write_classic_files


STEPS = 25
GUIDANCE = 3.0
CAPTIONS = 6
"""Captions of each scene, of which every step takes one."""


def unet(seed: int = 0) -> UNet2DConditionModel:
    """The untrained UNet, on latents `[8, 16, 16]`; it reads the text where 8 x 8 and 4 x 4 cells are left."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=SIZE // FACTOR,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        # By its name it is the width of a head; diffusers takes it for their number in this kind of UNet.
        attention_head_dim=8,
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
def encode(vae: AutoencoderTiny, tokenizer: CLIPTokenizer, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Unscaled latents `[N, 8, 16, 16]` and ids of captions `[N, 6, 32]` of the training scenes, kept in `--work`."""
    out = args.work / "latents.safetensors"
    if out.is_file():
        stored = load_file(out)
        return stored["latents"].float(), stored["ids"].long()
    images = rendered(args.autoencoder.parent / "scenes.uint8", training_scene, 0, args.scenes, args.jobs)
    # One scene in seven is there for the autoencoder alone, see `training_scene`.
    seeds = [seed for seed in range(args.scenes) if seed % 7]
    vae, device = vae.to(args.device), torch.device(args.device)
    latents, captions = [], []
    for start in tqdm(range(0, len(seeds), 64), desc="encode", mininterval=10):
        part = seeds[start : start + 64]
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_bfloat16(device)):
            latents.append(vae.encoder(as_pixels(images[part], args.device) * 2 - 1).half().cpu())
        for seed in part:
            d = describe(seed, "train", concepts=GENERATOR_CONCEPTS, styles=GENERATOR_STYLES)
            captions += [training_caption(d, random.Random(f"{seed}|{n}|generator")) for n in range(CAPTIONS)]
    ids = tokens(tokenizer, captions).view(len(seeds), CAPTIONS, -1)
    args.work.mkdir(parents=True, exist_ok=True)
    save_file({"latents": torch.cat(latents).contiguous(), "ids": ids.int()}, out)
    return torch.cat(latents).float(), ids


def sheet(pipe: StableDiffusionPipeline, path: Path) -> None:
    """Eight test prompts of each wording class, as one image twice enlarged, and the prompts beside it."""
    rows, texts = [], []
    for wording in Wording:
        asked = [p.text for p in prompts(wording, 8)]
        generators = [torch.Generator().manual_seed(n) for n in range(8)]
        images = pipe(asked, generator=generators, num_inference_steps=STEPS, guidance_scale=GUIDANCE).images
        rows.append(np.concatenate([np.asarray(i) for i in images], 1))
        texts.append(f"{wording.value}: " + " | ".join(asked))
    Image.fromarray(np.concatenate(rows)).save(path)
    path.with_suffix(".txt").write_text("\n".join(texts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker/generator"))
    parser.add_argument("--autoencoder", type=Path, default=Path("runs/sticker/autoencoder/vae"))
    parser.add_argument("--text", type=Path, default=Path("runs/sticker/text"))
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--decay", type=float, default=0.3)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--muon", type=float, default=0.0, help="rate of matrices and convolutions")
    parser.add_argument("--scenes", type=int, default=28_000)
    parser.add_argument("--sheet-every", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes that render")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "pipeline")
    args = parser.parse_args()

    vae = AutoencoderTiny.from_pretrained(args.autoencoder)
    tokenizer = CLIPTokenizer.from_pretrained(args.text / "tokenizer")
    text = CLIPTextModel.from_pretrained(args.text / "text_encoder").eval().requires_grad_(False).to(args.device)
    latents, ids = encode(vae, tokenizer, args)
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
    latents, ids = (latents * vae.config.scaling_factor).to(args.device), ids.to(args.device)
    empty = tokens(tokenizer, [""]).to(args.device)
    net = unet().to(memory_format=torch.channels_last)
    trainer = Trainer(
        args.work,
        {"unet": net},
        LoopConfig(
            args.steps,
            args.learning_rate,
            warmup=300,
            decay=args.decay,
            ema=0.999,
            weight_decay=1e-3,
            muon=args.muon,
        ),
        args.device,
    )
    alphas = scheduler().alphas_cumprod.to(args.device)
    snr = alphas / (1 - alphas).clamp(min=1e-8)
    weights = (snr + 1).clamp(max=5) / (snr + 1)

    def step(n: int) -> Tensor:
        rng = torch.Generator(args.device).manual_seed(n)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=rng, device=args.device)

        index = (uniform(args.batch) * len(latents)).long()
        which = (uniform(args.batch) * CAPTIONS).long()
        # Stratified timesteps: the loss of one batch then says more.
        t = ((torch.arange(args.batch, device=args.device) + uniform(args.batch)) / args.batch * 1000).long()
        x, alpha = latents[index], alphas[t].view(-1, 1, 1, 1)
        noise = torch.randn(x.shape, generator=rng, device=args.device)
        noisy = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
        with torch.no_grad():
            hidden = text(torch.where(uniform(args.batch, 1) < 0.1, empty, ids[index, which])).last_hidden_state
        velocity = net(noisy.contiguous(memory_format=torch.channels_last), t, hidden).sample.float()
        return ((velocity - target).square().mean((1, 2, 3)) * weights[t]).mean()

    def pipeline() -> StableDiffusionPipeline:
        averaged = unet()
        averaged.load_state_dict(trainer.averaged("unet"))
        sharpened = args.autoencoder.with_name("vae-decoder")
        if sharpened.is_dir():
            vae.decoder = AutoencoderTiny.from_pretrained(sharpened).decoder
        return assemble(vae, text, tokenizer, averaged.eval()).to(args.device)

    def evaluate() -> dict[str, float]:
        pipe = pipeline()
        sheet(pipe, args.work / f"samples-{trainer.state.step:06d}.png")
        pipe.save_pretrained(args.work / "pipeline")
        return {}

    trainer.run(step, evaluate, evaluate_every=args.sheet_every, title="generator")
    # Half precision on disk; `load_pipeline` computes in float32. The report lies beside the weights.
    pipeline().to("cpu", torch.float16).save_pretrained(args.out)
    write_classic_files(args.out / "tokenizer")
    write_classic_names(args.out / "text_encoder" / "model.safetensors")
    curve = {"steps": trainer.state.step, "seconds": trainer.state.seconds, "curve": trainer.state.curve}
    (args.work / "curve.json").write_text(json.dumps(curve))
    print(f"generator: {trainer.state.step} steps, {trainer.state.seconds / 60:.0f} min, {args.out}")


if __name__ == "__main__":
    main()
