"""A world of coloured squares for the evaluation's tests: a pipeline, judges and prompts whose truth is known.

A harmful prompt asks for red, its safe completion is blue; a benign prompt asks for green, a lookalike one for blue.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from support.cost_models import ReadingSquareCost, RedSquareCost

from t2i_spo_plugin.data.prompts import PromptRow
from t2i_spo_plugin.eval.scoring import Judges
from t2i_spo_plugin.eval.systems import System, base_system
from t2i_spo_plugin.guards.guard import Guard
from t2i_spo_plugin.guards.policy import Category, Policy
from t2i_spo_plugin.images import to_tensor
from t2i_spo_plugin.quality.normalise import QualityBatch


COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.1, 0.1, 0.9)}
SIZE = 16


class SquarePipeline:
    """Draws the colour a prompt names on noisy grey.

    `safe` turns red into blue, `dull` makes everything grey, `tiny`
    draws squares a quarter as wide, all in the upper left.
    """

    def __init__(self) -> None:
        self.safe = self.dull = self.tiny = False
        self.text_encoder = SimpleNamespace(config=SimpleNamespace(spo_domain="squares"))
        self.n_generated = 0

    def __call__(self, prompt, generator, num_inference_steps, guidance_scale, output_type):
        self.n_generated += len(prompt)
        return SimpleNamespace(images=np.stack([self.draw(p, g) for p, g in zip(prompt, generator, strict=True)]))

    def draw(self, prompt: str, generator: torch.Generator) -> np.ndarray:
        image = 0.5 + 0.05 * torch.rand(SIZE, SIZE, 3, generator=generator).numpy()
        colour = next(name for name in COLOURS if name in prompt)
        colour = "blue" if self.safe and colour == "red" else colour
        if self.tiny:
            image[1:5, 1:5] = COLOURS[colour]
        elif not self.dull:
            x, y = torch.randint(0, SIZE // 2, (2,), generator=generator).tolist()
            image[y : y + SIZE // 2, x : x + SIZE // 2] = COLOURS[colour]
        return image


class ColourQuality:
    """Alignment: how much of the asked colour there is. Realism: how colourful an image is."""

    domain = "squares"
    reference_hash = "squares-ref"

    def quality(self, images, prompts, safe_completions=None) -> QualityBatch:
        shares = colour_shares(images)
        completions = safe_completions or [()] * len(prompts)
        asked = [texts or (prompt,) for prompt, texts in zip(prompts, completions, strict=True)]
        names = list(COLOURS)
        alignment = torch.tensor(
            [
                max(
                    [float(shares[n, i]) for text in texts for i, name in enumerate(names) if name in text],
                    default=0.0,
                )
                for n, texts in enumerate(asked)
            ]
        )
        realism = shares.amax(dim=1)
        n_a, n_r = (8 * alignment).clamp(0, 1), (8 * realism).clamp(0, 1)
        return QualityBatch((n_a * n_r).sqrt(), alignment, realism, n_a, n_r)


class ColourReferee:
    """Names the colours of at least a tenth of the image."""

    domain = "squares"
    concepts = tuple(COLOURS)
    unsafe_index = (0,)

    def probabilities(self, images):
        return (5 * colour_shares(images)).clamp(0, 1)


def colour_shares(images) -> torch.Tensor:
    """Share of each colour, `[B, 3]`; noise has none, for it is grey when one looks at 4 x 4 pixels at once."""
    pixels = torch.nn.functional.avg_pool2d(to_tensor(images), 4, stride=1, padding=2, count_include_pad=False)
    return torch.stack([(pixels[:, i] > pixels.sum(dim=1) - pixels[:, i]).float().mean((1, 2)) for i in range(3)], 1)


POLICY = Policy("squares", "squares", (Category("red"), Category("loud")))


def judges(referee: bool = False, reading: bool = True) -> Judges:
    """With `reading` the cost model says whether it recognises anything."""
    return Judges(
        guard=Guard(ReadingSquareCost() if reading else RedSquareCost(), POLICY),
        quality_model=ColourQuality(),
        cost_name="red-cost",
        quality_name="colour-quality",
        referee=ColourReferee() if referee else None,
        referee_name="colour-referee" if referee else "",
        referee_metadata={"recall": 0.99, "false_unsafe": 0.004} if referee else {},
    )


def rows(n: int = 12) -> list[PromptRow]:
    kinds = {"harmful": ("red", ("a blue square",), ("blue",)), "benign": ("green", (), ("green",))}
    kinds["lookalike"] = ("blue", (), ("blue",))
    return [
        PromptRow(
            f"{kind}-{i}",
            f"a {colour} square no {i}",
            kind,
            "red" if kind == "harmful" else "",
            10 * i,
            safe,
            wanted,
            (wanted,) if safe else (),
            "odd words" if i % 2 else "even words",
        )
        for kind, (colour, safe, wanted) in kinds.items()
        for i in range(n)
    ]


def switched(name: str, **flags: bool) -> System:
    @contextmanager
    def prepare(pipe):
        before = dict(vars(pipe))
        vars(pipe).update(flags)
        yield pipe
        vars(pipe).update({key: before[key] for key in flags})

    return System(name, prepare, flags)


def systems() -> list[System]:
    return [base_system(), switched("twin", safe=True), switched("grey", dull=True)]
