"""`benchmarks/bench_extract.py` as a test: a UNet as large as Stable Diffusion 1.5's, in bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCH = Path(__file__).parents[2] / "benchmarks" / "bench_extract.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_lora_comes_out_of_a_full_size_unet_in_the_memory_of_a_few_layers(tmp_path):
    words = [sys.executable, str(BENCH), "--rank", "8", "--json", "--folder", str(tmp_path)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["modules"] > 200 and result["modules_missing"] == 0
    assert result["largest_difference"] < 1e-4 and result["error"] < 1e-4
    few = 8 * result["largest_layer_mb"] + 2 * result["adapter_mb"]
    assert result["peak_private_mb"] < few and result["peak_with_mapped_files_mb"] < 1024 + few
