"""The RL loop: rollouts, rewards, updates, evaluations and checkpoints; resumes if it was killed.

As in `train.loop`, a step's rows of metrics are on disk before its checkpoint is begun. Random keys
are derived from the seed, the step, the problem and the sample, so a checkpoint holds no generator
state.
"""

import contextlib
import dataclasses
import functools
import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from model import ModelConfig, Transformer
from model.checks import require
from rl.advantages import are_equal, group_advantages
from rl.config import RLConfig
from rl.evaluate import evaluate
from rl.mtp import join_mtp, policy_config, save_mtp, split_mtp
from rl.objective import denominator
from rl.rewards import Scored
from rl.sampler import Sampler, Samples, join, require_drafts, reward_function
from rl.step import (
  Experience,
  RLState,
  abstract_rl_state,
  experience,
  init_rl_state,
  make_update,
  refresh,
)
from train import progress
from train.chat import PromptFormat
from train.checkpoint import Checkpoints
from train.config_io import to_dict
from train.cost import CostMeter, total
from train.loop import check_skipped
from train.mesh import commit_to_device, make_sharded_model
from train.optimizer import learning_rate
from train.run_folder import MetricsFile, RunFolder
from train.signals import Signals
from train.tokenizer import Tokenizer
from train.trackers import Trackers, check_installed

_NO_REWARD_STEPS = 5  # steps in succession without any reward, after which a warning is logged
_MINIBATCHES = 2**31  # added to the seed, so that minibatches and sampling use different keys


@dataclasses.dataclass
class RLResult:
  """What `train` returns.

  Attributes:
    status: "finished", or "stopped" by a signal or a time limit, after which the same call resumes.
    state: the state after the last step.
    steps: RL steps taken so far, those before a resume included.
    rows: rows of metrics, one per step.
    evaluations: figures of `rl.evaluate.evaluate`, each with its "step".
    cost: device time, FLOPs, tokens and energy, as `train.cost.total` returns them.
    messages: problems from which the run recovered, such as damaged checkpoints.
  """

  status: str
  state: RLState
  steps: int
  rows: list[dict]
  evaluations: list[dict]
  cost: dict
  messages: list[str]


def train(
    cfg: RLConfig, model_cfg: ModelConfig, variables: dict, tokenizer: Tokenizer,
    folder: RunFolder, *, form: PromptFormat | None = None, show: bool = True,
    max_seconds: float | None = None) -> RLResult:
  """Trains a model on a task's problems, or resumes the run that the folder holds.

  Args:
    cfg: the run's configuration.
    model_cfg: the model's architecture.
    variables: the model's variables at the start of the run; needed for a resume, too.
    tokenizer: the model's tokenizer.
    folder: the run's folder, for metrics, evaluations, completions and checkpoints.
    form: what the model's Hugging Face folder says about prompts and the end of a text; None if
      there is none.
    show: draw a progress bar on stderr.
    max_seconds: save a checkpoint and stop once so many seconds have passed; None for no limit.

  Raises:
    TrainingError: after more than `loop.max_skipped_steps` steps with a non-finite loss or
      gradient.
    ValueError: for prompts that are too long (see `SamplingConfig.long_prompts`), sequences longer
      than the model's context, a reward that fails, a tracker whose package is not installed, or
      `objective.routing` other than "free" for a model without experts.
    CheckpointError: if a checkpoint cannot be written.
  """
  return _Run(cfg, model_cfg, tokenizer, folder, form, show).run(variables, max_seconds)


def epoch_index(place: int, size: int | None, seed: int) -> int:
  """Returns the index of a run's problem: its place, with later epochs in an order of their own.

  The first epoch has the task's own order. The index of a problem differs from epoch to epoch by a
  multiple of the split's size, and so do the random keys of its samples.

  Args:
    place: number of problems that the run has drawn before this one.
    size: number of problems in the split; None or 0 returns the place.
    seed: the run's seed, which, with the epoch, decides the order.
  """
  if not size or place < size:
    return place
  epoch, at = divmod(place, size)
  return epoch * size + _order(seed, epoch, size)[at]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> Sequence[int]:
  order = list(range(size))
  random.Random(f"{seed} {epoch}").shuffle(order)
  return order


class _Run:

  def __init__(self, cfg, model_cfg, tokenizer, folder, form, show):
    require(cfg.objective.routing == "free" or model_cfg.moe is not None,
            f"objective.routing={cfg.objective.routing!r} needs a model with experts; for a dense "
            "model, leave it at 'free'")
    check_installed(cfg.loop.log_to)
    self.cfg, self.model_cfg, self.path, self.show = cfg, model_cfg, folder.path, show
    self.drafts = cfg.sampling.drafts > 0
    require_drafts(cfg.sampling, model_cfg)
    self.sampler = Sampler(
        Transformer(model_cfg if self.drafts else policy_config(model_cfg)), cfg, tokenizer, form)
    self.score = reward_function(cfg.rewards, cfg.sampling.max_completion_length)
    self.spec = cfg.objective.spec(cfg.sampling.max_completion_length)
    self.update = make_update(model_cfg, cfg)
    updates = cfg.objective.updates
    self.rates = jax.vmap(learning_rate(cfg.optimizer, cfg.loop.steps * updates))(
        np.arange(cfg.loop.steps * updates)).reshape(-1, updates)
    # Peak learning rates of the value model and the MTP modules, relative to the policy's.
    self.value_rate, self.mtp_rate = (
        peak / cfg.optimizer.learning_rate if peak else 1.0
        for peak in (cfg.objective.value_learning_rate, cfg.objective.mtp_learning_rate))
    self.flops_per_token = model_cfg.flops_per_token(
        cfg.sampling.max_prompt_length + cfg.sampling.max_completion_length)
    self.checkpoints = Checkpoints(self.path / "checkpoints", keep=cfg.loop.keep_checkpoints)
    self.files = {name: MetricsFile(self.path / f"{name}.jsonl")
                  for name in ("metrics", "evaluations", "completions")}
    self.messages: list[str] = []
    self.steps_without_reward = 0

  def run(self, variables, max_seconds) -> RLResult:
    loop = self.cfg.loop
    if self.cfg.objective.mtp_learning_rate is None and not self.checkpoints.steps():
      save_mtp(self.path, variables)
    # An offline sampler keeps sampling from the model that the run started from.
    self.initial, self.modules = split_mtp(variables)
    state, start, self.position = self._start(variables)
    self.cost = CostMeter(self.path, self.flops_per_token)
    self.trackers = Trackers(loop.log_to, self.path, self.files["metrics"].read(),
                             to_dict(self.cfg))
    bar = progress.bar(loop.steps, start, self.show)
    status, step = "finished", start
    deadline = time.monotonic() + max_seconds if max_seconds else None
    with Signals() as signals, contextlib.ExitStack() as closing:
      for part in (bar, self.trackers, *self.files.values(), self.cost, self.checkpoints):
        closing.callback(part.close)
      self.sampler.check_prompts("train")
      if start == 0:
        self._evaluate(state, 0)
      for step in range(start + 1, loop.steps + 1):
        state, row = self._step(state, step)
        self._record(row, bar)
        signals.can_save()
        self.checkpoints.check()
        done = step == loop.steps
        if done or (loop.eval_every and step % loop.eval_every == 0):
          self._evaluate(state, step)
        stop = signals.received or (deadline and time.monotonic() > deadline)
        if done or stop or (loop.checkpoint_every and step % loop.checkpoint_every == 0):
          self.cost.write()
          self.checkpoints.save(step, state, {"position": self.position})
        if stop and not done:
          status = "stopped"
          break
      self.checkpoints.wait()
    return RLResult(status, state, step, self.files["metrics"].read(),
                    self.files["evaluations"].read(), total(self.path), self.messages)

  def _start(self, variables) -> tuple[RLState, int, int]:
    mesh = make_sharded_model(self.model_cfg, self.cfg.mesh)
    restored = self.checkpoints.restore(abstract_rl_state(variables, self.cfg, mesh))
    step, position = (restored.step, restored.extra["position"]) if restored else (0, 0)
    if restored:
      self.messages += restored.damaged
    for file in self.files.values():
      file.truncate_after(step if restored else -1)
    state = restored.arrays if restored else init_rl_state(variables, self.cfg, mesh)
    return state if mesh else commit_to_device(state), step, position

  def _step(self, state: RLState, step: int) -> tuple[RLState, dict]:
    """Takes one RL step; returns the new state and the step's row of metrics."""
    cfg, began = self.cfg, time.monotonic()
    objective = cfg.objective
    offline = objective.sampler == "initial"
    drawn, scored, more = self._roll_out(
        self._sampled(state, self.initial if offline else state.train.variables), step)
    seen = self._experience(drawn, scored)
    rolled = time.monotonic()
    key = jax.random.fold_in(jax.random.key(cfg.loop.seed + _MINIBATCHES), step)
    rates = {"learning_rate": self.rates[step - 1],
             "value_learning_rate": self.rates[step - 1] * self.value_rate}
    if state.mtp is not None:
      rates["mtp_learning_rate"] = self.rates[step - 1] * self.mtp_rate
    state, metrics = self.update(
        state, seen, {**rates, "spec": self.spec, "temperature": cfg.sampling.temperature,
                      "gae_lambda": objective.gae_lambda}, key)
    metrics = {name: np.asarray(value, np.float64).tolist()
               for name, value in jax.device_get(metrics).items()}
    if state.reference is not None and objective.refresh_every and (
        step % objective.refresh_every == 0):
      state = refresh(state)
    now = time.monotonic()
    tokens = int(drawn.lengths_S.sum())
    self.cost.add(tokens)
    row = {"step": step, **more, **self._describe(drawn, scored, seen), **metrics,
           "learning_rate": float(self.rates[step - 1, -1]),
           "seconds/update": now - rolled, "seconds/step": now - began,
           "tokens_per_second": tokens / (now - began), "time": time.time()}
    self._warn_without_reward(row, scored)
    check_skipped(step, int(metrics["skipped"]), cfg.loop.max_skipped_steps,
                  "loop.max_skipped_steps", self.checkpoints)
    return state, row

  def _sampled(self, state: RLState, policy: dict) -> dict:
    """Returns the variables to sample from: with drafts, also those of the MTP modules."""
    if not self.drafts:
      return policy
    return join_mtp(policy, self.modules if state.mtp is None else state.mtp.variables)

  def _roll_out(self, variables, step) -> tuple[Samples, Scored, dict]:
    """Samples and scores a rollout, in which `resample` replaces groups of equal rewards."""
    sampling, drawn, scored, signal = self.cfg.sampling, [], [], []
    seconds = {"seconds/rollout": 0.0, "seconds/reward": 0.0}
    for _ in range(self.cfg.objective.resample):
      began = time.monotonic()
      size = self.sampler.size("train")
      indices = [epoch_index(place, size, self.cfg.loop.seed) for place in range(
          self.position, self.position + sampling.num_prompts)]
      self.position += sampling.num_prompts
      samples = self.sampler.sample(
          variables, "train", indices, sampling.num_generations, step=step)
      sampled = time.monotonic()
      try:
        judged = self.score(samples.prompts, samples.completions, **samples.columns())
      except ValueError as error:
        raise ValueError(f"step {step}: {error}") from error
      seconds["seconds/rollout"] += sampled - began
      seconds["seconds/reward"] += time.monotonic() - sampled
      drawn.append(samples)
      scored.append(judged)
      counted = [reward if counts else None for reward, counts in zip(
          judged.rewards, self._counted(samples), strict=True)]
      signal += [not are_equal(*group) for group in zip(
          *(itertools.batched(values, sampling.num_generations)
            for values in (counted, judged.scales)), strict=True)]
      if sum(signal) >= sampling.num_prompts:
        break
    groups = np.argsort(np.logical_not(signal), kind="stable")[:sampling.num_prompts, None]
    rows = (groups * sampling.num_generations + np.arange(sampling.num_generations)).ravel()
    return (join(drawn).rows(rows), Scored.join(scored).rows(rows),
            {"groups/sampled": len(signal), "groups/equal": signal.count(False), **seconds})

  def _counted(self, drawn: Samples) -> np.ndarray:
    """Returns whether the reward of each sample counts in its group's baseline, if it has one."""
    objective = self.cfg.objective
    every = not objective.mask_truncated or objective.truncated_in_baseline
    return np.ones(len(drawn), bool) if every else drawn.ended_S

  def _experience(self, drawn: Samples, scored: Scored) -> Experience:
    objective = self.cfg.objective
    ids = [problem.id for problem in drawn.problems]
    learned_S = np.array([reward is not None for reward in scored.rewards])
    if objective.name == "rft":
      correct = [reward == 1 for reward in scored.by_name["accuracy"]]
      advantage_S, learned_S = np.ones(len(drawn), np.float32), np.array(correct)
    elif objective.name == "ppo":
      advantage_S = np.array([reward or 0.0 for reward in scored.rewards], np.float32)
    else:
      advantage_S = group_advantages(
          scored.rewards, ids, baseline=objective.group_baseline,
          valid_S=self._counted(drawn), scales_S=scored.scales).values
    if objective.mask_truncated:
      learned_S &= drawn.ended_S
    return experience(drawn.prompt_tokens, drawn.tokens_SN, drawn.lengths_S, drawn.logprobs_SN,
                      advantage_S, learned_S, experts_STLK=drawn.experts_STLK)

  def _describe(self, drawn: Samples, scored: Scored, seen: Experience) -> dict[str, Any]:
    """Returns the metrics of a rollout, named as in other RL trainers, such as TRL."""
    rewards_S = np.array([np.nan if reward is None else reward for reward in scored.rewards])
    by_group = rewards_S.reshape(-1, self.cfg.sampling.num_generations)
    judged = ~np.isnan(by_group).all(1)
    skip = self.cfg.sampling.long_prompts == "skip"
    return {
        "reward": float(np.nanmean(rewards_S)) if judged.any() else None,
        "reward_std": float(np.nanstd(by_group[judged], axis=1).mean()) if judged.any() else None,
        **scored.metrics(),
        "completions/mean_length": float(drawn.lengths_S.mean()),
        "completions/max_length": int(drawn.lengths_S.max()),
        "completions/clipped_ratio": float(1 - drawn.ended_S.mean()),
        **({"prompts/skipped": self.sampler.skipped["train"]} if skip else {}),
        "completions/learned": int(seen.mask.any(1).sum()),
        "loss/denominator": float(denominator(seen.mask, self.spec))}

  def _warn_without_reward(self, row: dict, scored: Scored) -> None:
    """Warns once when every reward has been 0, or could not be judged, for several steps."""
    self.steps_without_reward = 0 if any(scored.rewards) else self.steps_without_reward + 1
    if self.steps_without_reward == _NO_REWARD_STEPS:
      means = ", ".join(f"{name} {row[f'rewards/{name}/mean']:.2g}" for name in scored.by_name)
      logging.warning(
          "every reward was 0, or could not be judged, in the last %d steps, so that nothing is "
          "learned. The rewards by name are: %s; %.0f %% of the completions were truncated at "
          "sampling.max_completion_length. Look at %s: if no completion has the template's format, "
          "choose another template or a model tuned on it, or add a reward for the format; if none "
          "ends, raise the limit; if none is correct, take an easier task or a better model.",
          _NO_REWARD_STEPS, means, 100 * row["completions/clipped_ratio"],
          self.path / "completions.jsonl")

  def _record(self, row: dict, bar: tqdm) -> None:
    self.files["metrics"].append(row)
    self.trackers.append(row)
    bar.set_postfix({"reward": f"{row['reward']:.3f}" if row["reward"] is not None else "none",
                     "length": f"{row['completions/mean_length']:.0f}",
                     "tok/s": f"{row['tokens_per_second']:,.0f}"}, refresh=False)
    bar.update()

  def _evaluate(self, state: RLState, step: int) -> None:
    loop = self.cfg.loop
    found, drawn = evaluate(
        self.sampler, self._sampled(state, state.train.variables), split="heldout",
        problems=loop.eval_problems, samples=loop.eval_samples)
    self.files["evaluations"].append({"step": step, **found})
    for i in range(0, len(drawn), max(1, len(drawn) // max(1, loop.samples_logged)))[
        :loop.samples_logged]:
      self.files["completions"].append({
          "step": step, "prompt": drawn.prompts[i], "completion": drawn.completions[i],
          "answer": drawn.problems[i].answer, "tokens": int(drawn.lengths_S[i])})
