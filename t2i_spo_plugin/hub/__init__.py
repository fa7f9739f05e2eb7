"""Publishing an adapter to the Hub: card, results, privacy, upload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .card_info import ModelCardInfo as ModelCardInfo
    from .publish import Published as Published
    from .publish import publish_adapter as publish_adapter

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ModelCardInfo": "card_info",
        "Published": "publish",
        "publish_adapter": "publish",
    },
)
