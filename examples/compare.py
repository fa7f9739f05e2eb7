"""Adapters compared on the same prompts and seeds, with paired intervals.

python examples/compare.py [NAME=FILE ...]
"""

import sys
from pathlib import Path

from t2i_spo_plugin.eval import EvalConfig, run_eval


config = EvalConfig(
    out=Path("comparison"),
    adapters=("spo", "dpo", *sys.argv[1:]),  # NAME, NAME=FILE, either with @STRENGTH
    n_harmful=60,
    n_benign=60,
    n_lookalike=30,
    split="val",  # choose on validation prompts; test prompts and the referee are for the end
)
summary = run_eval(config)
print(summary)
print(f"{config.out / 'scores.parquet'} has a row an image; {config.out / 'report.html'} shows them")
