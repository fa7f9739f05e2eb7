"""The commands about adapter files, `spo comfyui` and `spo doctor`: what the parser takes, what is printed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from t2i_spo_plugin.errors import SPOError


if TYPE_CHECKING:
    from .doctor import Check

Layout = Literal["kohya", "diffusers", "peft", "native"]
Dtype = Literal["float32", "float16", "bfloat16"]


def inspect(
    file: Annotated[str, tyro.conf.Positional], json_: Annotated[bool, tyro.conf.arg(name="json")] = False
) -> None:
    """Inspect.

    Args:
        file: a safetensors file, a folder with one, or a Hub id.
        json_: print one JSON object instead of lines.
    """
    from t2i_spo_plugin.adapters import as_lines, download_adapter, inspect_adapter, is_repo_id

    found = inspect_adapter(download_adapter(file) if is_repo_id(file) and not Path(file).exists() else file)
    if json_:
        print(json.dumps(dataclasses.asdict(found), ensure_ascii=False, indent=2))
        return
    for name, value in as_lines(found).items():
        print(f"{name:<32}{value}")
    for warning in found.warnings:
        print(f"warning: {warning}")


def convert(
    file: Annotated[Path, tyro.conf.Positional],
    layout: Layout,
    out: Path,
    architecture: str = "",
    dtype: Dtype | None = None,
) -> None:
    """Convert.

    Args:
        file: an adapter in any layout that is read.
        layout: kohya (Stable Diffusion 1, 2 and XL, in most programs), diffusers (alphas in its header), peft (a
            folder with a configuration), or native (alphas folded into the weights; SD3, Flux and later).
        out: the .safetensors file to write; for peft, the folder.
        architecture: of the base model, such as stable-diffusion-v1, where the file does not say.
        dtype: what the weights are rounded to; when left out each keeps its own, float32 where folding needs it.
    """
    import torch

    from t2i_spo_plugin.adapters import Adapter, convert_adapter, normalise_architecture, read_adapter
    from t2i_spo_plugin.errors import IncompatibleAdapterError

    adapter = read_adapter(file)
    said, given = adapter.metadata.base_architecture, normalise_architecture(architecture)
    if said and given and said != given:
        raise IncompatibleAdapterError(f"{file.name} says that it was made for {said}, not for {given}")
    metadata = dataclasses.replace(adapter.metadata, base_architecture=said or given)
    kind = getattr(torch, dtype) if dtype else None
    print(convert_adapter(Adapter(adapter.modules, metadata), out, layout, kind))


def merge(
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    out: Path,
    weights: tuple[float, ...] = (),
    method: Literal["concat", "svd"] = "concat",
    rank: int | None = None,
    dtype: Dtype = "float32",
) -> None:
    """Merge.

    Args:
        files: adapters for the same architecture.
        out: the .safetensors file to write.
        weights: one an adapter, at least 0; 1 each when left out.
        method: concat is the exact weighted sum, its rank the sum of the ranks; svd cuts it to --rank.
        rank: for svd, by default the largest rank of the parents.
        dtype: of the merged adapter; float16 and bfloat16 halve the file, and their rounding is in the errors.
    """
    import torch

    from t2i_spo_plugin.adapters import merge_adapters, read_adapter, write_adapter

    adapters, stems = [read_adapter(file) for file in files], [file.stem for file in files]
    merged = merge_adapters(adapters, weights or None, method, rank, stems, getattr(torch, dtype))
    print(f"{write_adapter(merged.adapter, out)}: {len(merged.module_errors)} modules, rank {merged.adapter.rank}")
    _print_errors(merged.error, merged.module_errors)


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
    """Extract.

    Args:
        base: a diffusers folder (of a pipeline or of one component), or a safetensors file with diffusers' names.
        tuned: the same model after tuning, in either form.
        out: the .safetensors file to write.
        rank: of every module at most.
        energy: share of each weight's squared change to keep, 0.99 when neither is given; with both the smaller rank.
        component: what a file is, such as unet; of a pipeline, the only component to compare.
        architecture: such as stable-diffusion-v1, where the files do not say.
        prediction_type: epsilon, v_prediction, flow or sample, where the files do not say.
        device: where the decomposition runs, such as cuda.
        dtype: of the adapter; float16 and bfloat16 halve the file, and their rounding is in the errors.
    """
    import torch

    from t2i_spo_plugin.adapters import extract_adapter, write_adapter

    kind = getattr(torch, dtype)
    found = extract_adapter(
        base, tuned, rank, energy, component, architecture, prediction_type, device, progress=True, dtype=kind
    )
    print(f"{write_adapter(found.adapter, out)}: {len(found.module_errors)} modules, rank {found.adapter.rank}")
    _print_errors(found.error, found.block_errors)
    if found.unexpressed:
        print(f"{len(found.unexpressed)} weights changed that no LoRA can change (relative change):")
    for name, change in sorted(found.unexpressed.items(), key=lambda item: -item[1])[:20]:
        print(f"  {name:<64}{change:.2e}")


def publish(
    file: Annotated[Path, tyro.conf.Positional],
    repo: Annotated[str, tyro.conf.Positional],
    base_model: str = "",
    license: str = "",
    license_file: Path | None = None,
    license_name: str = "",
    title: str = "",
    summary: str = "",
    images: tuple[tuple[str, Path], ...] = (),
    results: Path | None = None,
    system: str = "",
    dataset: str = "",
    private: bool = False,
    revision: str = "main",
    message: str = "",
    dry_run: bool = False,
    out: Path | None = None,
) -> None:
    """Publish.

    Args:
        file: the adapter, a safetensors file or a folder with one.
        repo: user/repo on the Hub; it is made when it does not exist.
        base_model: Hub id of the model it was trained on.
        license: as the Hub names licences, such as apache-2.0, or other; by default what the file says.
        license_file: a text that is sent as LICENSE; needed when the licence is other.
        license_name: needed when the licence is other.
        title: by default what the file says.
        summary: what it is for, a few sentences.
        images: prompt and image file, several times; sent without metadata and at most 1024 pixels wide and high.
        results: the summary.json of an evaluation of this very file.
        system: its name in that evaluation, where it was measured at several strengths.
        dataset: Hub id of the prompts it was measured on; with it the results are sent as .eval_results too.
        private: make a new repository private.
        revision: the branch; made when it does not exist.
        message: of the commit.
        dry_run: write the folder, print files and card, and send nothing; needs neither network nor token.
        out: folder to write, by default a temporary one.
    """
    from t2i_spo_plugin.hub import publish_adapter

    published = publish_adapter(
        file,
        repo,
        license=license,
        license_file=license_file,
        license_name=license_name,
        base_model=base_model,
        title=title,
        summary=summary,
        images=images,
        results=results,
        system=system,
        dataset=dataset,
        private=private,
        revision=revision,
        message=message,
        dry_run=dry_run,
        out=out,
    )
    print(published)
    if dry_run:
        print(f"\n{published.card}", end="")


def doctor(json_: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Examine.

    Args:
        json_: print a JSON list instead of lines.
    """
    from .doctor import examine

    _print_checks(examine(), json_)


def comfyui_install(path: Path, copy: bool = False) -> None:
    """Put the node pack into ComfyUI's custom_nodes.

    Args:
        path: ComfyUI's folder, or the base directory that it is started with.
        copy: copy the pack instead of linking it; a copy has to be made again after an upgrade.
    """
    from .comfyui import install_pack

    print(f"{install_pack(path, copy)}: restart ComfyUI")


def comfyui_uninstall(path: Path) -> None:
    """Take the node pack away again.

    Args:
        path: ComfyUI's folder, or the base directory that it is started with.
    """
    from .comfyui import uninstall_pack

    print(f"{uninstall_pack(path)}: removed")


def comfyui_check(path: Path, python: str = "", json_: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Say whether the pack is there, current, and imports.

    Args:
        path: ComfyUI's folder, or the base directory that it is started with.
        python: the interpreter that runs ComfyUI, where it is not in its folder and not the one of this command.
        json_: print a JSON list instead of lines.
    """
    from .comfyui import check_pack

    _print_checks(check_pack(path, python), json_)


def _print_checks(checks: Sequence[Check], as_json: bool) -> None:
    from .doctor import broken

    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], ensure_ascii=False, indent=2))
    else:
        for check in checks:
            print(f"{check.status:<8}{check.name:<18}{check.detail}")
    failed = broken(checks)
    if failed:
        raise SPOError(f"broken: {', '.join(check.name for check in failed)}")


def _print_errors(error: float, parts: dict[str, float], shown: int = 10) -> None:
    print(f"relative error {error:.2e}")
    for name, value in sorted(parts.items(), key=lambda item: -item[1])[:shown]:
        if value > 0.0:
            print(f"  {name:<64}{value:.2e}")
