"""When an adapter is on: strength schedules and the adapter gate; tensors only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .gate_network import GateNetwork as GateNetwork
    from .gate_network import change_features as change_features
    from .gate_network import gate_metadata as gate_metadata
    from .gate_network import load_adapter_gate as load_adapter_gate
    from .gate_network import save_adapter_gate as save_adapter_gate
    from .schedule import FULL_WINDOW as FULL_WINDOW
    from .schedule import AdapterGate as AdapterGate
    from .schedule import check_window as check_window
    from .schedule import norm_score as norm_score
    from .schedule import pick_rows as pick_rows
    from .schedule import rows_of_images as rows_of_images

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "AdapterGate": "schedule",
        "FULL_WINDOW": "schedule",
        "GateNetwork": "gate_network",
        "change_features": "gate_network",
        "check_window": "schedule",
        "gate_metadata": "gate_network",
        "load_adapter_gate": "gate_network",
        "norm_score": "schedule",
        "pick_rows": "schedule",
        "rows_of_images": "schedule",
        "save_adapter_gate": "gate_network",
    },
)
