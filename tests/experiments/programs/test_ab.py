"""Comparisons of two configurations: what is refused, announced and left out."""

import pytest

from experiments.options import Options
from experiments.programs import ab


def compare(folder, a=(), b=(), settings=(), **options) -> None:
  ab.main(Options("ab", out=folder, a=a, b=b, settings=settings, **options))


@pytest.mark.parametrize(("arms", "message"), [
    ({}, "the arms do not differ"),
    ({"a": ("balance.bias_rate=0",), "b": ("balance.bias_rate=0",)}, "have the same configuration"),
    ({"a": ("train.steps=40",)}, "have the same configuration"),  # the scale's own value
    ({"a": ("optimizer.learning_rate=0.001",)},
     "optimizer.learning_rate in the arm a would have no effect: ab sweeps the learning rate"),
    ({"b": ("train.seed=1",)}, "train.seed in the arm b would have no effect: every run has its"),
    ({"b": ("init=runs/mine",)}, "init in the arm b would have no effect"),
    ({"b": ("balance.bias_rate=1",), "settings": ("init=runs/mine",)}, "init would have no effect"),
    ({"b": ("balance.bias_rate=1",), "settings": ("balance.bias_rate=0",)},
     "--set balance.bias_rate cannot apply to the arm b, which sets balance.bias_rate=1"),
    ({"b": ("data.fim_rate=0",)}, "data.* is set by b, but all arms of a study train on the same"),
])
def test_settings_that_would_be_ignored_are_refused(tmp_path, arms, message):
  with pytest.raises(ValueError) as raised:
    compare(tmp_path / "out", **arms)
  assert message in str(raised.value)
  assert not (tmp_path / "out").exists()


def test_a_sweep_and_its_cost_are_announced_and_nothing_is_concluded_if_it_was_stopped(
    tmp_path, capsys):
  compare(tmp_path / "out", b=("balance.bias_rate=0",), settings=(
      "data.tokenizer=bytes", f"data.cache_dir={tmp_path}"), max_minutes=1e-9, seeds="2")
  out, err = capsys.readouterr()
  assert "ab: 12 runs (2 arms x 3 learning rates + 3 arms x 2 seeds), 6 minutes on 2 CPU" in err
  assert "stopped and saved" in out and "speed-up" not in out and "two seeds" not in out
