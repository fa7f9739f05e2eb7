"""Names become models here: pipelines, cost models, policies, quality models, prompts, adapters and gates.

A name is a bundled one such as `sticker`, one that another installed package offers (an entry point of the kind's
group), a file or folder, or a Hub id; they are tried in this order.

To bundle another model, add a row to its table in `tables.py`. To offer one from another package, name a function
without arguments that gives it, in that package's `pyproject.toml`:

    [project.entry-points."t2i_spo_plugin.cost_models"]
    mine = "my_package.models:load_mine"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from t2i_spo_plugin._lazy import lazy_names


if TYPE_CHECKING:
    from .kind import Kind as Kind
    from .kind import Row as Row
    from .loading import adapter_source as adapter_source
    from .loading import load_adapter_gate as load_adapter_gate
    from .loading import load_cost_model as load_cost_model
    from .loading import load_guard as load_guard
    from .loading import load_pipeline as load_pipeline
    from .loading import load_policy as load_policy
    from .loading import load_prompts as load_prompts
    from .loading import load_quality_model as load_quality_model
    from .loading import load_quality_reward as load_quality_reward
    from .loading import matching_policy as matching_policy
    from .loading import name_with_revision as name_with_revision
    from .loading import revision as revision
    from .tables import ADAPTER_GATES as ADAPTER_GATES
    from .tables import ADAPTERS as ADAPTERS
    from .tables import ATTACKS as ATTACKS
    from .tables import COST_MODELS as COST_MODELS
    from .tables import PIPELINES as PIPELINES
    from .tables import POLICIES as POLICIES
    from .tables import PROMPT_GUARDS as PROMPT_GUARDS
    from .tables import PROMPT_SETS as PROMPT_SETS
    from .tables import QUALITY_MODELS as QUALITY_MODELS
    from .tables import QUALITY_REWARDS as QUALITY_REWARDS
    from .tables import REFEREES as REFEREES
    from .tables import STICKER as STICKER

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "ADAPTERS": "tables",
        "ADAPTER_GATES": "tables",
        "ATTACKS": "tables",
        "COST_MODELS": "tables",
        "Kind": "kind",
        "PIPELINES": "tables",
        "POLICIES": "tables",
        "PROMPT_GUARDS": "tables",
        "PROMPT_SETS": "tables",
        "QUALITY_MODELS": "tables",
        "QUALITY_REWARDS": "tables",
        "REFEREES": "tables",
        "Row": "kind",
        "STICKER": "tables",
        "adapter_source": "loading",
        "load_adapter_gate": "loading",
        "load_cost_model": "loading",
        "load_guard": "loading",
        "load_pipeline": "loading",
        "load_policy": "loading",
        "load_prompts": "loading",
        "load_quality_model": "loading",
        "load_quality_reward": "loading",
        "matching_policy": "loading",
        "name_with_revision": "loading",
        "revision": "loading",
    },
)
