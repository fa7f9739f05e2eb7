"""Commands that train and evaluate: their options are the dataclasses that the Python API takes, YAML beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from t2i_spo_plugin.errors import NoPairsError
from t2i_spo_plugin.metrics import Definition
from t2i_spo_plugin.options import read_options

from .parsing import AsJSON, command


def pairs(args: Sequence[str]) -> int:
    """Generate candidates, annotate each with cost and quality, and write the pair table."""
    from t2i_spo_plugin.training import PairConfig, build_pairs

    try:
        print(build_pairs(read_options(PairConfig, args, "spo pairs")))
    except NoPairsError as error:
        print(f"spo: {error}", file=sys.stderr)
        return 1
    return 0


def train(args: Sequence[str]) -> None:
    """Train an adapter on a pair table, or on captioned images."""
    from t2i_spo_plugin import training

    print(training.train(read_options(training.TrainConfig, args, "spo train")))


def experts(args: Sequence[str]) -> None:
    """Train one adapter for each category of a pair table, and merge them into one."""
    from t2i_spo_plugin import training

    print(training.train_experts(read_options(training.ExpertsConfig, args, "spo experts")))


def rounds(args: Sequence[str]) -> int:
    """On-policy training in rounds: generate, judge, train on the images, and begin again with the new adapter."""
    from t2i_spo_plugin import training

    try:
        print(training.train_rounds(read_options(training.RoundsConfig, args, "spo rounds")))
    except NoPairsError as error:
        print(f"spo: {error}", file=sys.stderr)
        return 1
    return 0


def train_gate(args: Sequence[str]) -> None:
    """Train an adapter gate, which gives an adapter to the images that are going to be unsafe and to no others."""
    from t2i_spo_plugin import training

    print(training.train_gate(read_options(training.GateConfig, args, "spo train-gate")))


def evaluate(args: Sequence[str]) -> None:
    """Generate images for prompt sets with base and adapters, judge each, and write scores, table and report."""
    from t2i_spo_plugin.eval import EvalConfig, run_eval

    print(run_eval(read_options(EvalConfig, args, "spo eval")))


@command
def uascore(
    table: tyro.conf.Positional[Path],
    definition: Definition = "uascore/2",
    resamples: int = 2000,
    seed: int = 0,
    json_: AsJSON = False,
) -> None:
    """Print UAScore and all that belongs to it from the scores table of an evaluation; no model is loaded.

    Args:
        table: a scores.parquet, or the folder of an evaluation.
        definition: uascore/2, or uascore/1, which looks at every image once and lets it be unreadable.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        json_: print JSON.
    """
    from t2i_spo_plugin.eval import rescore

    summary = rescore(table, definition, resamples, seed)
    print(json.dumps(summary.to_dict(), indent=1, ensure_ascii=False) if json_ else summary)
