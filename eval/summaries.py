"""What an evaluation says of a system, of a wording class and of two systems: numbers with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from t2i_spo_plugin.metrics import HalfSummary, Interval, Rate, ScoreSummary, percent


Judge = Literal["cost model", "referee"]


@dataclass(frozen=True)
class Relative:
    """A rate relative to the base model's on the same prompts and seeds, with a paired bootstrap interval."""

    value: float
    interval: Interval
    n: int

    def __str__(self) -> str:
        return percent(self.value, self.interval)


@dataclass(frozen=True)
class WordingSummary:
    """One wording class of one system, judged by the referee where it looked.

    Attributes:
        uascore, interval: from 0 to 100, with a bootstrap interval over prompts; None without harmful or benign ones.
        ip: share of unsafe images on harmful prompts.
        unsafe_prompts: share of harmful prompts with at least one unsafe image among their seeds.
        unreadable: share of unreadable images on harmful prompts; None where no judge was asked.
        safe_scene, safe_scene_complete: as in `SystemSummary`; None when no referee looked.
        recognised, complete: as in `SystemSummary`, on benign prompts; None when no referee looked.
        benign_quality: mean `q` on benign prompts; None without any.
        n_harmful, n_benign: prompts.
    """

    uascore: float | None
    interval: Interval | None
    ip: Rate
    unsafe_prompts: Rate
    unreadable: Rate | None
    safe_scene: Rate | None
    safe_scene_complete: Rate | None
    recognised: Rate | None
    complete: Rate | None
    benign_quality: float | None
    n_harmful: int
    n_benign: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True)
class SystemSummary:
    """One system in numbers. What the referee says is None when no referee looked.

    Attributes:
        score, referee_score: UAScore with its entourage. For the second the cost of an image is the referee's hard
            verdict, 1 for unsafe and 0 for safe; quality stays the quality model's.
        lookalike: mean `s`, `q`, `s * q` on benign prompts that look harmful; None when there are none.
        ip, referee_ip: share of unsafe images on harmful prompts, each image looked at in the fixed views.
        ip_once, referee_ip_once: the same, each image looked at once; None where that is not known.
        unsafe_prompts, referee_unsafe_prompts: share of harmful prompts with at least one unsafe image among their
            seeds.
        unreadable, referee_unreadable: share of images of harmful prompts in which the judge recognises nothing though
            they are not blank; None where it was not asked, or does not say.
        ip_by_category: IP for each category that harmful prompts aim at, by the referee when there is one.
        by_wording: the numbers of each wording class; empty where the prompts name none.
        recognised: requested objects that the referee recognises, of all requested, on `benign` and `lookalike`
            prompts.
        recognised_relative: `recognised` relative to the base's.
        complete: images in which all requested objects are recognised.
        safe_scene: images of harmful prompts with nothing unsafe and at least one object of a safe completion.
        safe_scene_complete: images of harmful prompts with nothing unsafe and every object of one safe completion.
        agreement: images on which cost model and referee give the same verdict.
    """

    system: str
    score: ScoreSummary
    referee_score: ScoreSummary | None
    lookalike: HalfSummary | None
    ip: Rate
    ip_once: Rate | None
    unsafe_prompts: Rate
    unreadable: Rate | None
    referee_ip: Rate | None
    referee_ip_once: Rate | None
    referee_unsafe_prompts: Rate | None
    referee_unreadable: Rate | None
    ip_by_category: Mapping[str, Rate]
    by_wording: Mapping[str, WordingSummary]
    recognised: Mapping[str, Rate]
    recognised_relative: Mapping[str, Relative]
    complete: Mapping[str, Rate]
    safe_scene: Rate | None
    safe_scene_complete: Rate | None
    agreement: Rate | None
    not_scored: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.name != "system"}


@dataclass(frozen=True)
class Comparison:
    """UAScore and IP of `first` minus those of `second`, paired over prompts and seeds.

    Attributes:
        value, interval: of UAScore, in points.
        ip, ip_interval: of IP, from -1 to 1.
        wording: the class of the prompts; empty for all of them.

    Intervals are over prompts: the images of one prompt go together.
    """

    first: str
    second: str
    judge: Judge
    value: float
    interval: Interval
    ip: float
    ip_interval: Interval
    n_harmful: int
    n_benign: int
    wording: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        verdict = "excludes 0" if self.interval.excludes(0.0) else "includes 0"
        of = f"{self.first} - {self.second}" + (f", {self.wording}" if self.wording else "")
        return (
            f"{of}, by the {self.judge}: {_signed(self.value)} "
            f"[{_signed(self.interval.low)}, {_signed(self.interval.high)}] ({verdict}); IP {_signed(100 * self.ip)} "
            f"[{_signed(100 * self.ip_interval.low)}, {_signed(100 * self.ip_interval.high)}] points"
        )


def _signed(points: float) -> str:
    """`+1.2`, `-1.2`, or `0.0` for whatever rounds to it."""
    return f"{points:+.1f}" if round(points, 1) else "0.0"


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, HalfSummary):
        return {key: list(part) if isinstance(part, tuple) else part for key, part in asdict(value).items()}
    if isinstance(value, Relative):
        return {"value": value.value, "interval": list(value.interval), "n": value.n}
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, Interval) else value
