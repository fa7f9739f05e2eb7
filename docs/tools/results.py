"""The tables of docs/results.md and README.md, from the JSON files that the commands beside them wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


STICKER = Path(__file__).parents[2] / "t2i_spo_plugin" / "sticker"
SYSTEMS = {"base": "base model", "dpo": "plain Diffusion-DPO", "spo": "SPO"}


def read(name: str) -> dict[str, Any]:
    """A JSON file below the sticker package."""
    content: dict[str, Any] = json.loads((STICKER / name).read_text(encoding="utf-8"))
    return content


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 0) -> str:
    """A Markdown table; numbers stand to the right, the first column and the last `texts` to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1 - texts), *["---"] * texts], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(rate: Mapping[str, Any]) -> str:
    """Value and interval of a share."""
    low, high = rate["interval"]
    return f"{100 * rate['value']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def score(value: float, interval: Sequence[float]) -> str:
    """Value and interval of a UAScore."""
    return f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def points(one: Mapping[str, Any], factor: float = 1.0) -> str:
    """A signed difference with its interval."""
    low, high = one["interval"]
    return f"{factor * one['value']:+.1f} [{factor * low:+.1f}, {factor * high:+.1f}]"


def main_table() -> str:
    """Base, plain Diffusion-DPO and SPO, by the referee."""
    found = read("results.json")["systems"]
    return table(
        (
            "by the referee",
            "UAScore",
            "unsafe images (IP), harmful",
            "objects recognised, benign",
            "the same, over-refusal",
        ),
        [
            (
                title,
                score(found[name]["referee_score"]["uascore"], found[name]["referee_score"]["interval"]),
                percent(found[name]["referee_ip"]),
                percent(found[name]["recognised"]["benign"]),
                percent(found[name]["recognised"]["lookalike"]),
            )
            for name, title in SYSTEMS.items()
        ],
    )


def judges_table() -> str:
    """UAScore and what it is made of, by both judges."""
    rows = []
    for name, title in SYSTEMS.items():
        one = read("results.json")["systems"][name]
        for judge, part in (("referee", one["referee_score"]), ("cost model", one["score"])):
            ip = {"value": part["ip"], "interval": part["ip_interval"]}
            harmful, benign = part["harmful"], part["benign"]
            means = [f"{half[key]:.3f}" for half in (harmful, benign) for key in ("mean_safety", "mean_quality")]
            rows.append((f"{title}, by the {judge}", score(part["uascore"], part["interval"]), percent(ip), *means))
    head = ("system and judge", "UAScore", "IP", "harmful: mean s", "mean q", "benign: mean s", "mean q")
    return table(head, rows)


def differences_table() -> str:
    """UAScore differences, paired over prompts and seeds."""
    rows = [
        (f"{SYSTEMS[one['first']]} - {SYSTEMS[one['second']]}", one["judge"], points(one))
        for one in read("results.json")["comparisons"]
        if not one.get("wording")
    ]
    return table(("difference of UAScore", "judge", "value"), rows)


def details_table() -> str:
    """What else the referee counts."""
    systems = read("results.json")["systems"]
    rows = [
        ("harmful: safe scene, partial", *(percent(systems[name]["safe_scene"]) for name in SYSTEMS)),
        (
            "benign: objects, relative to the base",
            *(percent(systems[name]["recognised_relative"]["benign"]) for name in SYSTEMS),
        ),
        (
            "over-refusal: objects, relative to the base",
            *(percent(systems[name]["recognised_relative"]["lookalike"]) for name in SYSTEMS),
        ),
        ("over-refusal: mean q", *(f"{systems[name]['lookalike']['mean_quality']:.3f}" for name in SYSTEMS)),
        (
            "over-refusal: images called unsafe, by the cost model",
            *(f"{systems[name]['lookalike']['n_unsafe']} of {systems[name]['lookalike']['n']}" for name in SYSTEMS),
        ),
        ("cost model and referee agree", *(percent(systems[name]["agreement"]) for name in SYSTEMS)),
    ]
    further = {
        "harmful: safe scene, complete": "safe_scene_complete",
        "harmful: prompts with an unsafe image": "referee_unsafe_prompts",
        "harmful: unreadable images": "referee_unreadable",
        "harmful: unsafe images, looked at once": "referee_ip_once",
    }
    for title, key in further.items():
        if all(key in systems[name] for name in SYSTEMS):
            rows.insert(0, (title, *(_share(systems[name][key]) for name in SYSTEMS)))
    return table(("", *SYSTEMS.values()), rows)


def categories_table() -> str:
    """IP of each category that harmful prompts aim at, by the referee."""
    systems = read("results.json")["systems"]
    rows = [
        (
            f"{category} ({one['n']} prompts)",
            *(percent(systems[name]["ip_by_category"][category]) for name in SYSTEMS),
        )
        for category, one in systems["base"]["ip_by_category"].items()
    ]
    return table(("unsafe images (IP)", *SYSTEMS.values()), rows)


def referee_table() -> str:
    """How good the referee itself is, on scenes whose truth is known."""
    found = read("results.json")["metadata"]["referee"]
    rows = [
        (
            name,
            f"{100 * one['recall'][0]:.2f} % of {one['recall'][1]}",
            f"{100 * one['precision']:.2f} %",
            f"{100 * one['false_unsafe'][0]:.2f} % of {one['false_unsafe'][1]}",
            ", ".join(
                f"{concept} {share}" for concept, share in one["most_missed"].items() if not share.startswith("0/")
            ),
        )
        for name, one in found.items()
        if isinstance(one, dict)
    ]
    return table(("scenes", "recall of concepts", "precision", "false unsafe", "most missed"), rows, texts=1)


def composition_table() -> str:
    """Safety and style adapters, side by side and one after the other."""
    rows = [
        (
            name,
            percent(one["ip"]),
            percent(one["recognised"]),
            percent(one["styled"]),
            f"{one['combined_strength']:.2f}",
        )
        for name, one in read("composition.json")["systems"].items()
    ]
    return table(("system", "unsafe images (IP)", "objects recognised", "in the style", "combined strength"), rows)


def composition_differences() -> str:
    """IP differences to the safety adapter alone, in points."""
    rows = [(name, points(one, 100)) for name, one in read("composition.json")["differences"].items()]
    return table(("difference of IP, in points", "paired over prompts"), rows)


def strengths_table() -> str:
    """Both adapters at rising strength."""
    rows = [
        (level, f"{one['combined_strength']:.2f}", f"{one['change']:.3f}", percent(one["recognised_relative"]))
        for level, one in read("composition.json")["strengths"].items()
    ]
    head = ("strength of both", "combined strength", "change of the weights", "objects, relative to the base")
    return table(head, rows)


def steering_table() -> str:
    """Constant strengths, windows and adapter gates."""
    rows = [
        (
            name,
            percent(one["ip"]),
            percent(one["recognised_relative"]) if one["recognised_relative"] else "",
            percent(one["identical"]),
            score(one["uascore"]["value"], one["uascore"]["interval"]),
        )
        for name, one in read("steering.json")["systems"].items()
    ]
    return table(
        ("system", "unsafe images (IP)", "objects, relative to the base", "images of the base", "UAScore"), rows
    )


def steering_differences() -> str:
    """IP differences to constant strength 1, in points."""
    rows = [(f"{name} - strength 1", points(one, 100)) for name, one in read("steering.json")["differences"].items()]
    return table(("difference of IP, in points", "paired over prompts"), rows)


def ideal_table() -> str:
    """UAScore of ideal systems: what it should be, and what it is by each judge."""
    found = read("ideal.json")
    judges = [key for key in next(iter(found.values())) if key != "promised" and not key.endswith(" holds")]
    rows = []
    for name, one in found.items():
        marks = ["" if one.get(f"{judge} holds") in (None, True) else " (missed)" for judge in judges]
        cells = [f"{one[judge]:.1f}{mark}" for judge, mark in zip(judges, marks, strict=True)]
        rows.append((name, str(one["promised"]).removesuffix(".0"), *cells))
    return table(("ideal system", "UAScore by definition", *judges), rows)


def wording_table() -> str:
    """By wording class: what each system does with harmful and with benign prompts, by the referee where it looked."""
    systems = read("results.json")["systems"]
    classes = list(dict.fromkeys(name for one in systems.values() for name in one.get("by_wording") or {}))
    if not classes:
        return "The stored results are of one wording class, the grammar of training."
    shares = ("ip", "unsafe_prompts", "unreadable", "safe_scene_complete", "recognised")
    rows = []
    for wording in classes:
        for name, title in SYSTEMS.items():
            one = systems[name]["by_wording"][wording]
            whole = "" if one["uascore"] is None else score(one["uascore"], one["interval"])
            rows.append((f"{wording}, {title}", whole, *(_share(one[key]) for key in shares)))
    head = ("wording and system", "UAScore", "unsafe images (IP)", "prompts with an unsafe image", "unreadable")
    return table((*head, "complete safe scene", "benign: objects recognised"), rows)


def _share(rate: Mapping[str, Any] | None) -> str:
    return "not asked" if rate is None else percent(rate)


def cost_model_table() -> str:
    """The bundled cost model on test scenes and on the held-out style."""
    found = read("cost_model/report.json")["measured"]
    rows = [
        (name.replace("auc_", "AUC, ").replace("_", " "), *(_value(part[name]) for part in found.values()))
        for name in next(iter(found.values()))
    ]
    return table(("cost model", *found), rows)


def models_table() -> str:
    """The other bundled models, each by its own report."""
    rows = []
    for title, path in (
        ("generator", "pipeline/report.json"),
        ("alignment", "quality_model/alignment/report.json"),
        ("realism", "quality_model/realism/report.json"),
    ):
        for name, value in _flat(read(path)["measured"]):
            rows.append((f"{title}: {name}", value))
    return table(("model and measure", "value"), rows)


def training_table() -> str:
    """How long each bundled model was trained."""
    rows = []
    for title, path in (
        ("generator", "pipeline"),
        ("cost model", "cost_model"),
        ("alignment", "quality_model/alignment"),
        ("realism", "quality_model/realism"),
        ("referee", "referee"),
    ):
        rows.append((title, *_effort(read(f"{path}/report.json")), f"`t2i_spo_plugin/sticker/{path}/report.json`"))
    return table(("model", "steps", "minutes", "report"), rows, texts=1)


def _effort(report: Mapping[str, Any]) -> tuple[str, str]:
    return str(report["steps"]), f"{report['minutes']:.1f}"


def _flat(content: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{above}{name}: ")
        # Timings of a busy machine say nothing of another one.
        elif not isinstance(value, str) and "seconds" not in name:
            rows.append((f"{above}{name}".replace("picture", "image"), _value(value)))
    return rows


def _value(value: Any) -> str:
    if isinstance(value, list) and isinstance(value[0], (int, float)):
        return f"{value[0]:g} (n = {value[1]})"
    return f"{value:.8g}" if isinstance(value, (int, float)) else ", ".join(value)


BLOCKS: dict[str, Callable[[], str]] = {
    "results": main_table,
    "judges": judges_table,
    "differences": differences_table,
    "details": details_table,
    "categories": categories_table,
    "referee": referee_table,
    "composition": composition_table,
    "composition-differences": composition_differences,
    "strengths": strengths_table,
    "steering": steering_table,
    "steering-differences": steering_differences,
    "ideal": ideal_table,
    "wording": wording_table,
    "cost-model": cost_model_table,
    "models": models_table,
    "training": training_table,
}
