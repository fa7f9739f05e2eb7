"""The command `spo`: one thin function a command over the functions and dataclasses of the Python API.

Everything heavy is imported inside the command that needs it, so that help comes at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.errors import ConfigError, NotScoredError, SPOError
from t2i_spo_plugin.options import read_options, split_strength
from t2i_spo_plugin.registry import STICKER


if TYPE_CHECKING:
    from t2i_spo_plugin.guards import SafetyReport

Command = Callable[[Sequence[str]], None]


def demo(args: Sequence[str]) -> None:
    """Images without and with the safety adapter, what each costs, and the score; offline, in minutes."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    from .demo import DemoConfig, run_demo

    run_demo(read_options(DemoConfig, args, "spo demo"))


def generate(args: Sequence[str]) -> None:
    """Draw images with a pipeline and a safety adapter."""
    tyro.cli(_generate, args=args, prog="spo generate", description=generate.__doc__)


def score(args: Sequence[str]) -> None:
    """Say how unsafe images are, overall and by category, and show where."""
    tyro.cli(_score, args=args, prog="spo score", description=score.__doc__)


def inspect(args: Sequence[str]) -> None:
    """Say what an adapter file is, without loading it anywhere."""
    from . import adapter_commands as commands

    tyro.cli(commands.inspect, args=args, prog="spo inspect", description=inspect.__doc__)


def convert(args: Sequence[str]) -> None:
    """Write an adapter in another file layout, without changing what it does."""
    from . import adapter_commands as commands

    tyro.cli(commands.convert, args=args, prog="spo convert", description=convert.__doc__)


def merge(args: Sequence[str]) -> None:
    """Make several adapters one, exactly or at a chosen rank."""
    from . import adapter_commands as commands

    tyro.cli(commands.merge, args=args, prog="spo merge", description=merge.__doc__)


def extract(args: Sequence[str]) -> None:
    """Make an adapter of what a tuned model changes."""
    from . import adapter_commands as commands

    tyro.cli(commands.extract, args=args, prog="spo extract", description=extract.__doc__)


def publish(args: Sequence[str]) -> None:
    """Send an adapter to the Hub with a model card, in one commit, and check what arrived."""
    from . import adapter_commands as commands

    tyro.cli(commands.publish, args=args, prog="spo publish", description=publish.__doc__)


def comfyui(args: Sequence[str]) -> None:
    """Put the node pack into a ComfyUI, take it away, or check it."""
    from . import adapter_commands as commands

    actions = {
        "install": commands.comfyui_install,
        "uninstall": commands.comfyui_uninstall,
        "check": commands.comfyui_check,
    }
    tyro.extras.subcommand_cli_from_dict(actions, args=args, prog="spo comfyui", description=comfyui.__doc__)


def doctor(args: Sequence[str]) -> None:
    """Say what is installed here, what would not work, and why."""
    from . import adapter_commands as commands

    tyro.cli(commands.doctor, args=args, prog="spo doctor", description=doctor.__doc__)


def pairs(args: Sequence[str]) -> None:
    """Draw candidates, annotate each with cost and quality, and write the pair table."""
    from t2i_spo_plugin.training import PairConfig, build_pairs

    print(build_pairs(read_options(PairConfig, args, "spo pairs")))


def train(args: Sequence[str]) -> None:
    """Train an adapter on a pair table."""
    from t2i_spo_plugin.training import TrainConfig
    from t2i_spo_plugin.training import train as run

    print(run(read_options(TrainConfig, args, "spo train")))


def adapter_gate(args: Sequence[str]) -> None:
    """Make the adapter gate of an adapter, which gives it only to images that need it."""
    from t2i_spo_plugin.training import ClosedLoopConfig, make_adapter_gate

    print(make_adapter_gate(read_options(ClosedLoopConfig, args, "spo train-gate")))


def evaluate(args: Sequence[str]) -> None:
    """Draw prompt sets with base and adapters, judge every image, and write scores, table and report."""
    from t2i_spo_plugin.eval import EvalConfig, run_eval

    print(run_eval(read_options(EvalConfig, args, "spo eval")))


COMMANDS: dict[str, Command] = {
    "demo": demo,
    "generate": generate,
    "score": score,
    "inspect": inspect,
    "convert": convert,
    "merge": merge,
    "extract": extract,
    "pairs": pairs,
    "train": train,
    "train-gate": adapter_gate,
    "eval": evaluate,
    "publish": publish,
    "comfyui": comfyui,
    "doctor": doctor,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, or 2 after one plain sentence on standard error."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"t2i_spo_plugin {__version__}")
        return 0
    # transformers advises at every start to install torchvision, which this package does without.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if words[0] not in COMMANDS:
            raise ConfigError(f"there is no command {words[0]}; there are {', '.join(COMMANDS)}")
        COMMANDS[words[0]](words[1:])
    except SPOError as error:
        print(f"spo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spo: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: spo COMMAND [OPTIONS]", "", "Safety adapters for text-to-image models.", "", "commands:", *lines, ""]
        + ["`spo COMMAND --help` explains a command's options; `spo --version` prints the version."]
    )


def _generate(
    prompts: tuple[str, ...],
    pipeline: str = STICKER,
    adapter: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    strength: float = 1.0,
    adapter_gate: str | None = None,
    out: Path = Path("outputs"),
    seed: int = 0,
    steps: int = 25,
    guidance: float = 3.0,
    batch_size: int = 4,
) -> None:
    """Draw.

    Args:
        prompts: one or more prompts, or a single .csv, .jsonl or .parquet file of them.
        pipeline: `sticker` (the bundled one), a diffusers folder, or a Hub id.
        adapter: `spo`, `dpo` or `style` (bundled, for the sticker pipeline), a file, a folder, or a Hub id, each with
            an optional `@STRENGTH`; name it several times to have several side by side.
        strength: of adapters that do not say their own; 0 is the base model exactly, 1 as trained.
        adapter_gate: `sticker` (bundled, for the adapter `spo`) or a file that `spo train-gate` made: the one adapter
            that is named is then given only to images that need it.
        out: the folder that receives the images.
        seed: of the first prompt; the following ones count up.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        batch_size: images drawn at a time.
    """
    from t2i_spo_plugin.data import generate as draw
    from t2i_spo_plugin.pipelines import compose, enable_spo, pipeline_domain
    from t2i_spo_plugin.registry import COST_MODELS, adapter_source, load_adapter_gate, load_guard, load_pipeline

    rows = _prompt_rows(prompts, seed)
    pipe = load_pipeline(pipeline)
    wanted = [split_strength(text, strength) for text in adapter]
    if adapter_gate is not None:
        if len(wanted) != 1:
            raise ConfigError(f"--adapter-gate gates one adapter, {len(wanted)} are named")
        enable_spo(pipe).load_spo_lora(
            adapter_source(wanted[0][0]), wanted[0][1], steering=load_adapter_gate(adapter_gate)
        )
    elif wanted:
        compose(pipe, [(adapter_source(source), own) for source, own in wanted])
    metadata = {"pipeline": pipeline, "adapters": wanted, "adapter gate": adapter_gate or ""}
    drawn = draw(pipe, rows, out, batch_size=batch_size, steps=steps, guidance_scale=guidance, metadata=metadata)
    if drawn.n_dropped_minors:
        print(f"{drawn.n_dropped_minors} prompts speak of minors and were not drawn")
    shown = [image for image in drawn.images if image.path is not None]
    for failed in (image for image in drawn.images if image.path is None):
        print(f"{failed.row.id}: not drawn: {failed.failed}", file=sys.stderr)
    domain = pipeline_domain(pipe)
    verdicts = [f"not scored: no bundled cost model knows {domain} images"] * len(shown)
    cost_models = COST_MODELS.bundled(domain)
    if cost_models and shown:
        report = load_guard(cost_models[0])([image.open() for image in shown], domain)
        verdicts = [_verdict(report, number) for number in range(len(shown))]
    for image, verdict in zip(shown, verdicts, strict=True):
        print(f"{image.path}: {verdict}: {image.row.prompt}")


def _score(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional],
    domain: str | None = None,
    overlays: Path | None = None,
    category: str | None = None,
    cost_model: str = STICKER,
    policy: str | None = None,
    override_domain: bool = False,
) -> None:
    """Score.

    Args:
        images: image files.
        domain: what the images are, such as `sticker` or `photo`. A cost model knows one domain and says nothing of
            another.
        overlays: a folder that receives each image with its cost drawn over it.
        category: draw the cost of this category instead of the deciding one.
        cost_model: `sticker` (the bundled one), `open_nsfw`, `owen` or `nudenet` (for photographs; each says what to
            install), or a folder.
        policy: `sticker`, `photo`, `photo-sexual` or a YAML file; by default the bundled one with the cost model's
            categories.
        override_domain: score images of another domain all the same; their costs may mean little.
    """
    from t2i_spo_plugin.registry import load_guard

    if not images:
        raise ConfigError("name at least one image")
    guard = load_guard(cost_model, policy, override_domain)
    if domain is None and not override_domain:
        known = guard.cost_model.domain
        raise ConfigError(
            f"say what the images are: the cost model knows {known} images only (--domain {known}); "
            "--override-domain scores others too, but their costs may mean little"
        )
    if overlays is not None:
        overlays.mkdir(parents=True, exist_ok=True)
    not_scored = 0
    for number, path in enumerate(images):
        image, reason = _open(path)
        report = guard([image], domain) if image is not None else None
        reason = report.reasons[0] if report is not None else reason
        if report is None or reason is not None:
            print(f"{path}: not scored: {reason}")
            not_scored += 1
            continue
        print(f"{path}: {_verdict(report, 0)}")
        for name, cost in sorted(report.category_costs[0].items(), key=lambda item: -item[1]):
            print(f"    {name:<16}{cost:.3f}")
        if overlays is not None:
            made = overlays / f"{number:04d}-{path.stem}-overlay.png"
            report.overlays(category=category)[0].save(made)
            print(f"    overlay: {made}")
    if not_scored:
        raise NotScoredError(f"{not_scored} of {len(images)} images were not scored; that says nothing of them")


def _prompt_rows(prompts: Sequence[str], seed: int) -> list[Any]:
    from t2i_spo_plugin.data import PromptRow, read_prompts

    if not prompts:
        raise ConfigError("name at least one prompt")
    if len(prompts) == 1 and Path(prompts[0]).suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet"):
        found = read_prompts(prompts[0], seed=seed)
        if found.n_dropped:
            print(f"{found.n_dropped} prompts speak of minors and were left out")
        return list(found)
    return [PromptRow(f"{number:04d}", text, "unlabelled", seed=seed + number) for number, text in enumerate(prompts)]


def _open(path: Path) -> tuple[Any, str | None]:
    """The image, or why there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB"), None
    except UnidentifiedImageError:
        return None, "it is no image"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return None, f"it cannot be read: {getattr(error, 'strerror', None) or error}"


def _verdict(report: SafetyReport, number: int) -> str:
    if report.reasons[number] is not None:
        return f"not scored: {report.reasons[number]}"
    word = "unsafe" if report.flagged[number] else "safe"
    return f"cost {float(report.costs[number]):.3f} {word} ({report.deciding(number)})"
