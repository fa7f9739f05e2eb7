"""`extract_adapter` at full size: a UNet of Stable Diffusion 1.5's configuration with random weights, 860 million.

A random LoRA is merged into a copy in float32, and both are written in shards. Extraction runs in a process of its
own, whose memory is sampled; what comes out is compared with what went in. Takes minutes and 7 GB of disk.

    python benchmarks/bench_extract.py [--rank 8] [--full-rank] [--stored float16] [--folder DIR] [--json]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from t2i_spo_plugin import Adapter, AdapterMetadata, LoraPair, read_adapter, write_adapter
from t2i_spo_plugin.adapters.architecture import weight_shapes
from t2i_spo_plugin.adapters.extract import extract_adapter


LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2")
STRENGTH = 0.02
"""Root mean square of every change, about as large as a weight's own."""


def make_models(folder: Path, rank: int, full_rank: bool, stored: str) -> None:
    """Write `base`, `tuned` and `lora.safetensors` into `folder`."""
    from diffusers import UNet2DConditionModel

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    save(unet, folder / "base", stored)
    modules = {}
    for path, (out, *inner) in weight_shapes(unet).items():
        if not path.endswith(LAYERS):
            continue
        down = torch.randn(rank, *inner, generator=generator)
        up = torch.randn(out, rank, *(1,) * (len(inner) - 1), generator=generator) * STRENGTH / rank**0.5
        modules[f"unet.{path}"] = pair = LoraPair(down, up, float(rank))
        with torch.no_grad():
            weight = unet.get_submodule(path).weight
            weight.add_(pair.delta())
            if full_rank:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1 * STRENGTH)
    save(unet, folder / "tuned", stored)
    write_adapter(Adapter(modules, AdapterMetadata("stable-diffusion-v1")), folder / "lora.safetensors")


def save(unet: Any, folder: Path, stored: str) -> None:
    if stored == "float16":
        unet = copy.deepcopy(unet).half()
    unet.save_pretrained(folder, max_shard_size="1GB")


def extract(folder: Path, rank: int) -> dict[str, float]:
    """Extract in this process; seconds, the adapter's own error, and MB of memory: private, and with mapped files."""
    peaks, done = {"RssAnon": 0, "VmRSS": 0}, threading.Event()
    largest = 0

    def watch() -> None:
        while not done.wait(0.01):
            for name, kilobytes in memory().items():
                peaks[name] = max(peaks[name], kilobytes)

    before = memory()["RssAnon"]
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    found = extract_adapter(folder / "base", folder / "tuned", rank)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    for pair in found.adapter.modules.values():
        largest = max(largest, 4 * torch.Size(pair.shape).numel())
    path = write_adapter(found.adapter, folder / "extracted.safetensors")
    return {
        "modules": len(found.adapter.modules),
        "seconds": round(seconds, 1),
        "error": found.error,
        "peak_private_mb": round((peaks["RssAnon"] - before) / 1024),
        "peak_with_mapped_files_mb": round(peaks["VmRSS"] / 1024),
        "largest_layer_mb": round(largest / 2**20),
        "adapter_mb": round(path.stat().st_size / 2**20),
    }


def memory() -> dict[str, int]:
    """Kilobytes of this process that are its own (`RssAnon`), and with the pages of mapped files (`VmRSS`)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) for name in ("RssAnon", "VmRSS")}


def compare(folder: Path) -> dict[str, float]:
    """The largest difference of any weight's change from what was merged in."""
    merged, found = (read_adapter(folder / f"{name}.safetensors").modules for name in ("lora", "extracted"))
    missing = len(merged.keys() ^ found.keys())
    worst = max(float((found[name].delta() - pair.delta()).abs().max()) for name, pair in merged.items())
    return {"modules_missing": missing, "largest_difference": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--full-rank", action="store_true", help="add noise of full rank, as tuning as a whole does")
    parser.add_argument("--stored", choices=("float32", "float16"), default="float32", help="type of both models")
    parser.add_argument("--folder", type=Path, default=None, help="for the models, by default a temporary one")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--step", choices=("make", "extract"), default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "make":
        make_models(options.folder, options.rank, options.full_rank, options.stored)
        return
    if options.step == "extract":
        print(json.dumps(extract(options.folder, options.rank)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        words = [sys.executable, os.path.abspath(__file__), *sys.argv[1:], "--folder", name]
        subprocess.run([*words, "--step", "make"], check=True)
        done = subprocess.run([*words, "--step", "extract"], check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1]) | compare(Path(name))
    if options.json:
        print(json.dumps(found))
        return
    print(f"Stable Diffusion 1.5's UNet, a LoRA of rank {options.rank} merged in, stored in {options.stored}")
    for key, value in found.items():
        print(f"{key.replace('_', ' '):<28}{value:g}")


if __name__ == "__main__":
    main()
