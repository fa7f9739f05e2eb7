"""When an adapter is on: strength schedules and the adapter gate; tensors only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .gate import AdapterGate as AdapterGate
    from .gate import GateReport as GateReport
    from .gate import GateState as GateState
    from .gate import norm_score as norm_score
    from .gate import pick_rows as pick_rows
    from .gate import rows_of_images as rows_of_images
    from .gate_file import gate_metadata as gate_metadata
    from .gate_file import load_adapter_gate as load_adapter_gate
    from .gate_file import save_adapter_gate as save_adapter_gate
    from .gate_network import GateNetwork as GateNetwork
    from .gate_network import change_features as change_features
    from .schedule import FULL_WINDOW as FULL_WINDOW
    from .schedule import Schedule as Schedule
    from .schedule import check_window as check_window
    from .schedule import in_window as in_window

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "AdapterGate": "gate",
        "FULL_WINDOW": "schedule",
        "GateNetwork": "gate_network",
        "GateReport": "gate",
        "GateState": "gate",
        "Schedule": "schedule",
        "change_features": "gate_network",
        "check_window": "schedule",
        "gate_metadata": "gate_file",
        "in_window": "schedule",
        "load_adapter_gate": "gate_file",
        "norm_score": "gate",
        "pick_rows": "gate",
        "rows_of_images": "gate",
        "save_adapter_gate": "gate_file",
    },
)
