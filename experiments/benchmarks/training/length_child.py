"""Trains runs of different lengths one after another, for `bench_length`.

    python -m experiments.benchmarks.training.length_child CONFIG.json

Reads lines of the form "STEPS SEED NUDGE" from standard input, where NUDGE is 0 or 1. For each it
trains, and writes one line of JSON to standard output, with the validation loss.
"""

import dataclasses
import json
import pathlib
import sys

from experiments.benchmarks.training.bench_repeat import train_run
from train.config import RunConfig
from train.config_io import from_dict
from train.data import load

if __name__ == "__main__":
  run = from_dict(RunConfig, json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")))
  data = load(run.data)
  answers, sys.stdout = sys.stdout, sys.stderr  # what else is printed is no answer
  for line in sys.stdin:
    steps, seed, nudge = map(int, line.split())
    this = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=steps))
    print(json.dumps(train_run(this, data, seed, bool(nudge))["validation_loss"]),
          file=answers, flush=True)
