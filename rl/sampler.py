"""From problems to judged completions: prompts, rollout, text, rewards.

Shape letters:  S sequences  N new tokens
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import Transformer
from rl import rewards
from rl.config import RewardConfig, RLConfig
from rl.rollout import pad_prompts, rollout, sequence_keys
from rl.tasks import get_task
from rl.tasks.problem import Problem
from rl.templates import get_template
from train.mesh import commit_to_device, make_sharded_model
from train.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Samples:
  """Completions, a row for each, those of a problem side by side.

  Attributes:
    problems: of each row.
    prompts: text of each row's prompt.
    prompt_tokens: its token ids.
    completions: text, without the stop token.
    tokens_SN, lengths_S, logprobs_SN, ended_S, experts_STLK: as in `rl.rollout.Rollout`, on the
      host.
  """

  problems: list[Problem]
  prompts: list[str]
  prompt_tokens: list[np.ndarray]
  completions: list[str]
  tokens_SN: np.ndarray
  lengths_S: np.ndarray
  logprobs_SN: np.ndarray
  ended_S: np.ndarray
  experts_STLK: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.problems)

  def rows(self, chosen: np.ndarray) -> "Samples":
    """Some rows, in that order."""
    def pick(x):
      if x is None or isinstance(x, np.ndarray):
        return None if x is None else x[chosen]
      return [x[i] for i in chosen]

    return Samples(*(pick(getattr(self, field.name)) for field in dataclasses.fields(self)))

  def columns(self) -> dict[str, list]:
    """What rewards are given: every problem's row, "num_tokens" and "row"."""
    given = [problem.row() for problem in self.problems]
    names = dict.fromkeys(name for row in given for name in row)
    return {name: [row.get(name) for row in given] for name in names} | {
        "num_tokens": self.lengths_S.tolist(), "row": list(range(len(self)))}


def join(parts: Sequence[Samples]) -> Samples:
  """All rows of all parts."""
  def cat(name):
    values = [getattr(part, name) for part in parts]
    if values[0] is None:
      return None
    if isinstance(values[0], np.ndarray):
      return np.concatenate(values)
    return [row for part in values for row in part]

  return Samples(*(cat(field.name) for field in dataclasses.fields(Samples)))


class Sampler:
  """Poses a task's problems to a model.

  Args:
    net: the network.
    cfg: says task, template, limits and devices; a program always samples
      `cfg.sampling.num_sequences`.
    tokenizer: the model's.
  """

  def __init__(self, net: Transformer, cfg: RLConfig, tokenizer: Tokenizer):
    self.net, self.cfg, self.tokenizer = net, cfg, tokenizer
    self.task, self.template = get_task(cfg.task), get_template(cfg.template)
    self.mesh = make_sharded_model(net.cfg, cfg.mesh)

  def sample(
      self, variables: dict, split: str, indices: Sequence[int], num_samples: int, *, step: int,
      temperature: float | None = None, top_p: float = 1.0) -> Samples:
    """`num_samples` completions of each of the split's problems with these indices.

    Args:
      variables: of the model, on any devices: whole copies are made where sampling needs them.
      split: of the task.
      indices: of the problems.
      num_samples: completions of each.
      step: with the seed, the index and the sample's number, decides the random key.
      temperature: None for the config's.
      top_p: see `rl.rollout.rollout`.

    Raises:
      ValueError: for a problem whose prompt is empty or too long.
    """
    problems = [self.task.problem(split, index) for index in indices]
    prompts = [self.template.render(problem.question) for problem in problems]
    tokens = self.tokenizer.encode_batch(prompts)
    of_row = np.repeat(np.arange(len(problems)), num_samples)
    sample_S = np.tile(np.arange(num_samples), len(problems))
    index_S = np.asarray(indices)[of_row]
    drawn = self._complete(
        variables, [tokens[p] for p in of_row], self.cfg.sampling.max_prompt_length, index_S,
        sample_S, step, temperature, top_p)
    texts = self._texts(drawn)
    return Samples([problems[p] for p in of_row], [prompts[p] for p in of_row],
                   [tokens[p] for p in of_row], texts, *drawn)

  def resume(self, variables: dict, drawn: Samples, kept_S: Sequence[int], num_samples: int, *,
             step: int) -> list[str]:
    """Beginnings of completions, sampled on; each may become a whole completion's length longer.

    Args:
      variables: of the model.
      drawn: the completions.
      kept_S: tokens of each that are kept.
      num_samples: continuations of each, side by side in the result.
      step: see `sample`; with the row and the continuation's number, decides the random key.

    Returns:
      The text from each completion's beginning.
    """
    sampling, kept_S = self.cfg.sampling, np.asarray(kept_S)
    begun = [tokens[:kept] for tokens, kept in zip(drawn.tokens_SN, kept_S, strict=True)]
    row_S = np.repeat(np.arange(len(drawn)), num_samples)
    resumed = self._complete(
        variables, [np.concatenate([drawn.prompt_tokens[row], begun[row]]) for row in row_S],
        sampling.max_prompt_length + sampling.max_completion_length, row_S,
        np.tile(np.arange(num_samples), len(drawn)), step)
    return [self.tokenizer.decode(begun[row]) + text for row, text in
            zip(row_S, self._texts(resumed), strict=True)]

  def _texts(self, drawn: tuple) -> list[str]:
    token_SN, length_S, _, ended_S, *_ = drawn
    return [self.tokenizer.decode(row[:length - ended]) for row, length, ended in
            zip(token_SN, length_S, ended_S, strict=True)]

  def _complete(self, variables, prompts, max_prompt, index_S, sample_S, step, temperature=None,
                top_p=1.0) -> tuple[np.ndarray, ...]:
    """A rollout's arrays for any number of prompts, a program's size at a time."""
    variables = (jax.device_put(variables, self.mesh.replicated()) if self.mesh
                 else commit_to_device(variables))
    size, pieces = self.cfg.sampling.num_sequences, []
    for start in range(0, len(prompts), size):
      rows = np.arange(start, min(start + size, len(prompts)))
      padded = np.resize(rows, size)
      keys_S = sequence_keys(self.cfg.loop.seed, step, jnp.asarray(index_S[padded]),
                             jnp.asarray(sample_S[padded]))
      pieces.append(self._rollout(
          variables, pad_prompts([prompts[row] for row in padded], max_prompt, keys_S),
          temperature, top_p, len(rows)))
    return tuple(map(np.concatenate, zip(*pieces, strict=True)))

  def _rollout(self, variables, prompts, temperature, top_p, count):
    sampling = self.cfg.sampling
    out = rollout(
        self.net, variables, prompts, max_new_tokens=sampling.max_completion_length,
        stop_token=self.tokenizer.eos, slots=sampling.slots, top_p=top_p,
        temperature=sampling.temperature if temperature is None else temperature,
        record_experts=self.cfg.objective.routing != "free", mesh=self.mesh and self.mesh.mesh)
    kept = (out.tokens_SN, out.lengths_S, out.logprobs_SN, out.ended_S, out.experts_STLK)
    return tuple(np.asarray(part)[:count] for part in kept if part is not None)


def reward_function(cfg: RewardConfig, max_tokens: int) -> Callable[..., rewards.Scored]:
  """The weighted rewards of a config.

  Args:
    cfg: the weights.
    max_tokens: the limit on completions' lengths.
  """
  known = {
      "accuracy": rewards.accuracy, "format": rewards.well_formed,
      "language": rewards.language_consistency, "tests": rewards.unit_tests(),
      "random": _random}
  weights = cfg.weights()
  if "overlong" in weights:
    known["overlong"] = rewards.overlong(max_tokens, cfg.overlong_tokens)
  return rewards.combine({name: known[name] for name in weights}, weights)


def _random(
    prompts: Sequence[str], completions: Sequence[str], row: Sequence[int], **columns: Any,
) -> list[float]:
  """Heads or tails of what was written and where, so that a resumed run throws the same."""
  del columns
  return [float(zlib.crc32(f"{i} {prompt} {completion}".encode()) & 1)
          for i, prompt, completion in zip(row, prompts, completions, strict=True)]
