"""Build every model of the sticker world, one after the other: what `make sticker` runs.

`python -m t2i_spo_plugin.sticker.build.chain`. Each stage is a command of its own that goes on where it stopped; what
is done is noted in `--work` and not done again. On the CPU this takes a day, on a large GPU minutes: there the batches
of the generator are larger and its steps fewer, `--jobs` processes make each judge's images, and stages that do not
need each other run side by side.
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
        needs: stages that must be done before.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    steps: tuple[int, int] | None = None
    gpu: tuple[str, ...] = ()
    scenes: int = 0
    measures: bool = False
    needs: tuple[str, ...] = ()


def stages(work: Path, out: Path) -> tuple[Stage, ...]:
    """The stages in the order in which they need each other; weights and reports go to `out`."""

    def folder(name: str) -> tuple[str, str]:
        return ("--work", str(work / name))

    vae, text = ("--autoencoder", str(work / "autoencoder" / "vae")), ("--text", str(work / "text"))
    pipeline = ("--pipeline", str(out / "pipeline"))
    cost, referee = str(out / "cost_model"), str(out / "referee")
    quality = (*folder("quality"), "--out", str(out / "quality_model"), "--cost", cost, *text, *vae, *pipeline)
    batch = ("--batch", "48")
    return (
        Stage("autoencoder", "autoencoder", folder("autoencoder"), (24_000, 6_000), batch, 28_000),
        Stage("text", "text", folder("text"), (4_000, 4_000)),
        Stage(
            "decoder",
            "autoencoder",
            (*folder("autoencoder"), "--stage", "decoder"),
            (8_000, 2_000),
            batch,
            28_000,
            needs=("autoencoder",),
        ),
        Stage(
            "generator",
            "generator",
            (*folder("generator"), "--out", pipeline[1], *vae, *text),
            (40_000, 10_000),
            ("--batch", "256", "--learning-rate", "1.5e-3"),
            28_000,
            needs=("decoder", "text"),
        ),
        Stage(
            "cost",
            "cost",
            (*folder("cost"), "--out", cost, *vae),
            (6_000, 6_000),
            (),
            16_000,
            True,
            ("autoencoder",),
        ),
        Stage(
            "referee",
            "referee",
            (*folder("referee"), "--out", referee, *vae),
            (8_000, 8_000),
            (),
            16_000,
            True,
            ("autoencoder",),
        ),
        # The scenes of the cost model serve the quality model too.
        Stage(
            "alignment", "quality", ("alignment", *quality), (4_000, 4_000), (), 16_000, needs=("cost", "generator")
        ),
        Stage("realism", "quality", ("realism", *quality), (2_500, 2_500), (), 16_000, needs=("cost",)),
        Stage(
            "reference",
            "quality",
            ("reference", *quality),
            needs=("alignment", "realism"),
        ),
        Stage(
            "recognised",
            "recognised",
            (*folder("generator"), *pipeline, "--referee", referee),
            measures=True,
            needs=("generator", "referee"),
        ),
    )


def command(stage: Stage, args: argparse.Namespace) -> list[str]:
    """The command line of a stage: with `--share` below 1, that share of steps, scenes and measured scenes."""
    gpu = args.device != "cpu"
    out = [sys.executable, "-m", f"{__package__}.{stage.module}", *stage.arguments, "--device", args.device]
    if stage.steps:
        out += ["--steps", str(max(2, round(stage.steps[gpu] * args.share)))]
    if stage.scenes:
        out += ["--scenes", str(max(100, round(stage.scenes * args.share))), "--jobs", str(args.jobs)]
    if stage.name == "text" and args.share < 1:
        out += ["--taught", str(max(200, round(40_000 * args.share))), "--vocabulary", "500"]
    if stage.name == "reference" and args.share < 1:
        out += ["--prompts", str(max(8, round(192 * args.share)))]
    if stage.measures and args.share < 1:
        out += ["--count", str(max(4, round(200 * args.share)))]
    if gpu:
        out += stage.gpu
    return out


def run(args: argparse.Namespace) -> None:
    """Run what is not done yet, at most `--parallel` stages at a time.

    Raises:
        subprocess.CalledProcessError: a stage failed; those beside it are stopped, and go on another time.
    """
    done = args.work / "done"
    done.mkdir(parents=True, exist_ok=True)
    waiting = [s for s in stages(args.work, args.out) if not args.only or s.name in args.only]
    waiting = [s for s in waiting if not (done / s.name).is_file()]
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while waiting or running:
            unfinished = {*running, *(s.name for s in waiting)}
            ready = [s for s in waiting if not unfinished & set(s.needs)]
            for stage in ready[: max(0, args.parallel - len(running))]:
                print(f"== {stage.name}", flush=True)
                running[stage.name] = subprocess.Popen(command(stage, args)), time.monotonic()
                waiting.remove(stage)
            time.sleep(0.2)
            for name, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    raise subprocess.CalledProcessError(process.returncode, process.args)
                (done / name).write_text(f"{time.monotonic() - started:.0f} s\n")
    finally:
        for process, _ in running.values():
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/sticker"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1], help="where weights and reports go")
    parser.add_argument("--share", type=float, default=1.0, help="share of all steps, to try the chain out")
    parser.add_argument("--only", nargs="*", default=[], help="names of stages")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=0, help="processes of each stage that render; 0: by the cores")
    parser.add_argument("--parallel", type=int, default=0, help="stages at a time; 0: one on the CPU, else four")
    args = parser.parse_args()
    args.parallel = args.parallel or (1 if args.device == "cpu" else 4)
    args.jobs = args.jobs or max(1, (os.cpu_count() or 1) // args.parallel)
    run(args)


if __name__ == "__main__":
    main()
