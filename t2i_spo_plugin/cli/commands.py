"""The command `spo`: a table of commands, and what all of them have in common.

Everything heavy is imported inside the command that needs it, so that help comes at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from t2i_spo_plugin._version import __version__
from t2i_spo_plugin.errors import ConfigError, SPOError

from .adapter_commands import convert, extract, inspect, merge, publish
from .image_commands import demo, generate, score
from .judge_commands import calibrate, convert_head, reference, serve
from .parsing import Command, summary
from .setup_commands import comfyui, doctor
from .training_commands import evaluate, experts, pairs, rounds, train, train_gate, uascore


GROUPS: dict[str, dict[str, Command]] = {
    "images": {"demo": demo, "generate": generate, "score": score},
    "judges": {"calibrate": calibrate, "convert-head": convert_head, "reference": reference, "serve": serve},
    "adapter files": {"inspect": inspect, "convert": convert, "merge": merge, "extract": extract, "publish": publish},
    "training and evaluation": {
        "pairs": pairs,
        "train": train,
        "rounds": rounds,
        "experts": experts,
        "train-gate": train_gate,
        "eval": evaluate,
        "uascore": uascore,
    },
    "set-up": {"comfyui": comfyui, "doctor": doctor},
}
COMMANDS: dict[str, Command] = {name: run for group in GROUPS.values() for name, run in group.items()}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0, what the command says, or 2 after one plain sentence on standard
    error."""
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
        return COMMANDS[words[0]](words[1:]) or 0
    except SPOError as error:
        print(f"spo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("spo: stopped; the same command goes on where it was", file=sys.stderr)
        return 130


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = ["usage: spo COMMAND [OPTIONS]", "", "Safety adapters for text-to-image models."]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<{width}}{summary(run)}" for name, run in commands.items())]
    return "\n".join(
        [*lines, "", "`spo COMMAND --help` explains a command's options; `spo --version` prints the version."]
    )
