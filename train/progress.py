"""A progress bar with what a person wants to know, and the rates that go into the record."""

import sys

from tqdm import tqdm

from train.config import RunConfig
from train.hardware import peak_flops


def bar(total: int, start: int, show: bool) -> tqdm:
  """A bar on stderr that has `start` of `total` steps behind it; a terminal sees it move."""
  interactive = sys.stderr.isatty()
  return tqdm(
      total=total, initial=start, unit="step", disable=not show, file=sys.stderr,
      dynamic_ncols=interactive, mininterval=0.2 if interactive else 10.0, leave=True)


class Progress:
  """Shows steps, loss, tokens/s, model FLOP utilisation and the time that is left.

  Args:
    cfg: of the run.
    num_runs: runs that train as a vmapped batch; rates are of all of them.
    start: steps done before.
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
    """Tokens/s and utilisation since the step before; of a process' first, which compiles, none.

    Utilisation is the FLOP/s of `ModelConfig.flops_per_token` over `peak_flops`.

    Args:
      now: when the step was begun, in seconds.
      num_sequences: of the step, per run.
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

  def note(self, text: str) -> None:
    """Keeps a word beside the bar, and forgets the time since the last step: not all training."""
    self._note, self._last = text, None
    self._bar.set_postfix_str(text, refresh=True)

  def close(self) -> None:
    self._bar.close()
