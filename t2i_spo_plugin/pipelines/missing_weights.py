"""The warnings of diffusers and transformers that an adapter's file lacks weights, where they are false.

Both ask whether the adapter's name is a part of a parameter's. So an adapter called `b` "lacks" the weights of every
other in `blocks`, and the biases of the model itself; transformers asks the same of `lora`, which is part of all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager


_LOGGERS = ("diffusers.utils.peft_utils", "diffusers.loaders.peft", "transformers.integrations.peft")
_DIFFUSERS = "Loading adapter weights from state_dict led to missing keys in the model: "
_TRANSFORMERS = "LOAD REPORT"


@contextmanager
def only_missing_from_new(others: Collection[str]) -> Iterator[None]:
    """While an adapter is added, those warnings name its own weights alone, and not those of `others` or the model."""
    alarm = _FalseAlarm(others)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(alarm)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(alarm)


class _FalseAlarm(logging.Filter):
    def __init__(self, others: Collection[str]) -> None:
        super().__init__()
        self.others = others

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if _DIFFUSERS in message:
            record.msg, record.args = self._list(message), ()
        elif _TRANSFORMERS in message:
            record.msg, record.args = self._table(message), ()
        return bool(record.msg)

    def _list(self, message: str) -> str:
        before, led_to, listed = message.partition(_DIFFUSERS)
        keys = [key for key in listed.rstrip(".").split(", ") if self._is_new(key)]
        return f"{before}{led_to}{', '.join(keys)}." if keys else before.rstrip()

    def _table(self, message: str) -> str:
        """The report without its false rows, and without the note on them when none is left; empty when no row is."""
        rows = [line for line in message.splitlines() if _status(line)]
        false = {row for row in rows if "MISSING" in _status(row) and not self._is_new(row)}
        left = [row for row in rows if row not in false]
        if not left:
            return ""
        lines = [line for line in message.splitlines() if line not in false]
        if not any("MISSING" in _status(row) for row in left):
            lines = [line for line in lines if not (line.startswith("- ") and "MISSING" in line)]
        return "\n".join(lines)

    def _is_new(self, key: str) -> bool:
        adapter = re.search(r"\.lo(?:ra|kr)_\w+\.([^.\s]+)", key)
        return adapter is not None and adapter[1] not in self.others


def _status(line: str) -> str:
    """What a row of the report says of its key; empty for what is no row."""
    key, _, status = line.partition(" | ")
    return "" if key.strip() == "Key" else status
