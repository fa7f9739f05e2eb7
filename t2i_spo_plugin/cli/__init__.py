"""The command `spo`."""

from .commands import main as main
