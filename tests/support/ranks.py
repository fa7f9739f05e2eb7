"""Training on several processes: `torchrun --nproc_per_node 2 -m support.ranks FOLDER` trains into `FOLDER/run`.

The pair table is `FOLDER/pairs.parquet`; the caches are in `FOLDER/cache`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed

from t2i_spo_plugin.training import train
from t2i_spo_plugin.training.run import Callback

from .pairs import pair_table, train_config
from .pipelines import tiny_pipeline


class World(Callback):
    """Prints how many processes there are and how they talk."""

    def on_train_end(self, run):
        if run.accelerator.is_main_process:
            print("world", torch.distributed.get_world_size(), torch.distributed.get_backend())


def train_on_ranks(folder: Path, ranks: int = 2, count: int = 40) -> str:
    """Train there on `count` pairs as `ranks` processes; returns what was printed.

    Raises:
        AssertionError: a process failed.
    """
    folder.mkdir()
    pair_table(folder / "pairs.parquet", count)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*torchrun, "-m", "support.ranks", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config = train_config(folder, pairs=str(folder / "pairs.parquet"), cache_dir=str(folder / "cache"), steps=1)
    train(config, tiny_pipeline("sd1"), callbacks=[World()])
    torch.distributed.destroy_process_group()
