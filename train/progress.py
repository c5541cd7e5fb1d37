"""The progress bar of training, and the throughput that goes into the metrics."""

import sys

from tqdm import tqdm

from train.config import RunConfig
from train.hardware import peak_flops


def bar(total: int, start: int, show: bool) -> tqdm:
  """Returns a progress bar on stderr, updated often on a terminal and every 10 s elsewhere.

  Args:
    total: number of steps.
    start: number of steps that are already done.
    show: whether to draw anything.
  """
  interactive = sys.stderr.isatty()
  return tqdm(
      total=total, initial=start, unit="step", disable=not show, file=sys.stderr,
      dynamic_ncols=interactive, mininterval=0.2 if interactive else 10.0, leave=True)


class Progress:
  """Shows steps, loss, tokens/s, model FLOPs utilisation (MFU) and the remaining time.

  Args:
    cfg: config of the run.
    num_runs: number of runs that train as a vmapped batch; rates are summed over them.
    start: number of steps that are already done.
    show: whether to draw anything.
  """

  def __init__(self, cfg: RunConfig, num_runs: int, start: int, show: bool):
    self._tokens_per_sequence = num_runs * cfg.data.seq_len
    self._flops_per_token = cfg.flops_per_token
    self._peak = peak_flops(cfg.model.numerics.compute)
    self._last: float | None = None
    self._bar = bar(cfg.train.steps, start, show)
    self._note = ""

  def rates(self, now: float, num_sequences: int) -> dict:
    """Returns tokens/s and utilisation since the previous step.

    Utilisation is the model's FLOP/s, by `ModelConfig.flops_per_token`, over `peak_flops`. There
    are no rates for the first step of a process, which includes compilation, nor for the first step
    after `note`.

    Args:
      now: time at which the step was issued, in seconds.
      num_sequences: sequences of the step, per run.
    """
    last, self._last = self._last, now
    if last is None:
      return {}
    tokens_per_second = num_sequences * self._tokens_per_sequence / (now - last)
    return {"tokens_per_second": tokens_per_second,
            "utilisation": tokens_per_second * self._flops_per_token / self._peak}

  def update(self, row: dict) -> None:
    """Draws the bar after a step."""
    shown = {"loss": f"{row['loss']:.3f}"}
    if "tokens_per_second" in row:
      shown |= {"tok/s": f"{row['tokens_per_second']:,.0f}", "mfu": f"{row['utilisation']:.0%}"}
    if self._note:
      shown["eval"] = self._note
    self._bar.set_postfix(shown, refresh=False)
    self._bar.update()

  def say(self, text: str) -> None:
    """Shows a text after the bar until the next step."""
    self._bar.set_postfix_str(text, refresh=True)

  def compiled(self) -> None:
    """Leaves the time so far out of the remaining time: most of it was the step's compilation."""
    self._bar.unpause()

  def note(self, text: str) -> None:
    """Shows a text after the bar, and leaves the time since the last step out of the next rates.

    That time is not all training: notes are made around evaluations.
    """
    self._note, self._last = text, None
    self._bar.set_postfix_str(text, refresh=True)

  def close(self) -> None:
    self._bar.close()
