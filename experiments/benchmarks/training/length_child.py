"""Trains runs of different lengths one after another, as a worker process of `bench_length`.

    python -m experiments.benchmarks.training.length_child CONFIG.json

A task has "steps", "seed" and "nudge"; the answer is the validation loss.
"""

import dataclasses
import json
import pathlib
import sys

from experiments import workers
from experiments.benchmarks.training.bench_repeat import train_run
from train.config import RunConfig
from train.config_io import from_dict
from train.data import load

if __name__ == "__main__":
  run = from_dict(RunConfig, json.loads(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8")))
  data = load(run.data)
  for task in workers.tasks():
    this = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=task["steps"]))
    workers.answer(train_run(this, data, task["seed"], task["nudge"])["validation_loss"])
