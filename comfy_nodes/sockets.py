"""The types of this pack's own sockets."""

from __future__ import annotations

from comfy_api.v0_0_2 import io


Adapters = io.Custom("SPO_ADAPTER")
"""Carries a `patching.Stack`: adapters, each with its strength."""

CostModel = io.Custom("SPO_COST_MODEL")
"""Carries a `Guard`: a cost model with its policy."""

Safety = io.Custom("SPO_SAFETY")
"""Carries a `scored.ScoredImages`."""

Scores = io.Custom("SPO_SCORES")
"""Carries a `ScoreSummary`."""
