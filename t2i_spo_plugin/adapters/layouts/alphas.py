"""The alpha of every module, from the configuration that PEFT and diffusers keep beside the weights.

PEFT takes the keys of `alpha_pattern` for regular expressions. A file from elsewhere may not choose which expressions
are run, since some take for ever: understood are module names, escaped or not, `.*`, `^` and `$`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from t2i_spo_plugin.errors import InvalidAdapterError, UnsupportedAdapterError
from t2i_spo_plugin.files import quoted


_MOST_WILDCARDS = 100
_LITERAL = re.compile(r"[\w.-]*")
_ESCAPED = re.compile(r"\\([.-])")


def configured_alphas(ranks: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, float]:
    """The alpha of every module path in `ranks`: of the first pattern that matches its end, else `lora_alpha`.

    Raises:
        UnsupportedAdapterError: another method than LoRA, or a pattern that is a more general regular expression.
        InvalidAdapterError: an alpha is no number, or the patterns are no mapping.
    """
    method = config.get("peft_type") or "LORA"
    if method != "LORA":
        raise UnsupportedAdapterError(f"the adapter is of PEFT's type {quoted(str(method))}; only LORA is understood")
    if config.get("use_dora"):
        raise UnsupportedAdapterError(
            "the file holds DoRA weights, which change the base's norm; only plain LoRA is understood"
        )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise InvalidAdapterError(f"alpha_pattern must map names to numbers, got {type(patterns).__name__}")
    rules = _Rules([(pattern, _number(value, pattern)) for pattern, value in patterns.items()])
    default = config.get("lora_alpha")
    alphas = {}
    for path, rank in ranks.items():
        # Newer versions of transformers leave `text_model.` out of a CLIP module's path.
        alpha = next((a for a in map(rules.find, (path, path.removeprefix("text_model."))) if a is not None), None)
        if alpha is None:
            alpha = float(rank) if default is None else _number(default, "lora_alpha")
        alphas[path] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
    return alphas


class _Rules:
    """Patterns in their order, looked up by name unless they have a wildcard."""

    def __init__(self, rules: list[tuple[str, float]]) -> None:
        self._whole: dict[str, tuple[int, float]] = {}
        self._tails: dict[str, tuple[int, float]] = {}
        self._wildcards: list[tuple[int, float, bool, list[str]]] = []
        for order, (pattern, alpha) in enumerate(rules):
            anchored = pattern.startswith("^")
            pieces = pattern.removeprefix("^").removesuffix("$").split(".*")
            pieces = [_ESCAPED.sub(r"\1", piece) for piece in pieces]
            if not any(pieces) or not all(_LITERAL.fullmatch(piece) for piece in pieces):
                raise UnsupportedAdapterError(
                    f"alpha_pattern {quoted(pattern)} is a regular expression; understood are module names "
                    "with .*, ^ and $"
                )
            if len(pieces) > 1:
                self._wildcards.append((order, alpha, anchored, pieces))
            else:
                (self._whole if anchored else self._tails).setdefault(pieces[0], (order, alpha))
        if len(self._wildcards) > _MOST_WILDCARDS:
            raise UnsupportedAdapterError(
                f"alpha_pattern has {len(self._wildcards)} entries with a wildcard, more than {_MOST_WILDCARDS}"
            )

    def find(self, path: str) -> float | None:
        words = path.split(".")
        rules = [self._tails.get(".".join(words[n:])) for n in range(len(words))] + [self._whole.get(path)]
        for order, alpha, anchored, pieces in self._wildcards:
            if _matches(path, anchored, pieces):
                rules.append((order, alpha))
                break
        return min((rule for rule in rules if rule is not None), default=(0, None))[1]


def _matches(path: str, anchored: bool, pieces: list[str]) -> bool:
    """Whether `path`, or unless anchored a tail of it after a dot, is `pieces` with anything between them."""
    first, *middle, last = pieces
    if anchored:
        at = 0 if path.startswith(first) else -1
    else:
        at = f".{path}".find(f".{first}")
    if at < 0:
        return False
    at += len(first)
    for piece in middle:
        at = path.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return path.endswith(last) and len(path) - len(last) >= at


def _number(alpha: Any, where: str) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise InvalidAdapterError(f"{quoted(where)}: alpha must be a number, got {quoted(str(alpha))}")
    try:
        return float(alpha)
    except OverflowError as error:
        raise InvalidAdapterError(f"{quoted(where)}: alpha is too large") from error
