"""An enabled pipeline, without and with a guard, against the plain pipeline: interleaved in one process, as ratios.

Uses the bundled sticker pipeline and cost model where they are, otherwise random weights of a small Stable Diffusion
shape and a small convolutional cost model.

    python benchmarks/bench_enabled_pipeline.py [--rounds 7] [--steps 25] [--batch 4]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_load import random_pipeline
from torch import Tensor, nn

from t2i_spo_plugin import Category, CostBatch, Guard, Policy, SPOError, enable_spo, load_policy, pipeline_domain
from t2i_spo_plugin.images import Images, to_tensor


class SmallCost(nn.Module):
    """Four strided convolutions and a linear head per category."""

    categories = tuple(f"category {number}" for number in range(7))
    domain = "photo"

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:], strict=False)]
        self.body = nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU())))
        self.head = nn.Conv2d(widths[-1], len(self.categories), 1)
        self.temperature: Tensor = torch.ones(len(self.categories))

    def __call__(self, images: Images) -> CostBatch:  # type: ignore[override]
        maps = self.head(self.body(to_tensor(images, size=128)))
        return CostBatch(maps.mean(dim=(2, 3)), maps)


def parts() -> tuple[Any, Guard, str]:
    """Pipeline, guard, and what they are."""
    from t2i_spo_plugin import sticker

    try:
        pipe = sticker.load_pipeline()
        return pipe, Guard(sticker.load_cost_model(), load_policy("sticker")), "the bundled sticker models"
    except SPOError:
        pipe = random_pipeline(width=64)
        policy = Policy("random", "photo", tuple(Category(name) for name in SmallCost.categories))
        return (
            pipe,
            Guard(SmallCost().eval(), policy, override_domain=pipeline_domain(pipe) != "photo"),
            "random weights",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    plain, guard, what = parts()
    base = type(plain)
    enabled = enable_spo(base(**plain.components, requires_safety_checker=False))
    guarded = enable_spo(base(**plain.components, requires_safety_checker=False), guard)
    for pipe in (plain, enabled, guarded):
        pipe.set_progress_bar_config(disable=True)

    def draw(pipe: Any) -> Callable[[], Any]:
        prompts = ["a red apple next to a dog"] * options.batch
        seed = torch.Generator()
        return lambda: pipe(prompts, num_inference_steps=options.steps, generator=seed.manual_seed(0))

    ways = {"plain": draw(plain), "enabled": draw(enabled), "enabled, with guard": draw(guarded)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - start)
    print(f"{what}: {options.batch} images, {options.steps} steps, median of {options.rounds} rounds")
    for name, taken in times.items():
        ratio = statistics.median(own / ref for own, ref in zip(taken, times["plain"], strict=True))
        print(f"{name:<22}{statistics.median(taken):8.3f} s   {ratio:6.3f} x plain")


if __name__ == "__main__":
    main()
