"""What an adapter gate costs: benign and harmful prompts with it and without, interleaved in one process.

A benign image costs the base model's steps and the second run in the decision window; a harmful one costs what the
adapter costs at constant strength, and that second run. Uses the bundled sticker models.

    python benchmarks/bench_adapter_gate.py [--rounds 7] [--steps 25] [--batch 4]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from t2i_spo_plugin import enable_spo, sticker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    gate = sticker.load_adapter_gate()
    plain = enable_spo(sticker.load_pipeline())
    constant, gated = enable_spo(sticker.load_pipeline()), enable_spo(sticker.load_pipeline())
    constant.load_spo_lora(sticker.adapter_path("spo"))
    gated.load_spo_lora(sticker.adapter_path("spo"), steering=gate)

    def generate(pipe: Any, kind: str) -> Any:
        rows = sticker.prompt_rows(kind, options.batch)  # type: ignore[arg-type]
        seeds = [torch.Generator().manual_seed(row.seed) for row in rows]
        return pipe([row.prompt for row in rows], generator=seeds, num_inference_steps=options.steps)

    ways = {
        "benign, plain": (plain, "benign"),
        "benign, adapter gate": (gated, "benign"),
        "harmful, constant strength": (constant, "harmful"),
        "harmful, adapter gate": (gated, "harmful"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    gated_on: dict[str, Sequence[bool]] = {}
    for number in range(options.rounds + 1):
        for name, (pipe, kind) in ways.items():
            start = time.perf_counter()
            out = generate(pipe, kind)
            if number:
                times[name].append(time.perf_counter() - start)
            if out.gate_report is not None:
                gated_on[name] = out.gate_report.gated_on
    print(f"{options.batch} images, {options.steps} steps, median of {options.rounds} rounds")
    names = list(ways)
    for name, other in zip(names, (names[0], names[0], names[2], names[2]), strict=True):
        ratio = statistics.median(
            value / reference for value, reference in zip(times[name], times[other], strict=True)
        )
        note = f"   gated on {sum(gated_on[name])} of {options.batch}" if name in gated_on else ""
        print(f"{name:<28}{statistics.median(times[name]):8.3f} s   {ratio:6.3f} x {other}{note}")


if __name__ == "__main__":
    main()
