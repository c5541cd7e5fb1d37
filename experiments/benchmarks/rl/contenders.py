"""The contenders of `bench_rl`: this project's GRPO, and that of a peer in its own process.

Each takes steps, evaluates and resets on command, and all measure alike: sampled tokens, up to and
including the one that ends a turn, and the seconds of a step's phases.
"""

import dataclasses
import pathlib
import sys
import time
from typing import Any, Protocol

import jax
import numpy as np

from experiments.benchmarks.rl import sums
from experiments.benchmarks.timing import Contender, PeerProcess, Unavailable
from model import Numerics, Transformer
from model.checks import require, require_positive, require_range
from rl.advantages import group_advantages
from rl.config import ObjectiveConfig, RLConfig, SamplingConfig
from rl.loading import load_model
from rl.sampler import Sampler
from rl.step import experience, init_rl_state, make_update
from rl.tasks import get_task
from rl.tasks.problem import Problem
from train import chat
from train.config import OptimizerConfig

_ROOT = pathlib.Path(__file__).parents[3]
_PROBLEMS = 4096  # most problems of "train" before their sequence repeats
_WARM_UP = 2  # steps of a contender before its first round, which compile most programs
_EVALUATION = 2**31 - 1  # the step from which evaluations derive their random keys


@dataclasses.dataclass(frozen=True)
class Bench:
  """What is trained, and how it is timed.

  Attributes:
    model: Hugging Face folder of a model that was tuned on ChatML.
    task: spec of the task, as `rl.tasks.get_task` reads it; its answers must be integers.
    num_prompts: prompts per rollout.
    num_generations: completions of each prompt.
    max_prompt_length: longest prompt, in tokens.
    max_completion_length: tokens after which a completion is truncated.
    micro_batch_size: sequences per forward and backward pass.
    learning_rate: the learning rate, which is constant.
    compute: format of matrix products, "bfloat16" or "float32"; our master weights are float32.
    unroll: layers in one iteration of our sampler's loop over layers, as in `model.Transformer`.
    seed: seed of everything random.
    peer: the peer to compare with, "trl" or "transformers"; None for ours alone. "transformers" is
      a minimal loop of `generate` and one training step, for machines without TRL.
    peer_python: an interpreter that has torch, transformers and, for "trl", trl and datasets; None
      for the present one.
    peer_generation: methods by which TRL samples, keys of `sums.GENERATION`. All are timed and the
      fastest is reported first; the fastest with float32 weights is trained.
    peer_timeout: longest time to wait for a peer's answer, in seconds.
    steps_timed: steps per round.
    warm_up_rounds: largest number of untimed rounds before the timed ones; they end when every
      contender's pace is steady.
    repeats: number of timed rounds, over which medians are reported; the contenders alternate, each
      from the initial weights.
    minutes: longest training time of a contender; 0 for no training.
    goal: held-out pass@1 at which a contender's training ends.
    eval_problems: number of held-out problems in an evaluation.
    eval_samples: completions of each problem in an evaluation.
    eval_every: training steps between evaluations.
  """

  model: str = ""
  task: str = "arithmetic:terms=2,digits=1,operators=+"
  num_prompts: int = 32
  num_generations: int = 16
  max_prompt_length: int = 24
  max_completion_length: int = 32
  micro_batch_size: int = 256
  learning_rate: float = 1e-5
  compute: str = "bfloat16"
  unroll: int = 1
  seed: int = 0
  peer: str | None = None
  peer_python: str | None = None
  peer_generation: tuple[str, ...] = tuple(sums.GENERATION)
  peer_timeout: float = 240.0
  steps_timed: int = 3
  warm_up_rounds: int = 6
  repeats: int = 5
  minutes: float = 1.5
  goal: float = 0.85
  eval_problems: int = 64
  eval_samples: int = 8
  eval_every: int = 5

  def __post_init__(self):
    require(self.peer in (None, "trl", "transformers"),
            f"bench.peer={self.peer} must be none, trl or transformers")
    known = sums.GENERATION
    require(bool(self.peer_generation) and set(self.peer_generation) <= set(known),
            f"bench.peer_generation={self.peer_generation} must be some of {', '.join(known)}")
    require(self.compute in ("bfloat16", "float32"),
            f"bench.compute={self.compute!r} must be bfloat16 or float32")
    require_positive(self, "unroll", "steps_timed", "repeats", "eval_samples", "eval_every")
    require(self.warm_up_rounds > 1,
            "bench.warm_up_rounds must be at least 2, as the last two are compared")
    require_range(self, 0, 60, "minutes")
    require_range(self, 0, 1, "goal")
    require(self.eval_problems > 1, "bench.eval_problems must be at least 2 for an interval")
    self.run()

  @property
  def num_sequences(self) -> int:
    return self.num_prompts * self.num_generations

  @property
  def num_problems(self) -> int:
    """Problems of "train" before they repeat: whole rollouts, as TRL leaves out partial ones."""
    return max(1, _PROBLEMS // self.num_prompts) * self.num_prompts

  def run(self) -> RLConfig:
    """Returns our run: DAPO's loss, TRL's default, without KL and with one step per rollout."""
    sampling = SamplingConfig(
        num_prompts=self.num_prompts, num_generations=self.num_generations,
        max_prompt_length=self.max_prompt_length,
        max_completion_length=self.max_completion_length)
    optimizer = OptimizerConfig(learning_rate=self.learning_rate, schedule="constant",
                                weight_decay=0.0, moments="float32")
    cfg = RLConfig(
        task=self.task, template="chatml_number", sampling=sampling, optimizer=optimizer,
        objective=ObjectiveConfig(name="dapo", micro_batch_size=self.micro_batch_size))
    return dataclasses.replace(cfg, loop=dataclasses.replace(cfg.loop, seed=self.seed))


class Trainer(Contender, Protocol):
  """A contender that trains by RL.

  Attributes:
    masters: format of the weights that are trained; None until it is known.
  """

  masters: str | None

  def steps(self, count: int) -> list[dict[str, float]]:
    """Takes steps; returns each one's seconds, in all and by phase, "tokens" and "mean_reward"."""

  def evaluate(self) -> list[float]:
    """Returns the fraction of correct samples of each held-out problem."""

  def reset(self) -> None:
    """Restores the initial weights and optimizer; the sequence of problems continues."""


class OwnTrainer:
  """This project's sampler, advantages and update, composed as in its RL loop."""

  name, masters = "ours", "float32"

  def __init__(self, bench: Bench):
    self._problems = {"train": _problems(bench, "train", bench.num_problems),
                      "heldout": _problems(bench, "heldout", bench.eval_problems)}
    self.questions = [problem.question for problem in self._problems["heldout"]]
    require(len(set(self.questions)) > 1, f"all {bench.eval_problems} held-out problems of "
            f"{bench.task} ask the same question, and an interval needs two: raise "
            "bench.eval_problems")
    start = load_model(bench.model)
    self.bench, self.cfg, run = bench, start.cfg, bench.run()
    require(start.tokenizer_path is not None, f"{bench.model} has no tokenizer.json")
    network = dataclasses.replace(
        start.cfg, numerics=Numerics(params="float32", compute=bench.compute))
    tokenizer = chat.ChatTokenizer.load(start.tokenizer_path)
    self.sampler = Sampler(Transformer(network, unroll=bench.unroll), run, tokenizer)
    self._run, self._initial = run, start.variables
    self._update, self._spec = make_update(network, run), run.objective.spec(1)
    self._step = 0
    self.reset()

  def warm_up(self) -> None:
    """Compiles the programs."""
    self.steps(_WARM_UP)
    self.evaluate()

  def quit(self) -> None:
    pass

  def reset(self) -> None:
    self._state = init_rl_state(self._initial, self._run)

  def steps(self, count: int) -> list[dict[str, float]]:
    return [self._step_once() for _ in range(count)]

  def _step_once(self) -> dict[str, float]:
    bench, began = self.bench, time.perf_counter()
    first = self._step * bench.num_prompts
    drawn = self.sampler.sample(
        self._state.train.variables, "train",
        [index % bench.num_problems for index in range(first, first + bench.num_prompts)],
        bench.num_generations, step=self._step)
    sampled = time.perf_counter()
    rewards = sums.rewards(drawn.completions, [problem.answer for problem in drawn.problems])
    judged = time.perf_counter()
    # Groups by position: if there are few problems, a rollout may pose the same one twice.
    groups = np.repeat(np.arange(bench.num_prompts), bench.num_generations)
    seen = experience(
        drawn.prompt_tokens, drawn.tokens_SN, drawn.lengths_S, drawn.logprobs_SN,
        group_advantages(rewards, groups).values, np.ones(len(drawn), bool),
        # One shape for all rollouts, so that nothing is compiled while the clock runs.
        multiple=bench.max_prompt_length + bench.max_completion_length)
    rate = np.full(1, bench.learning_rate, np.float32)
    self._state, _ = self._update(self._state, seen, {
        "learning_rate": rate, "value_learning_rate": rate, "spec": self._spec,
        "temperature": 1.0, "gae_lambda": 1.0}, jax.random.key(self._step))
    jax.block_until_ready(self._state)
    self._step += 1
    now = time.perf_counter()
    return {"rollout": sampled - began, "reward": judged - sampled, "update": now - judged,
            "seconds": now - began, "tokens": int(drawn.lengths_S.sum()),
            "mean_reward": float(np.mean(rewards))}

  def evaluate(self) -> list[float]:
    bench = self.bench
    drawn = self.sampler.sample(
        self._state.train.variables, "heldout", range(bench.eval_problems), bench.eval_samples,
        step=_EVALUATION)
    correct = sums.rewards(drawn.completions, [problem.answer for problem in drawn.problems])
    return np.reshape(correct, (-1, bench.eval_samples)).mean(1).tolist()

  def for_peers(self) -> dict[str, Any]:
    """Returns the config of `experiments.benchmarks.peers.grpo`, with the prompts' tokens."""
    bench, tokenizer = self.bench, self.sampler.tokenizer

    def rows(problems):
      prompts = [self.sampler.template.render(problem.question) for problem in problems]
      return [{"prompt": prompt, "ids": ids.tolist(), "answer": problem.answer}
              for prompt, ids, problem in zip(
                  prompts, tokenizer.encode_batch(prompts), problems, strict=True)]

    names = ("model", "num_generations", "num_sequences", "max_completion_length",
             "micro_batch_size", "learning_rate", "compute", "seed", "eval_samples")
    return {name: getattr(bench, name) for name in names} | {
        "warm_up": _WARM_UP,
        "stop": tokenizer.decode([tokenizer.eos]), "pad": tokenizer.decode([tokenizer.pad]),
        **{split: rows(problems) for split, problems in self._problems.items()}}


def _problems(bench: Bench, split: str, count: int) -> list[Problem]:
  """Returns the first problems of a split, whose answers `sums.rewards` must be able to read."""
  task = get_task(bench.task)
  problems = [task.problem(split, index) for index in range(count)]
  for problem in problems:
    require(sums.is_number(problem.answer), f"bench.task={bench.task}: the answer to "
            f"{problem.question!r} is {problem.answer!r}, and must be an integer: choose a task "
            "with such answers, as arithmetic is")
  return problems


class PeerTrainer:
  """A peer that trains in its own process; see `experiments.benchmarks.peers.grpo`."""

  def __init__(self, bench: Bench, generation: str, config: pathlib.Path):
    self.name = f"{bench.peer} ({generation})" if bench.peer == "trl" else bench.peer
    self.versions: dict[str, str] = {}
    self.masters = None
    self._process = PeerProcess(
        [bench.peer_python or sys.executable, "-m", "experiments.benchmarks.peers.grpo",
         str(config), f"--kind={bench.peer}", f"--generation={generation}"],
        bench.peer_timeout, cwd=_ROOT)

  def ready(self, params: int) -> None:
    """Waits until the peer is warm.

    Raises:
      Unavailable: if the peer has stopped, or its model does not have `params` parameters.
    """
    answer = self._process.answer()
    self.versions = answer["versions"]
    if answer["params"] != params:
      raise Unavailable(
          f"{self.name} has {answer['params']:,} parameters, and ours {params:,}")

  def steps(self, count: int) -> list[dict[str, float]]:
    answer = self._process.ask(f"go {count}")
    self.masters = answer["masters"]
    return answer["rows"]

  def evaluate(self) -> list[float]:
    return self._process.ask("evaluate")["rates"]

  def reset(self) -> None:
    self._process.ask("reset")

  def quit(self) -> None:
    self._process.quit()
