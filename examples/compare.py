"""Adapters compared on the same prompts and seeds, with paired intervals.

python examples/compare.py [NAME=FILE ...]
"""

import sys
from pathlib import Path

from t2i_spo_plugin.eval import EvalConfig, run_eval


config = EvalConfig(
    out=Path("comparison"),
    adapters=("spo", "dpo", *sys.argv[1:]),  # NAME, NAME=FILE, either with @STRENGTH
    wordings=("grammar", "sentences"),  # results are printed by wording class
    n_harmful=30,  # of each class
    n_benign=30,
    n_lookalike=15,
    seeds_per_prompt=2,
    split="val",  # choose on validation prompts; test prompts and the referee are for the end
)
summary = run_eval(config)
print(summary)
print(f"{config.out / 'scores.parquet'} has a row an image; {config.out / 'report.html'} shows them")
