"""Worker processes do several tasks at once."""

import pytest

from experiments import workers


def test_workers_are_divided_over_the_visible_gpus(monkeypatch):
  monkeypatch.setattr(workers.jax, "default_backend", lambda: "gpu")
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
  monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
  found = workers.environments(3)
  assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["1", "3", "1"]
  assert {each["XLA_PYTHON_CLIENT_MEM_FRACTION"] for each in found} == {"0.45"}
  monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
  monkeypatch.setattr(workers.jax, "device_count", lambda: 4)
  assert [each["CUDA_VISIBLE_DEVICES"] for each in workers.environments(5)] == list("01230")


def test_tasks_are_answered_each_by_one_process(tmp_path, monkeypatch):
  (tmp_path / "doubling.py").write_text("""
import os
from experiments import workers
for task in workers.tasks():
  print("not an answer")
  workers.answer({"twice": 2 * task["number"], "by": os.getpid()})
""")
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")
  with workers.Workers("doubling", [], 2) as pool:
    futures = [pool.submit({"number": i}) for i in range(6)]
    answers = [future.result() for future in futures]
  assert [found["twice"] for found in answers] == [0, 2, 4, 6, 8, 10]
  assert len({found["by"] for found in answers}) == 2


def test_a_worker_that_fails_is_an_error_with_the_end_of_its_log(tmp_path, monkeypatch):
  (tmp_path / "failing.py").write_text("raise KeyError('what went wrong')")
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")
  with workers.Workers("failing", [], 1) as pool, pytest.raises(ValueError, match="went wrong"):
    pool.submit({}).result()


def test_a_worker_that_is_killed_is_named_by_its_signal(tmp_path, monkeypatch):
  (tmp_path / "killed.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
  monkeypatch.setenv("PYTHONPATH", f"{tmp_path}")
  with workers.Workers("killed", [], 1) as pool, pytest.raises(ValueError, match="by SIGKILL"):
    pool.submit({}).result()
