"""What counts as unsafe: categories with a threshold and a display weight each, in a YAML file the user can edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_spo_plugin.errors import ConfigError, PolicyError
from t2i_spo_plugin.metrics import UNSAFE_COST
from t2i_spo_plugin.options import read_mapping


@dataclass(frozen=True)
class Category:
    """One category of a policy.

    Attributes:
        name: as the cost model names it.
        threshold: the calibrated probability, strictly between 0 and 1, that becomes cost 0.5.
        weight: how much the category counts in displays and sampling, at least 0; it does not enter the cost.
        enabled: whether the category counts as unsafe at all.
        description: a sentence for people, and for cost models that read a policy in words.
        temperature: of the cost model's logits in this category, in the place of its own; `spo calibrate` writes it.
    """

    name: str
    threshold: float = 0.5
    weight: float = 1.0
    enabled: bool = True
    description: str = ""
    temperature: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise PolicyError(f"a category needs a name, got {self.name!r}")
        if not _is_number(self.threshold) or not 0.0 < self.threshold < 1.0:
            raise PolicyError(f"{self.name}: threshold must lie strictly between 0 and 1, got {self.threshold!r}")
        if not _is_number(self.weight) or self.weight < 0.0:
            raise PolicyError(f"{self.name}: weight must be a finite number of at least 0, got {self.weight!r}")
        if not isinstance(self.enabled, bool):
            raise PolicyError(f"{self.name}: enabled must be true or false, got {self.enabled!r}")
        if not isinstance(self.description, str):
            raise PolicyError(f"{self.name}: description must be text, got {self.description!r}")
        if self.temperature is not None and (not _is_number(self.temperature) or self.temperature <= 0.0):
            raise PolicyError(f"{self.name}: temperature must be a positive number, got {self.temperature!r}")


@dataclass(frozen=True)
class Policy:
    """Categories that count as unsafe in one domain.

    Raises:
        PolicyError: no category, none enabled, or two with one name.
    """

    name: str
    domain: str
    categories: tuple[Category, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "categories", tuple(self.categories))
        for field in ("name", "domain"):
            value = getattr(self, field)
            if not isinstance(value, str) or not value.strip():
                raise PolicyError(f"a policy needs a {field}, got {value!r}")
        names = [category.name for category in self.categories]
        if len(set(names)) != len(names):
            raise PolicyError(f"policy {self.name}: category names must differ, got {names}")
        if not self.enabled:
            raise PolicyError(f"policy {self.name}: no category is enabled, so every image would count as safe")

    @property
    def enabled(self) -> tuple[Category, ...]:
        """The categories that count, in the order of the file."""
        return tuple(category for category in self.categories if category.enabled)

    def category_costs(
        self, logits: Tensor, temperature: Tensor, categories: Sequence[str]
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Cost per enabled category: `sigmoid(logit / temperature)`, stretched so that the threshold lands on 0.5.

        Args:
            logits: `[B, K]`; NaN stays NaN.
            temperature: `[K]`, positive.
            categories: the K names of the cost model, in the order of the logits.

        Returns:
            `c [B, K']` in [0, 1] and the K' names, both in the policy's order.

        Raises:
            PolicyError: shapes disagree, or an enabled category is unknown to the cost model.
        """
        position = self._positions(categories)
        temperature = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
        if logits.ndim != 2 or logits.shape[1] != len(categories) or temperature.shape != (len(categories),):
            raise PolicyError(
                f"expected logits [B, {len(categories)}] and temperature [{len(categories)}], got "
                f"{tuple(logits.shape)} and {tuple(temperature.shape)}"
            )
        if not bool((temperature > 0).all()):
            raise PolicyError(f"temperatures must be positive, got {temperature.tolist()}")
        temperature = self.temperatures(temperature, categories)
        probability = torch.sigmoid(logits.float() / temperature)[:, position]
        threshold = torch.tensor([category.threshold for category in self.enabled], device=logits.device)
        return stretch(probability, threshold), tuple(category.name for category in self.enabled)

    def temperatures(self, temperature: Tensor, categories: Sequence[str]) -> Tensor:
        """The cost model's `temperature` `[K]`, with the policy's own where it states one."""
        stated = {category.name: category.temperature for category in self.categories}
        own = [stated.get(name) for name in categories]
        values = [float(old) if new is None else new for old, new in zip(temperature, own, strict=True)]
        return torch.tensor(values, dtype=torch.float32, device=temperature.device)

    def cost(self, category_costs: Tensor) -> Tensor:
        """Safety cost `C [B]`: the maximum over `c [B, K']` as `category_costs` gives it; NaN stays NaN."""
        if category_costs.ndim != 2 or category_costs.shape[1] != len(self.enabled):
            raise PolicyError(
                f"expected costs [B, {len(self.enabled)}] of the enabled categories, got {tuple(category_costs.shape)}"
            )
        return category_costs.amax(dim=1)

    def _positions(self, categories: Sequence[str]) -> list[int]:
        known = list(categories)
        missing = [category.name for category in self.enabled if category.name not in known]
        if missing:
            raise PolicyError(
                f"policy {self.name} asks for {', '.join(missing)}, but the cost model knows only "
                f"{', '.join(known)}; disable those categories or use another cost model"
            )
        return [known.index(category.name) for category in self.enabled]

    @classmethod
    def from_yaml(cls, path: str | Path) -> Policy:
        """Read a policy file.

        Raises:
            PolicyError: the file is missing, is not YAML, or says something a policy does not have.
        """
        try:
            content = _checked_mapping(read_mapping(path), {"name", "domain", "categories"}, str(path))
        except ConfigError as error:
            raise PolicyError(str(error)) from error
        rows = content.get("categories")
        if not isinstance(rows, list):
            raise PolicyError(f"{path}: categories must be a list, got {rows!r}")
        known = {field.name for field in fields(Category)}
        categories = []
        for row in rows:
            row = _checked_mapping(row, known, f"{path}: a category")
            if "name" not in row:
                raise PolicyError(f"{path}: a category needs a name, got {row!r}")
            categories.append(Category(**row))
        return cls(name=content.get("name", ""), domain=content.get("domain", ""), categories=tuple(categories))

    def to_yaml(self) -> str:
        """The policy as YAML text; `from_yaml` reads it back to an equal policy."""
        import yaml

        content = {
            "name": self.name,
            "domain": self.domain,
            "categories": [
                {name: value for name, value in asdict(category).items() if value is not None}
                for category in self.categories
            ],
        }
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def stretch(probability: Tensor, threshold: Tensor | float) -> Tensor:
    """Piecewise linear map of [0, 1] onto itself that fixes 0 and 1 and sends `threshold` to the boundary, 0.5."""
    below = UNSAFE_COST * probability / threshold
    above = UNSAFE_COST + (1.0 - UNSAFE_COST) * (probability - threshold) / (1.0 - threshold)
    return torch.where(probability < threshold, below, above)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _checked_mapping(content: Any, known: set[str], where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise PolicyError(f"{where}: expected a mapping with {', '.join(sorted(known))}, got {content!r}")
    unknown = sorted(str(key) for key in content if key not in known)
    if unknown:
        raise PolicyError(f"{where}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return content
