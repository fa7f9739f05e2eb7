"""Every bad input ends in one of these errors, with a sentence: what is wrong, what was expected, what to do."""

from __future__ import annotations

import importlib
from types import ModuleType


class SPOError(Exception):
    """Base of all errors this package raises on purpose."""


class UnreadableFileError(SPOError, ValueError):
    """A file that cannot be read, or does not hold what its name says."""


class AdapterError(SPOError, ValueError):
    """An adapter file is broken, unsafe to open, or does not fit the pipeline; one of the kinds below says which."""


class UnreadableAdapterError(AdapterError, UnreadableFileError):
    """No file that can be opened: missing, cut off, a broken header, a pickle, or something else than safetensors."""


class UnsupportedAdapterError(AdapterError):
    """A file in order, of something that is not understood here: another method, layout, type, or a whole model."""


class InvalidAdapterError(AdapterError):
    """A LoRA whose content is invalid: a matrix is missing, an alpha is out of range, NaN, Inf, all zero."""


class IncompatibleAdapterError(AdapterError):
    """A valid adapter that was made for another model than this pipeline, or than the adapter it is to join."""


class ConfigError(SPOError, ValueError):
    """An option or argument is outside its range."""


class DomainError(SPOError, ValueError):
    """A cost model was asked to judge images of a domain it was not made for."""


class HubError(SPOError, OSError):
    """The Hub cannot be reached, refuses what was asked of it, or does not hold what was sent."""


class ImageError(SPOError, ValueError):
    """An image has the wrong shape, type or range, or holds NaN."""


class MissingExtraError(SPOError, ImportError):
    """An optional dependency is not installed."""


class NoPairsError(SPOError):
    """A pair table was made and holds no pair."""


class NoMapError(SPOError, ValueError):
    """A cost map was asked for, and the cost model does not say where in the image the cost comes from."""


class NotScoredError(SPOError):
    """An image could not be scored where a score is required."""


class PipelineError(SPOError, TypeError):
    """A pipeline cannot do what was asked of it."""


class PolicyError(SPOError, ValueError):
    """A policy is malformed, or asks for a category that the cost model does not know."""


class TableError(SPOError, ValueError):
    """A table lacks columns, has wrong types, or holds rows that contradict each other."""


def require_extra(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        MissingExtraError: `module` itself is not installed. An import error inside an installed module passes through.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise MissingExtraError(
            f"{module} is not installed; install it with: pip install 't2i_spo_plugin[{extra}]'", name=error.name
        ) from error
