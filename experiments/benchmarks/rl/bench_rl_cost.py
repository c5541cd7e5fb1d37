"""Compare the cost of RL objectives: seconds per step by phase, and peak memory.

The objectives alternate in one process, and learn from the same rollouts of the same random model,
whose completions all have the maximum length. A rollout is the same work for all objectives, so it
is timed once per round; a step is a rollout and an update. Rewards are left out, because their cost
depends on the task alone. Bytes are those that the compiler reports for the update. A GPU's peak
memory in use is not reported: it is that of the process, not of one objective.

Shape letters:  S sequences
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments import settings
from experiments.options import Options, writes_results
from experiments.reports import results
from experiments.reports.summary import backend, bench_summary, claim
from model import ModelConfig, Transformer, get_config, init_on_host
from model.checks import require
from rl.config import RLConfig, SamplingConfig
from rl.rollout import pad_prompts, rollout, sequence_keys
from rl.step import Experience, experience, init_rl_state, make_update
from train.config_io import to_dict


@dataclasses.dataclass(frozen=True)
class Bench:
  """How the objectives are compared.

  Attributes:
    objectives: names of objectives, as in `rl.config.ObjectiveConfig`; the first is the baseline.
    rounds: number of rounds in which the objectives alternate; medians over them are reported.
  """

  objectives: tuple[str, ...] = ("grpo_r1", "ppo", "rft")
  rounds: int = 7

  def __post_init__(self):
    require(self.rounds > 0, f"Bench.rounds={self.rounds} must be positive")
    require(0 < len(self.objectives) == len(set(self.objectives)),
            f"Bench.objectives={','.join(self.objectives)!r} must name one or more, each once")


# Without MTP, which RL does not train. The rollouts' shape is that of r1_zero at scale cpu.
_NANO = dataclasses.replace(get_config("nano"), mtp=None)
_RL = RLConfig(sampling=SamplingConfig(
    num_prompts=16, num_generations=16, max_prompt_length=16, max_completion_length=32))


@dataclasses.dataclass(frozen=True)
class BenchConfig:
  """What is measured, and how.

  Attributes:
    bench: how the objectives are compared.
    model: the architecture.
    rl: the RL run; each of `bench.objectives` replaces its objective's name.
  """

  bench: Bench = Bench()
  model: ModelConfig = _NANO
  rl: RLConfig = _RL

  def __post_init__(self):
    require(self.rl.mesh.is_single_device,
            "bench_rl_cost measures one device: leave rl.mesh at 1 device")
    routing = self.rl.objective.routing
    require(routing == "free",
            f"bench_rl_cost keeps no routing: rl.objective.routing={routing!r} must be 'free'")
    for name in self.bench.objectives:
      self.run(name)

  def run(self, name: str) -> RLConfig:
    """Returns the RL run with one of the objectives."""
    return dataclasses.replace(
        self.rl, objective=dataclasses.replace(self.rl.objective, name=name))


CONFIG = BenchConfig()


@writes_results
def main(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings, named={"model": get_config})
  variables = init_on_host(cfg.model, cfg.rl.loop.seed)
  seen = _roll_out(cfg, variables, 0)
  updates = {name: _Update(cfg, name, variables, seen) for name in cfg.bench.objectives}
  rollout_seconds = []
  for index in range(1, cfg.bench.rounds + 1):
    started = time.perf_counter()
    seen = _roll_out(cfg, variables, index)
    rollout_seconds.append(time.perf_counter() - started)
    for update in updates.values():
      update.seconds.append(update.take(seen))
  rollout_median = float(np.median(rollout_seconds))
  costs = {name: update.cost(rollout_median) for name, update in updates.items()}
  first = costs[cfg.bench.objectives[0]]
  compared = ("step_seconds", "update_seconds", "peak_bytes")
  ratios = {name: {key: cost[key] / first[key] for key in compared} for name, cost in costs.items()}
  _report(cfg, costs, ratios, rollout_median)
  if options.out:
    results.record(options.out, {
        "shape": to_dict(cfg), "params": cfg.model.param_count(), "tokens": int(seen.mask.sum()),
        "ratios": ratios, "objectives": costs, "rollout_seconds": rollout_median,
        "rollout_seconds_by_round": rollout_seconds}, summary)


def _roll_out(cfg: BenchConfig, variables: dict, step: int) -> Experience:
  """Returns completions of random prompts as data of an update; half count as correct."""
  sampling = cfg.rl.sampling
  prompt_S, sample_S = np.divmod(np.arange(sampling.num_sequences), sampling.num_generations)
  prompts = np.random.default_rng(step).integers(
      0, cfg.model.vocab_size, (sampling.num_prompts, sampling.max_prompt_length))[prompt_S]
  keys_S = sequence_keys(cfg.rl.loop.seed, step, jnp.asarray(prompt_S), jnp.asarray(sample_S))
  out = jax.device_get(rollout(
      Transformer(cfg.model), variables,
      pad_prompts(list(prompts), sampling.max_prompt_length, keys_S),
      max_new_tokens=sampling.max_completion_length, stop_token=None,
      temperature=sampling.temperature, slots=sampling.slots))
  correct_S = sample_S % 2 == 0
  return experience(list(prompts), out.tokens_SN, out.lengths_S, out.logprobs_SN,
                    np.where(correct_S, 1.0, -1.0), np.ones_like(correct_S))


class _Update:
  """The update of one objective, compiled and warm, with the seconds that it took."""

  def __init__(self, cfg: BenchConfig, name: str, variables: dict, seen: Experience):
    run = cfg.run(name)
    rates = np.full(run.objective.updates, run.optimizer.learning_rate, np.float32)
    self._hyper = {
        "learning_rate": rates, "value_learning_rate": rates,
        "spec": run.objective.spec(run.sampling.max_completion_length),
        "temperature": np.float32(run.sampling.temperature),
        "gae_lambda": np.float32(run.objective.gae_lambda)}
    self._key, self.seconds = jax.random.key(0), []
    self._state = init_rl_state(variables, run)
    self._state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))
    self._update = make_update(cfg.model, run).lower(
        self._state, seen, self._hyper, self._key).compile()
    self.take(seen)

  def take(self, seen: Experience) -> float:
    """Takes one update; returns its seconds."""
    started = time.perf_counter()
    self._state, metrics = self._update(self._state, seen, self._hyper, self._key)
    jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - started

  def cost(self, rollout_seconds: float) -> dict:
    """Returns median seconds, and bytes; outputs that reuse an argument's memory count once."""
    used, median = self._update.memory_analysis(), float(np.median(self.seconds))
    return {
        "step_seconds": rollout_seconds + median, "update_seconds": median,
        "update_seconds_by_round": self.seconds,
        "peak_bytes": (used.argument_size_in_bytes + used.temp_size_in_bytes
                       + used.output_size_in_bytes - used.alias_size_in_bytes),
        "state_bytes": self._state_bytes, "temporary_bytes": used.temp_size_in_bytes}


def _report(cfg: BenchConfig, costs: dict, ratios: dict, rollout_seconds: float) -> None:
  first, *others = costs
  for name in others:
    ratio = ratios[name]
    print(f"{name} relative to {first}: {ratio['step_seconds']:.2f} x seconds per step, "
          f"{ratio['update_seconds']:.2f} x seconds per update, {ratio['peak_bytes']:.2f} x peak "
          "bytes")
  sampling = cfg.rl.sampling
  print(f"{cfg.model.param_count():,} parameters; {sampling.num_sequences} completions of "
        f"{sampling.max_completion_length} tokens, prompts of {sampling.max_prompt_length}; "
        f"{cfg.rl.objective.updates} optimizer step(s) per rollout")
  print(f"{'':16}{'step s':>9}{'rollout s':>11}{'update s':>10}{'peak MB':>9}{'state MB':>10}"
        f"{'temporary MB':>14}")
  for name, cost in costs.items():
    print(f"{name:16}{cost['step_seconds']:9.3f}{rollout_seconds:11.3f}"
          f"{cost['update_seconds']:10.3f}{cost['peak_bytes'] / 1e6:9,.1f}"
          f"{cost['state_bytes'] / 1e6:10,.1f}{cost['temporary_bytes'] / 1e6:14,.1f}")


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  costs, sampling = result["objectives"], result["shape"]["rl"]["sampling"]
  first, *others = costs
  rounds = f"medians of {result['shape']['bench']['rounds']} rounds"
  measured = {"step_seconds": "seconds per step", "update_seconds": "seconds per update",
              "peak_bytes": "peak bytes of an update"}
  completions = sampling["num_prompts"] * sampling["num_generations"]
  return bench_summary(
      "bench_rl_cost", backend(result),
      f"Cost of RL objectives on the same rollouts: {result['params']:,} parameters, "
      f"{completions} completions of {sampling['max_completion_length']} tokens.", result,
      claims=[claim(f"{name} against {first}: {words}", "ratio", result["ratios"][name][key],
                    n="the compiled program" if key == "peak_bytes" else rounds)
              for name in others for key, words in measured.items()],
      tables=[{"name": "costs", "caption": "Seconds and memory",
               "header": ["objective", "step s", "rollout s", "update s", "peak MB", "state MB",
                          "temporary MB"],
               "rows": [[name, cost["step_seconds"], result["rollout_seconds"],
                         cost["update_seconds"], cost["peak_bytes"] / 1e6,
                         cost["state_bytes"] / 1e6, cost["temporary_bytes"] / 1e6]
                        for name, cost in costs.items()]}])
