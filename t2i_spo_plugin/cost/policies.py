"""The words of a policy, for models that read one; what counts as unsafe decides `guards.Policy`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_spo_plugin.errors import ConfigError
from t2i_spo_plugin.options import read_mapping


def checked_policies(policies: Any, bundled: str) -> dict[str, str]:
    """By category, what it is: `policies`, or those of the bundled policy.

    Raises:
        ConfigError: no mapping from names to texts.
    """
    if policies is None:
        content = read_mapping(Path(__file__).parent / f"{bundled}.yaml")
        return {row["name"]: row["description"] for row in content["categories"]}
    texts = policies.items() if isinstance(policies, Mapping) else ()
    if not texts or not all(isinstance(word, str) and word.strip() for pair in texts for word in pair):
        raise ConfigError(f"policies must say in words what each category is, got {policies!r}")
    return dict(texts)
