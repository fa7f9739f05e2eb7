"""Build every model of the sticker world, one after the other: what `make sticker` runs.

`python -m t2i_spo_plugin.sticker.build.chain`. Each stage is a command of its own that goes on where it stopped; what
is done is noted in `--work` and not done again. On the CPU this takes a day, on a large GPU minutes: there the batches
of the generator are larger and its steps fewer, and `--jobs` processes make the judges' images.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One command of this folder.

    Attributes:
        name: of the stage.
        module: its file.
        arguments: always given.
        steps: at full length, on the CPU and on a GPU; none where nothing is trained.
        gpu: more arguments on a GPU.
        scenes: that are rendered for it, 0 for none.
        measures: whether it measures on `--count` scenes.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    steps: tuple[int, int] | None = None
    gpu: tuple[str, ...] = ()
    scenes: int = 0
    measures: bool = False


def stages(work: Path, out: Path) -> tuple[Stage, ...]:
    """The stages in the order in which they need each other; weights and reports go to `out`."""

    def folder(name: str) -> tuple[str, str]:
        return ("--work", str(work / name))

    vae, text = ("--autoencoder", str(work / "autoencoder" / "vae")), ("--text", str(work / "text"))
    pipeline = ("--pipeline", str(out / "pipeline"))
    cost, referee = str(out / "cost_model"), str(out / "referee")
    quality = (*folder("quality"), "--out", str(out / "quality_model"), "--cost", cost, *text)
    return (
        Stage("autoencoder", "autoencoder", folder("autoencoder"), (24_000, 8_000), ("--batch", "48"), 28_000),
        Stage(
            "decoder",
            "autoencoder",
            (*folder("autoencoder"), "--stage", "decoder"),
            (8_000, 3_000),
            ("--batch", "48"),
            28_000,
        ),
        Stage("text", "text", folder("text"), (4_000, 4_000)),
        Stage(
            "generator",
            "generator",
            (*folder("generator"), "--out", pipeline[1], *vae, *text),
            (40_000, 10_000),
            ("--batch", "256", "--learning-rate", "1.5e-3"),
            28_000,
        ),
        Stage("cost", "cost", (*folder("cost"), "--out", cost), (6_000, 6_000), scenes=16_000, measures=True),
        Stage("alignment", "quality", ("alignment", *quality), (4_000, 4_000), scenes=16_000),
        Stage("realism", "quality", ("realism", *quality), (2_500, 2_500), scenes=16_000),
        Stage("reference", "quality", ("reference", *quality, *pipeline)),
        Stage(
            "referee",
            "referee",
            (*folder("referee"), "--out", referee, *vae),
            (8_000, 8_000),
            scenes=16_000,
            measures=True,
        ),
        Stage("recognised", "recognised", (*folder("generator"), *pipeline, "--referee", referee), measures=True),
    )


def command(stage: Stage, args: argparse.Namespace) -> list[str]:
    """The command line of a stage: with `--share` below 1, that share of steps, scenes and measured scenes."""
    gpu = args.device != "cpu"
    out = [sys.executable, "-m", f"{__package__}.{stage.module}", *stage.arguments, "--device", args.device]
    if stage.steps:
        out += ["--steps", str(max(2, round(stage.steps[gpu] * args.share)))]
    if stage.scenes:
        out += ["--scenes", str(max(100, round(stage.scenes * args.share))), "--jobs", str(args.jobs)]
    if stage.name == "reference" and args.share < 1:
        out += ["--prompts", str(max(8, round(192 * args.share)))]
    if stage.measures and args.share < 1:
        out += ["--count", str(max(4, round(200 * args.share)))]
    if gpu:
        out += stage.gpu
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1], help="where weights and reports go")
    parser.add_argument("--share", type=float, default=1.0, help="share of all steps, to try the chain out")
    parser.add_argument("--only", nargs="*", default=[], help="names of stages")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    args = parser.parse_args()
    done = args.work / "done"
    done.mkdir(parents=True, exist_ok=True)
    for stage in stages(args.work, args.out):
        if (args.only and stage.name not in args.only) or (done / stage.name).is_file():
            continue
        started = time.monotonic()
        print(f"== {stage.name}", flush=True)
        subprocess.run(command(stage, args), check=True)
        (done / stage.name).write_text(f"{time.monotonic() - started:.0f} s\n")


if __name__ == "__main__":
    main()
