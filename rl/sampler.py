"""Samples completions of a task's problems as text, and assembles the reward function.

Shape letters:  S sequences  N new tokens
"""

import collections
import dataclasses
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from model import ModelConfig, Transformer
from model.checks import require
from model.decoding.drafting import check_drafts
from rl import rewards
from rl.config import RewardConfig, RLConfig, SamplingConfig
from rl.rollout import pad_prompts, rollout, sequence_keys
from rl.tasks import get_task
from rl.tasks.problem import Problem
from train.chat import ChatTemplate, PromptFormat, require_chat, stop_tokens
from train.mesh import commit_to_device, make_sharded_model
from train.templates import CHAT, get_template
from train.tokenizer import Tokenizer

# A question of an unlimited split that is too long is replaced by that at an index which no run
# reaches otherwise.
_STRIDE, _ATTEMPTS = 2**40, 1000
_LONG = 128  # tokens of prompts that are worth reading once for all completions of a group


@dataclasses.dataclass(frozen=True)
class Samples:
  """Completions on the host, one per row; those of a problem are consecutive.

  Attributes:
    problems: each row's problem.
    prompts: each row's prompt, as text.
    prompt_tokens: each row's prompt, as token ids.
    completions: each row's completion, as text without the stop token.
    tokens_SN: int32 token ids of the completions, up to and including the stop token; undefined
      after it.
    lengths_S: int32 lengths of the completions in tokens, the stop token included.
    logprobs_SN: float32 log-probabilities of the completions' tokens in nats, under the
      distribution sampled from.
    ended_S: bool, whether the stop token was sampled; otherwise the completion was truncated.
    experts_STLK: int16, the experts that each token was routed to, as in `rl.rollout.Rollout`;
      None if they were not recorded.
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
    """Returns the rows with the indices `chosen`, in that order."""
    def pick(x):
      if x is None or isinstance(x, np.ndarray):
        return None if x is None else x[chosen]
      return [x[i] for i in chosen]

    return Samples(*(pick(getattr(self, field.name)) for field in dataclasses.fields(self)))

  def columns(self) -> dict[str, list]:
    """Returns the columns that rewards are given, by name.

    They are those of `Problem.row`, None in rows whose problem does not have the column;
    "question"; "num_tokens", the completion's length; and "row", the row's index.
    """
    given = [problem.row() for problem in self.problems]
    names = dict.fromkeys(name for row in given for name in row)
    return {name: [row.get(name) for row in given] for name in names} | {
        "question": [problem.question for problem in self.problems],
        "num_tokens": self.lengths_S.tolist(), "row": list(range(len(self)))}


def join(parts: Sequence[Samples]) -> Samples:
  """Concatenates the rows of all parts."""
  def cat(name):
    values = [getattr(part, name) for part in parts]
    if values[0] is None:
      return None
    if isinstance(values[0], np.ndarray):
      return np.concatenate(values)
    return [row for part in values for row in part]

  return Samples(*(cat(field.name) for field in dataclasses.fields(Samples)))


class Sampler:
  """Samples a model's completions of a task's problems.

  Args:
    net: the network.
    cfg: the run's configuration, for the task, the template, the sampling limits and the mesh. The
      compiled program always samples `cfg.sampling.num_sequences` sequences; fewer are padded.
    tokenizer: the model's tokenizer.
    form: what the model's Hugging Face folder says about prompts and the end of a text; None if
      there is none.
    show: draw a progress bar on stderr while completions are sampled.

  Attributes:
    stop_tokens: ids of the tokens each of which ends a completion.
    skipped: for each split, the number of questions left out so far because their prompts are too
      long (`sampling.long_prompts`); of a finite split, all of them are known at once.

  Raises:
    ValueError: if the template is the model's own chat template, and there is none or it does not
      work; or if prompts and completions may be longer than the model's context.
  """

  def __init__(self, net: Transformer, cfg: RLConfig, tokenizer: Tokenizer,
               form: PromptFormat | None = None, *, show: bool = False):
    self.net, self.cfg, self.tokenizer, self.show = net, cfg, tokenizer, show
    # Without the accuracy reward, training checks no answers.
    self.task = get_task(cfg.task, any_answer=not cfg.rewards.accuracy)
    self.stop_tokens = stop_tokens(tokenizer, form)
    if cfg.template == CHAT:
      require_chat(form)
      self.template = ChatTemplate(form, tokenizer, cfg.system)
      self.stop_tokens = self.template.stop_tokens
    else:
      self.template = get_template(cfg.template)
    require_context(cfg.sampling, net.cfg.max_seq_len)
    self.mesh = make_sharded_model(net.cfg, cfg.mesh)
    self.skipped: collections.Counter[str] = collections.Counter()
    self._fitting: dict[str, list[int]] = {}

  def size(self, split: str) -> int | None:
    """Returns the number of problems of a split; None if it is unlimited.

    With `sampling.long_prompts="skip"`, problems whose prompts are too long are not counted.

    Raises:
      ValueError: for an unknown split, or if all of its prompts are too long.
    """
    size = self.task.size(split)
    skip = size is not None and self.cfg.sampling.long_prompts == "skip"
    return len(self._indices(split)) if skip else size

  def check_prompts(self, split: str) -> None:
    """Checks the prompts of a finite split, so that a run does not end at one that is too long.

    Raises:
      ValueError: for a prompt that is too long, unless these are skipped.
    """
    if self.task.size(split) is not None:
      self._indices(split)

  def _indices(self, split: str) -> list[int]:
    """Returns the indices of a finite split's problems whose prompts fit."""
    if split in self._fitting:
      return self._fitting[split]
    sampling, size = self.cfg.sampling, self.task.size(split)
    problems = [self.task.problem(split, index) for index in range(size)]
    lengths = np.array([len(tokens) for tokens in self.prompts(problems)[1]], int)
    long = np.flatnonzero(lengths > sampling.max_prompt_length)
    if long.size:
      examples = ", ".join(self.task.where(problems[i]) for i in long[:3])
      which = (f"{long.size} of {size} questions of the split {split!r} have prompts of more than "
               f"max_prompt_length={sampling.max_prompt_length} tokens, up to "
               f"{lengths.max()} (such as {examples})")
      require(sampling.long_prompts == "skip" and long.size < size,
              f"{which}: {self._advice(lengths[long[0]], problems[long[0]])}")
      logging.warning("%s: they are left out", which)
    self.skipped[split] = int(long.size)
    self._fitting[split] = np.flatnonzero(lengths <= sampling.max_prompt_length).tolist()
    return self._fitting[split]

  def _problem(self, split: str, index: int) -> Problem:
    """Returns the problem at an index; after a finite split's last one, the first follows again."""
    if self.cfg.sampling.long_prompts == "error":
      return self.task.problem(split, index)
    if self.task.size(split) is not None:
      indices = self._indices(split)
      return self.task.problem(split, indices[index % len(indices)] if indices else index)
    for attempt in range(_ATTEMPTS):
      problem = self.task.problem(split, index + attempt * _STRIDE)
      if len(self.prompts([problem])[1][0]) <= self.cfg.sampling.max_prompt_length:
        return problem
      self.skipped[split] += 1
    raise ValueError(f"{_ATTEMPTS} questions of the task {self.cfg.task!r} in succession have "
                     f"prompts that are too long: {self._advice(None, problem)}")

  def prompts(self, problems: Sequence[Problem]) -> tuple[list[str], list[np.ndarray]]:
    """Returns the prompt of each problem, as text and as token ids.

    Raises:
      ValueError: if the model's chat template cannot render a question; the message names it.
    """
    if isinstance(self.template, ChatTemplate):
      pairs = [self._chat_prompt(problem) for problem in problems]
      return [text for text, _ in pairs], [tokens for _, tokens in pairs]
    texts = [self.template.render(problem.question) for problem in problems]
    return texts, self.tokenizer.encode_batch(texts)

  def _chat_prompt(self, problem: Problem) -> tuple[str, np.ndarray]:
    try:
      return self.template.prompt(problem.question)
    except ValueError as error:
      raise ValueError(f"the prompt of {self.task.where(problem)}: {error}") from error

  def _advice(self, length: int | None, problem: Problem) -> str:
    """Returns what is wrong with a prompt that is too long, and what to do."""
    sampling = self.cfg.sampling
    length = len(self.prompts([problem])[1][0]) if length is None else length
    skip = ", or set long_prompts=skip to leave such questions out" * (
        sampling.long_prompts == "error")
    return (f"the prompt of {self.task.where(problem)} has {length} tokens, more than the "
            f"{sampling.max_prompt_length} allowed: raise max_prompt_length{skip}")

  def sample(
      self, variables: dict, split: str, indices: Sequence[int], num_samples: int, *, step: int,
      temperature: float | None = None, top_p: float = 1.0) -> Samples:
    """Samples `num_samples` completions of each of the given problems.

    Args:
      variables: the network's variables, on any devices and with any sharding; they are replicated
        to the devices that sample.
      split: the split of the task that the problems are from.
      indices: indices of the problems in the split.
      num_samples: completions of each problem.
      step: an integer that, with the seed, the problem's index and the sample's, determines the
        random key.
      temperature: sampling temperature; None for the configuration's.
      top_p: probability mass of nucleus sampling, in (0, 1].

    Raises:
      ValueError: for a problem whose prompt is empty or too long, or an unknown split.
    """
    problems = [self._problem(split, index) for index in indices]
    prompts, tokens = self.prompts(problems)
    for problem, prompt in zip(problems, tokens, strict=True):
      require(len(prompt) <= self.cfg.sampling.max_prompt_length,
              self._advice(len(prompt), problem))
    problem_S = np.repeat(np.arange(len(problems)), num_samples)
    sample_S = np.tile(np.arange(num_samples), len(problems))
    index_S = np.asarray(indices)[problem_S]
    drawn = self._complete(
        variables, [tokens[p] for p in problem_S], self.cfg.sampling.max_prompt_length, index_S,
        sample_S, step, temperature, top_p, group=num_samples)
    texts = self._texts(drawn)
    return Samples([problems[p] for p in problem_S], [prompts[p] for p in problem_S],
                   [tokens[p] for p in problem_S], texts, *drawn)

  def resume(self, variables: dict, drawn: Samples, begun: Sequence[np.ndarray],
             num_samples: int, *, step: int) -> Samples:
    """Continues the beginnings of completions, each by up to `max_completion_length` tokens.

    Args:
      variables: the network's variables.
      drawn: completions of the same prompts.
      begun: the beginning of each completion, as token ids, of up to `max_completion_length` tokens
        and those of a few words; they need not be tokens of `drawn`.
      num_samples: continuations of each beginning, consecutive in the result.
      step: an integer that, with the seed, the row and the continuation's index, determines the
        random key.

    Returns:
      The beginnings with their continuations; the log-probabilities of the former are 0, and
      experts are not returned.
    """
    sampling = self.cfg.sampling
    row_S = np.repeat(np.arange(len(drawn)), num_samples)
    longest = max(map(len, begun), default=0)
    token_SN, length_S, logprob_SN, ended_S, *_ = self._complete(
        variables, [np.concatenate([drawn.prompt_tokens[row], begun[row]]) for row in row_S],
        sampling.max_prompt_length + max(longest, sampling.max_completion_length), row_S,
        np.tile(np.arange(num_samples), len(drawn)), step, group=num_samples)
    width = (len(row_S), longest + token_SN.shape[1])
    tokens_SN, logprobs_SN = np.zeros(width, token_SN.dtype), np.zeros(width, logprob_SN.dtype)
    first_S = np.array([len(begun[row]) for row in row_S], length_S.dtype)
    for i, (row, first) in enumerate(zip(row_S, first_S, strict=True)):
      tokens_SN[i, :first] = begun[row]
      tokens_SN[i, first:first + token_SN.shape[1]] = token_SN[i]
      logprobs_SN[i, first:first + token_SN.shape[1]] = logprob_SN[i]
    lengths_S = first_S + length_S
    texts = self._texts((tokens_SN, lengths_S, logprobs_SN, ended_S))
    kept = drawn.rows(row_S)
    return Samples(kept.problems, kept.prompts, kept.prompt_tokens, texts, tokens_SN, lengths_S,
                   logprobs_SN, ended_S)

  def _texts(self, drawn: tuple) -> list[str]:
    token_SN, length_S, _, ended_S, *_ = drawn
    return [self.tokenizer.decode(row[:length - ended]) for row, length, ended in
            zip(token_SN, length_S, ended_S, strict=True)]

  def _complete(self, variables, prompts, max_prompt, index_S, sample_S, step, temperature=None,
                top_p=1.0, group=1) -> tuple[np.ndarray, ...]:
    """Samples any number of prompts, in batches of the compiled program's size.

    Of these, each `group` consecutive ones are the same.

    Returns:
      The host arrays of `Rollout` but `decode_steps`; `experts_STLK` only if it was recorded.
    """
    variables = (jax.device_put(variables, self.mesh.replicated()) if self.mesh
                 else commit_to_device(variables))
    size, pieces = self.cfg.sampling.num_sequences, []
    # A program for other groups takes longer to compile than short prompts take to read. Groups may
    # also be divided between batches or devices.
    if max_prompt < _LONG or size // (self.mesh.mesh.size if self.mesh else 1) % group:
      group = 1
    starts = tqdm(range(0, len(prompts), size), "sampling", unit="batch", file=sys.stderr,
                  disable=not self.show)
    for start in starts:
      rows = np.arange(start, min(start + size, len(prompts)))
      padded = np.resize(rows, size)
      keys_S = sequence_keys(self.cfg.loop.seed, step, jnp.asarray(index_S[padded]),
                             jnp.asarray(sample_S[padded]))
      pieces.append(self._rollout(
          variables, pad_prompts([prompts[row] for row in padded], max_prompt, keys_S),
          temperature, top_p, len(rows), group))
    return tuple(map(np.concatenate, zip(*pieces, strict=True)))

  def _rollout(self, variables, prompts, temperature, top_p, count, group):
    sampling = self.cfg.sampling
    out = rollout(
        self.net, variables, prompts, max_new_tokens=sampling.max_completion_length,
        stop_token=self.stop_tokens, slots=sampling.slots, top_p=top_p,
        temperature=sampling.temperature if temperature is None else temperature,
        record_experts=self.cfg.objective.routing != "free", mesh=self.mesh and self.mesh.mesh,
        drafts=sampling.drafts, cache_dtype=sampling.cache_dtype, group=group)
    invalid = np.flatnonzero(np.asarray(out.invalid_S)[:count])
    require(not invalid.size, f"the logits of the next token of {invalid.size} of {count} "
            "completions are NaN: the model's weights are damaged, or its training has diverged")
    kept = (out.tokens_SN, out.lengths_S, out.logprobs_SN, out.ended_S, out.experts_STLK)
    return tuple(np.asarray(part)[:count] for part in kept if part is not None)


def require_drafts(sampling: SamplingConfig, cfg: ModelConfig) -> None:
  """Raises ValueError if a model's MTP modules cannot draft what the sampling asks of them."""
  if sampling.drafts:
    check_drafts(Transformer(cfg), sampling.drafts, np.array([sampling.max_prompt_length]))


def require_context(sampling: SamplingConfig, max_seq_len: int) -> None:
  """Raises ValueError if prompts and completions may be longer than a model's context."""
  require(sampling.max_prompt_length + sampling.max_completion_length <= max_seq_len,
          f"prompts of max_prompt_length={sampling.max_prompt_length} and completions of "
          f"max_completion_length={sampling.max_completion_length} tokens are longer than the "
          f"model's context of {max_seq_len}: lower a limit, or raise max_seq_len")


def reward_function(cfg: RewardConfig, max_tokens: int) -> Callable[..., rewards.Scored]:
  """Returns the weighted sum of a configuration's rewards, as `rl.rewards.combine` does.

  Args:
    cfg: the rewards' weights.
    max_tokens: limit on the completions' lengths, in tokens, for the overlong penalty.

  Raises:
    ValueError: for a reward of the user's own that cannot be imported.
  """
  known = {
      "accuracy": rewards.accuracy, "format": rewards.well_formed,
      "language": rewards.language_consistency, "tests": rewards.unit_tests(),
      "random": _random}
  weights = cfg.weights()
  known |= {reward.name: rewards.load(reward.function) for reward in cfg.custom if reward.weight}
  if "overlong" in weights:
    known["overlong"] = rewards.overlong(max_tokens, cfg.overlong_tokens)
  return rewards.combine({name: known[name] for name in weights}, weights)


def _random(
    prompts: Sequence[str], completions: Sequence[str], row: Sequence[int], **columns: Any,
) -> list[float]:
  """Returns 0 or 1 from a hash of row, prompt and completion, so that a resumed run repeats it."""
  del columns
  return [float(zlib.crc32(f"{i} {prompt} {completion}".encode()) & 1)
          for i, prompt, completion in zip(row, prompts, completions, strict=True)]
