"""tune_kernels: its candidates, the table that it writes, and the committed table."""

import json
import types

import jax.numpy as jnp
import pytest

from experiments.benchmarks.kernels import tune_kernels
from experiments.options import Options
from pallas_kernels import implementations
from pallas_kernels.mosaic_gpu import (
    fp8_matmul,
    fp8_tiling,
    grouped_matmul,
    grouped_weight_gradient,
    tilings,
)

HOPPER, NO_GPU = (
    types.SimpleNamespace(local_backend=lambda backend=backend: backend,
                          BACKENDS=implementations.BACKENDS) for backend in ("mosaic_gpu", None))


def rule(key):
  """Returns the tiling that the rules choose for the operation and the sizes of a key."""
  first, *others = key.split(" x ")
  *operation, dtype, size = first.split()
  sizes = (int(size), *map(int, others))
  match operation[0]:
    case "fp8_matmul":
      return fp8_tiling.dense_tiling(dtype, False, *sizes)
    case "fp8_grouped_matmul":
      return fp8_tiling.grouped_tiling(dtype, sizes[2])
    case "fp8_grouped_weight_gradient":
      return fp8_tiling.gradient_tiling(dtype, *sizes)
    case "grouped_weight_gradient":
      return grouped_weight_gradient.gradient_tiling(*sizes[1:])
    case "grouped_matmul":
      return grouped_matmul.product_tiling(sizes[2])


def test_jobs_are_distinct_and_their_first_candidate_is_the_rules_choice():
  jobs = list(tune_kernels.jobs())
  assert len({job.key for job in jobs}) == len(jobs)
  for job in jobs:
    assert len(set(job.candidates)) == len(job.candidates) > 1
    assert job.candidates[0] == rule(job.key)


def test_a_run_keeps_the_tilings_of_what_it_did_not_measure(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(tune_kernels, "implementations", HOPPER)
  slow, quick = fp8_matmul.Tiling(), fp8_matmul.Tiling(depth=1)
  monkeypatch.setattr(tune_kernels, "jobs", lambda: [tune_kernels.Job(
      "new", 1.0, lambda x, tiling: x + tiling.depth, lambda: (jnp.ones(2),), (slow, quick))])
  tune_kernels.main(Options("tune_kernels", out=tmp_path, settings=("rounds=1", "seconds=0")))
  table = json.loads((tmp_path / "tilings.json").read_text())
  assert fp8_matmul.Tiling(**table.pop("new")) in (slow, quick)
  assert table == tilings.table()


def test_an_operation_that_does_not_exist_is_refused(monkeypatch):
  monkeypatch.setattr(tune_kernels, "implementations", HOPPER)
  with pytest.raises(ValueError, match="begins with only=int4"):
    tune_kernels.main(Options("tune_kernels", settings=("only=int4",)))


def test_the_best_tiling_has_the_smallest_time_relative_to_the_defaults():
  row = lambda key, block_n, of_default: {
      "key": key, "tiling": {"block_n": block_n}, "of_default": of_default}
  rows = [row("b", 1, 1.0), row("a", 2, 0.9), row("a", 1, 1.0), row("a", 3, 1.1), row("b", 2, 1.2)]
  assert tune_kernels.best(rows) == {"a": {"block_n": 2}, "b": {"block_n": 1}}


def test_every_committed_tiling_is_a_candidate_of_its_job():
  jobs = {job.key: job for job in tune_kernels.jobs()}
  for name, fields in tilings.table().items():
    assert type(jobs[name].candidates[0])(**fields) in jobs[name].candidates


def test_a_shape_in_the_table_gets_its_tiling_and_any_other_the_default(monkeypatch):
  default = fp8_matmul.Tiling()
  monkeypatch.setattr(tilings, "table", lambda: {
      "fp8_matmul 128x128 bfloat16 128 x 256 x 384": {"depth": 1, "stages": 4}})
  found = lambda *sizes: tilings.tuned(default, "fp8_matmul 128x128", "bfloat16", *sizes)
  assert found(128, 256, 384) == fp8_matmul.Tiling(depth=1, stages=4)
  assert found(128, 256, 512) is default


def test_tuning_without_a_hopper_gpu_is_refused(monkeypatch):
  monkeypatch.setattr(tune_kernels, "implementations", NO_GPU)
  with pytest.raises(ValueError, match="Hopper"):
    tune_kernels.main(Options("tune_kernels"))
