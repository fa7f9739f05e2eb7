"""What an evaluation measured of one adapter, as a model card and the Hub want it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_spo_plugin.errors import ConfigError, HubError, UnreadableFileError
from t2i_spo_plugin.files import read_json

from .privacy import visible, without_folders


if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["Measurement", "Results", "eval_result_yaml", "read_results"]

_TASK = "text-to-image"
_PROMPT_WORDS = {
    "harmful": "harmful prompts",
    "benign": "benign prompts",
    "lookalike": "benign prompts that look harmful",
}

_UNSAFE_PROMPTS = "Harmful prompts with at least one unsafe image among their seeds"
_UNREADABLE = "Unreadable images on harmful prompts"
_SAFE_SCENE = "Complete safe scene on harmful prompts: nothing unsafe, and every object of a safe counterpart"


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        key: short and unique, such as `uascore-referee`.
        name: for people.
        value, low, high: and its 95 % interval; UAScore from 0 to 100, shares from 0 to 1.
        base: the value of the base model without adapter; None when it was not measured.
        judge: what judged the images.
        prompts: how many, in words.
    """

    key: str
    name: str
    value: float
    low: float
    high: float
    base: float | None
    judge: str
    prompts: str

    @property
    def is_score(self) -> bool:
        return self.key.startswith("uascore")

    def text(self, value: float | None) -> str:
        """`value` in this number's unit."""
        if value is None:
            return "-"
        return f"{value:.1f}" if self.is_score else f"{100 * value:.1f} %"


@dataclass(frozen=True)
class Results:
    """What was measured of one system of an evaluation.

    Attributes:
        system: its name there.
        strength: at which the adapter was measured.
        version: of this package, which measured.
        prompts: how many of each kind, in words.
        images_not_scored: of this system.
        notes: what a reader must know, a sentence each.
        measurements: the numbers.
    """

    system: str
    strength: float
    version: str
    prompts: str
    images_not_scored: int
    notes: tuple[str, ...]
    measurements: tuple[Measurement, ...]

    def text_of(self, number: Measurement) -> str:
        """Everything that belongs to a number, in one line."""
        return (
            f"95 % interval {number.text(number.low)} to {number.text(number.high)}, base model "
            f"{number.text(number.base)}, {number.prompts}, judged by {number.judge}, strength {self.strength:g}, "
            f"t2i_spo_plugin {self.version}"
        )

    def eval_results(self, dataset: str) -> list[EvalResult]:
        """The entries of a card's `model-index`; `dataset` is the prompts' Hub id, empty when they have none."""
        from huggingface_hub import EvalResult

        return [
            EvalResult(
                task_type=_TASK,
                task_name="Text-to-image",
                dataset_type=dataset or "prompts",
                dataset_name=self.prompts,
                metric_type=number.key,
                metric_name=f"{number.name} ({self.text_of(number)})",
                metric_value=number.value,
            )
            for number in self.measurements
        ]


def read_results(path: str | Path, adapter_hashes: Collection[str], system: str = "") -> Results:
    """The numbers of one system in the `summary.json` of an evaluation (`spo eval`).

    Args:
        path: the file.
        adapter_hashes: `files.folder_hash` of the adapter's file or folder, by which its system is found.
        system: its name in the evaluation, needed when the adapter was measured at several strengths.

    Raises:
        ConfigError: not such a file, or the adapter was not measured in it.
    """
    try:
        content = read_json(Path(path))
        recorded = content["metadata"]["systems"]
        names = [name for name, metadata in recorded.items() if metadata.get("adapter_hash") in adapter_hashes]
        if system:
            names = [name for name in names if name == system]
        if not names:
            other = system in recorded
            mismatch = f"{system} is not this adapter there" if other else "this adapter is not among them"
            raise ConfigError(
                f"{Path(path).name} holds results of {', '.join(recorded)}, and {mismatch}: publish the file that was "
                "measured, or measure this one with spo eval"
            )
        if len(names) > 1:
            raise ConfigError(f"{Path(path).name} measured this adapter as {', '.join(names)}; say which as system")
        return _results(names[0], content)
    except UnreadableFileError as error:
        raise ConfigError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{Path(path).name} is not the summary.json of an evaluation: {error!r}") from error


def eval_result_yaml(results: Results, dataset: str) -> str:
    """The text of an `.eval_results/*.yaml` file; `dataset` is the Hub id of the prompts.

    Raises:
        HubError: this huggingface_hub does not know such files yet.
    """
    import yaml

    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError as error:
        raise HubError("this huggingface_hub knows no .eval_results files; upgrade it, or name no dataset") from error
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=number.key,
            value=number.value,
            notes=f"{number.name}: {results.text_of(number)}",
        )
        for number in results.measurements
    ]
    return str(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True, width=1000))


def _results(name: str, content: Mapping[str, Any]) -> Results:
    system, metadata = content["systems"][name], content["metadata"]
    base = next(iter(content["systems"].values()))
    measurements: list[Measurement] = []
    for key, rate, judge in (("referee_score", "referee_ip", "referee"), ("score", "ip", "cost-model")):
        score = system.get(key)
        if score is None:
            continue
        who = _judge(score["metadata"])
        harmful, benign = (f"{score[half]['n_prompts']} {half}" for half in ("harmful", "benign"))
        # A claim names its class of wordings.
        classes = score["metadata"].get("wordings") or ()
        worded = f" ({visible(', '.join(classes))})" if classes else ""
        measurements.append(
            _measurement(
                f"uascore-{judge}",
                f"UAScore ({score['version']})",
                {"value": score["uascore"], "interval": score["interval"]},
                (base.get(key) or {}).get("uascore"),
                who,
                f"{harmful} and {benign} prompts{worded}",
            )
        )
        measurements.append(
            _measurement(
                f"ip-{judge}",
                "Unsafe images on harmful prompts (IP)",
                system[rate],
                (base.get(rate) or {}).get("value"),
                who,
                f"{harmful} prompts{worded}",
            )
        )
        prefix = "referee_" if judge == "referee" else ""
        columns = {f"{prefix}unsafe_prompts": _UNSAFE_PROMPTS, f"{prefix}unreadable": _UNREADABLE}
        if judge == "referee":
            columns["safe_scene_complete"] = _SAFE_SCENE
        for column, title in columns.items():
            share = system.get(column)
            if share is not None:
                key = f"{column.removeprefix(prefix).replace('_', '-')}-{judge}"
                before = (base.get(column) or {}).get("value")
                measurements.append(_measurement(key, title, share, before, who, f"{harmful} prompts{worded}"))
    for kind, share in system.get("recognised_relative", {}).items():
        measurements.append(
            _measurement(
                f"preserved-{kind}",
                f"Requested objects recognised on {_PROMPT_WORDS[kind]}, as a share of the base model's",
                share,
                1.0,
                _judge(system["referee_score"]["metadata"]),
                f"{share['n']} {_PROMPT_WORDS[kind]}",
            )
        )
    main = system.get("referee_score") or system["score"]
    notes = [str(note) for note in main["notes"]]
    if main["quality_floor_ok"] is False:
        notes.append("The quality floor failed: on benign prompts quality is too far below the base model's.")
    if main["version"].startswith("uascore/2") and main["harmful"]["n_unreadable"] is None:
        notes.append("Whether images can be read at all was not asked: the judge does not say.")
    who = _judge(main["metadata"])
    for wording, one in (system.get("by_wording") or {}).items():
        of_base = (base.get("by_wording") or {}).get(wording, {})
        measurements.append(
            _measurement(
                f"ip-{re.sub(r'[^a-z0-9]+', '-', wording.lower())}",
                f"Unsafe images on harmful prompts (IP), wording: {visible(wording)}",
                one["ip"],
                (of_base.get("ip") or {}).get("value"),
                who,
                f"{one['n_harmful']} harmful prompts",
            )
        )
    counts = metadata["prompts"]
    prompts = ", ".join(f"{counts[kind]} {words}" for kind, words in _PROMPT_WORDS.items() if counts.get(kind))
    return Results(
        system=name,
        strength=float(metadata["systems"][name]["strength"]),
        version=visible(str(metadata["versions"]["t2i_spo_plugin"])),
        prompts=prompts,
        images_not_scored=sum(int(count) for count in system["not_scored"].values()),
        notes=tuple(notes),
        measurements=tuple(measurements),
    )


def _measurement(
    key: str, name: str, rate: Mapping[str, Any], base: float | None, judge: str, prompts: str
) -> Measurement:
    value, (low, high) = float(rate["value"]), (float(part) for part in rate["interval"])
    if not all(math.isfinite(number) for number in (value, low, high)) or not low <= high:
        raise ValueError(f"{key} is no number with an interval")
    return Measurement(key, name, value, low, high, None if base is None else float(base), judge, prompts)


def _judge(metadata: Mapping[str, Any]) -> str:
    """Such as `referee NAME` or `cost model NAME`, without the folders a model was loaded from."""
    judge = str(metadata["judge"])
    return without_folders(visible(f"cost model {metadata['cost_model']}" if judge == "cost model" else judge))
