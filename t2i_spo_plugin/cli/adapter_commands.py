"""Commands about adapter files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from t2i_spo_plugin.hub import ModelCardInfo

from .parsing import AsJSON, command


Layout = Literal["kohya", "diffusers", "peft", "native"]
Dtype = Literal["float32", "float16", "bfloat16"]
MergeMethod = Literal["concat", "svd", "ties", "dare", "dare-ties", "magnitude", "comerge"]


@command
def inspect(file: Annotated[str, tyro.conf.Positional], json_: AsJSON = False) -> None:
    """Report what an adapter file is, without loading it anywhere.

    Args:
        file: a safetensors file, a folder with one, or a Hub id.
        json_: print one JSON object instead of lines.
    """
    from t2i_spo_plugin.adapters import as_lines, download_adapter, inspect_adapter, is_repo_id

    inspection = inspect_adapter(
        download_adapter(file) if is_repo_id(file) and not Path(file).expanduser().exists() else file
    )
    if json_:
        print(json.dumps(dataclasses.asdict(inspection), ensure_ascii=False, indent=2))
        return
    for name, value in as_lines(inspection).items():
        print(f"{name:<32}{value}")
    for warning in inspection.warnings:
        print(f"warning: {warning}")


@command
def convert(
    file: Annotated[Path, tyro.conf.Positional],
    layout: Layout,
    out: Path,
    architecture: str = "",
    dtype: Dtype | None = None,
    rank: int | None = None,
) -> None:
    """Write an adapter in another file layout, without changing what it does; LoHa and LoKr as the nearest LoRA.

    Args:
        file: an adapter in any layout that is read, or a PEFT folder.
        layout: kohya (Stable Diffusion 1, 2 and XL, in most programs), diffusers (alphas in its header), peft (a
            folder with a configuration), or native (alphas folded into the weights; SD3, Flux and later).
        out: the .safetensors file to write; for peft, the folder.
        architecture: of the base model, such as stable-diffusion-v1, where the file does not say.
        dtype: what the weights are rounded to; when left out each keeps its own, float32 where folding needs it.
        rank: for LoHa and LoKr alone, that of the LoRA; the relative error is printed.
    """
    import torch

    from t2i_spo_plugin.adapters import (
        Adapter,
        approximate_products,
        convert_adapter,
        is_product,
        normalise_architecture,
        read_adapter,
    )
    from t2i_spo_plugin.errors import ConfigError, IncompatibleAdapterError

    given = normalise_architecture(architecture)
    result = None
    if rank is not None:
        if not is_product(file):
            raise ConfigError("--rank is for LoHa and LoKr; spo merge --method svd --rank cuts a LoRA to a rank")
        result = approximate_products(file, rank, given)
    adapter = result.adapter if result else read_adapter(file)
    stated = adapter.metadata.base_architecture
    if stated and given and stated != given:
        raise IncompatibleAdapterError(f"{file.name} says that it was made for {stated}, not for {given}")
    metadata = dataclasses.replace(adapter.metadata, base_architecture=stated or given)
    rounded = getattr(torch, dtype) if dtype else None
    print(convert_adapter(Adapter(adapter.modules, metadata), out, layout, rounded))
    if result:
        _print_errors(result.error, result.module_errors)


@command
def merge(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    weights: tuple[float, ...] = (),
    method: MergeMethod = "concat",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
    unit: Literal["row", "rank", "element", "factor"] = "row",
    dtype: Dtype = "float32",
) -> None:
    """Merge several adapters into one: exactly, at a chosen rank, or by what wins where they contradict each other.

    Args:
        files: adapters for the same architecture.
        out: the .safetensors file to write.
        weights: one an adapter, at least 0; 1 each when left out.
        method: concat is the exact weighted sum, its rank the sum of the ranks; svd cuts it to --rank; ties, dare,
            dare-ties and magnitude decide value by value, comerge takes each unit from one adapter.
        rank: of the merged adapter, at most; by default the largest of the parents under svd, what it needs elsewhere.
        density: of ties, dare, dare-ties and magnitude, the share of values that is kept.
        seed: of what dare and dare-ties drop.
        unit: of comerge, what competes; by the norms of the weights (spo experts measures activations).
        dtype: type of the merged weights; float16 and bfloat16 halve the file, and their rounding is in the errors.
    """
    import torch

    from t2i_spo_plugin.adapters import MergeOptions, merge_adapters, read_adapter, write_adapter

    adapters, stems = [read_adapter(file) for file in files], [file.stem for file in files]
    options = MergeOptions(density, seed, unit, "magnitude")
    merged = merge_adapters(adapters, weights or None, method, rank, stems, getattr(torch, dtype), options)
    print(f"{write_adapter(merged.adapter, out)}: {len(merged.module_errors)} modules, rank {merged.adapter.rank}")
    _print_errors(merged.error, merged.module_errors)


@command
def extract(
    base: Annotated[str, tyro.conf.Positional],
    tuned: Annotated[str, tyro.conf.Positional],
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    component: str = "",
    architecture: str = "",
    prediction_type: str = "",
    device: str = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Extract an adapter from what a tuned model changes.

    Args:
        base: a diffusers folder (of a pipeline or of one component), or a safetensors file with diffusers' names.
        tuned: the same model after tuning, in either form.
        out: the .safetensors file to write.
        rank: largest rank of a module.
        energy: share of each weight's squared change to keep, 0.99 when neither is given; with both the smaller rank.
        component: the component that a file holds, such as unet; of a pipeline, the only one to compare.
        architecture: of the base model, such as stable-diffusion-v1, where the files do not say.
        prediction_type: what the model predicts, where the files do not say: epsilon, v_prediction, flow or sample.
        device: where the decomposition runs, such as cuda.
        dtype: type of the adapter's weights; float16 and bfloat16 halve the file, and their rounding is in the errors.
    """
    import torch

    from t2i_spo_plugin.adapters import extract_adapter, write_adapter

    rounded = getattr(torch, dtype)
    extraction = extract_adapter(
        base, tuned, rank, energy, component, architecture, prediction_type, device, progress=True, dtype=rounded
    )
    path = write_adapter(extraction.adapter, out)
    print(f"{path}: {len(extraction.module_errors)} modules, rank {extraction.adapter.rank}")
    _print_errors(extraction.error, extraction.block_errors)
    if extraction.unexpressed:
        print(f"{len(extraction.unexpressed)} weights changed that no LoRA can change (relative change):")
        for name, change in sorted(extraction.unexpressed.items(), key=lambda item: -item[1])[:20]:
            print(f"  {name:<64}{change:.2e}")


@command
def publish(
    file: Annotated[Path, tyro.conf.Positional],
    repo: Annotated[str, tyro.conf.Positional],
    card: Annotated[ModelCardInfo, tyro.conf.arg(name="")],
    private: bool = False,
    revision: str = "main",
    message: str = "",
    dry_run: bool = False,
    out: Path | None = None,
) -> None:
    """Send an adapter to the Hub with a model card, in one commit, and check what arrived.

    Args:
        file: the adapter, a safetensors file or a folder with one.
        repo: user/repo on the Hub; it is created when it does not exist.
        card: what the model card says.
        private: make a new repository private.
        revision: branch of the repository; created when it does not exist.
        message: text of the commit; by default Publish and the file's name.
        dry_run: write the folder, print files and card, and send nothing; needs neither network nor token.
        out: folder to write, by default a temporary one.
    """
    from t2i_spo_plugin.hub import publish_adapter

    published = publish_adapter(
        file, repo, card, private=private, revision=revision, message=message, dry_run=dry_run, out=out
    )
    print(published)
    if dry_run:
        print(f"\n{published.card}", end="")


def _print_errors(error: float, parts: dict[str, float], count: int = 10) -> None:
    print(f"relative error {error:.2e}")
    for name, value in sorted(parts.items(), key=lambda item: -item[1])[:count]:
        if value > 0.0:
            print(f"  {name:<64}{value:.2e}")
