"""A model called with a whole batch, and with one item at a time when the batch fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar


Item = TypeVar("Item")
Result = TypeVar("Result")


def isolate_failures(
    call: Callable[[Sequence[Item]], Sequence[Result | str]], items: Sequence[Item], prefix: str = ""
) -> list[Result | str]:
    """One result for each item, or the reason why it has none; an item that fails spoils no other.

    The whole batch goes first, for that is fast. When it fails, each item goes alone, so that the reason is that of
    the item which caused it. The reason belongs into the item's row or report, where every reader sees it.

    Args:
        call: gives a result for each of the items it gets, or, as text, the reason why it has none.
        items: any number; nothing is called without one.
        prefix: what the reason of an error begins with, such as "the cost model failed: ".
    """
    if not items:
        return []
    try:
        results = list(call(items))
        if len(results) != len(items):
            raise ValueError(f"{len(results)} results for {len(items)} items")
        return results
    except Exception as error:
        if len(items) > 1:
            return [result for item in items for result in isolate_failures(call, [item], prefix)]
        return [f"{prefix}{type(error).__name__}: {error}"]
