"""GRPO by other libraries, on torch: TRL's trainer, or a minimal loop on transformers' `generate`.

Run it from the root of the repository, with an interpreter that has torch, transformers and, for
--kind=trl, trl (written for version 1.16); jax is not needed.

    python -m experiments.benchmarks.peers.grpo CONFIG [--kind=...] [--generation=...]

CONFIG is the path of a JSON file that `experiments.benchmarks.rl.bench_rl` writes. Commands are
lines on stdin, so that the caller can alternate this program with others; answers are lines of
JSON:

    {"ready": true, "params": 10000000, "versions": {...}}    after the warm-up
    go 5       ->  {"rows": [{"rollout": 1.2, "reward": 0.0, "update": 0.3, "seconds": 1.5,
                    "tokens": 4096, "mean_reward": 0.25}, ...], "masters": "float32"}
    evaluate   ->  {"rates": [0.5, ...]}     fraction of correct samples of each held-out problem
    reset      ->  {"reset": true}           weights and optimizer as at the start; the sequence of
                                             problems continues

Times are in seconds; tokens are the sampled ones, up to and including the one that ends a turn.
Whatever the libraries print goes to stderr.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from experiments.benchmarks.rl import sums


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("config", type=_config, help="path of a JSON file that bench_rl writes")
  parser.add_argument("--kind", choices=("trl", "transformers"), default="trl")
  parser.add_argument("--generation", choices=sums.GENERATION, default="generate", help="; ".join(
      f"{name}: {what}" for name, what in sums.GENERATION.items()))
  return parser.parse_args(argv)


def _config(path: str) -> dict[str, Any]:
  try:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except (OSError, json.JSONDecodeError) as error:
    raise argparse.ArgumentTypeError(f"not a readable JSON file: {error}") from None


class Conversation:
  """Executes commands from stdin and writes answers."""

  def __init__(self, answers: TextIO, policy: "Policy", reset: Callable[[], None]):
    self._answers, self._policy, self._reset = answers, policy, reset
    self._left, self._rows, self._warm = policy.config["warm_up"], [], False

  def _say(self, **answer: Any) -> None:
    print(json.dumps(answer), file=self._answers, flush=True)

  def done(self, row: dict[str, float]) -> None:
    """Records a step; after the last one requested, answers and waits for the next command."""
    self._rows.append(row)
    self._left -= 1
    if self._left:
      return
    if self._warm:
      self._say(rows=self._rows, masters=self._policy.masters())
    else:
      self._policy.evaluate()
      self._say(ready=True, params=self._policy.model.num_parameters(), versions=_versions())
    self._warm = True
    self._wait()

  def _wait(self) -> None:
    """Executes commands until one requests steps; exits the program at the end of the input."""
    for line in sys.stdin:
      command, _, count = line.strip().partition(" ")
      if command == "go":
        self._left, self._rows = int(count), []
        return
      if command == "evaluate":
        self._say(rates=self._policy.evaluate())
      elif command == "reset":
        self._reset()
        self._say(reset=True)
      else:
        sys.exit(f"error: unknown command {line.strip()!r}; expected go N, evaluate or reset")
    sys.exit(0)


class Clock:
  """Seconds of a step's phases, the device's work included; the update is what remains."""

  def __init__(self):
    self.start()

  def start(self) -> None:
    self._spent = dict.fromkeys(sums.PHASES, 0.0)
    self._began = time.perf_counter()

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    _synchronize()
    began = time.perf_counter()
    yield
    _synchronize()
    self._spent[name] += time.perf_counter() - began

  def row(self) -> dict[str, float]:
    _synchronize()
    seconds = time.perf_counter() - self._began
    self._spent["update"] = seconds - self._spent["rollout"] - self._spent["reward"]
    return self._spent | {"seconds": seconds}


def _synchronize() -> None:
  if torch.cuda.is_available():
    torch.cuda.synchronize()


class Policy:
  """The model, its tokenizer, and a copy of the initial weights."""

  def __init__(self, config: dict[str, Any], dtype: Any):
    self.config = config
    self.device = "cuda" if torch.cuda.is_available() else "cpu"
    self.model = transformers.AutoModelForCausalLM.from_pretrained(
        config["model"], dtype=dtype, attn_implementation="sdpa").to(self.device)
    self.tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(pathlib.Path(config["model"]) / "tokenizer.json"),
        eos_token=config["stop"], pad_token=config["pad"], padding_side="left")
    self.model.generation_config = transformers.GenerationConfig(
        eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id)
    self._initial = {name: value.clone() for name, value in self.model.state_dict().items()}
    for row in (*config["train"], *config["heldout"]):
      if (ids := self.tokenizer(text=row["prompt"])["input_ids"]) != row["ids"]:
        raise ValueError(f"the prompt {row['prompt']!r} has the tokens {ids} in transformers, and "
                         f"{row['ids']} in this project")

  def restore(self, optimizer: Any) -> None:
    self.model.load_state_dict(self._initial)
    optimizer.state.clear()

  def masters(self) -> str:
    return str(next(self.model.parameters()).dtype).removeprefix("torch.")

  def autocast(self):
    return torch.autocast(self.device, torch.bfloat16, self.config["compute"] == "bfloat16")

  def sample(self, rows: list[dict[str, Any]]) -> tuple[Any, Any, Any, list[str]]:
    """Returns prompts and completions [S, T], their mask, completions' mask [S, N], and texts."""
    prompt_ST = self.tokenizer.pad(
        {"input_ids": [row["ids"] for row in rows]}, return_tensors="pt").to(self.device)
    width = prompt_ST["input_ids"].shape[1]
    with torch.no_grad(), self.autocast():
      tokens_ST = self.model.generate(
          **prompt_ST, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
          max_new_tokens=self.config["max_completion_length"])
    new_SN = tokens_ST[:, width:]
    ended_SN = new_SN == self.tokenizer.eos_token_id
    mask_SN = ended_SN.cumsum(1) - ended_SN.int() == 0
    texts = [self.tokenizer.decode(ids[mask], skip_special_tokens=True)
             for ids, mask in zip(new_SN.cpu(), mask_SN.cpu(), strict=True)]
    return tokens_ST, torch.cat((prompt_ST["attention_mask"], mask_SN), 1), mask_SN, texts

  def evaluate(self) -> list[float]:
    samples, size = self.config["eval_samples"], self.config["num_sequences"]
    rows = [row for row in self.config["heldout"] for _ in range(samples)]
    correct = []
    for start in range(0, len(rows), size):
      part = rows[start:start + size]
      correct += sums.rewards(self.sample(part)[-1], [row["answer"] for row in part])
    self.model.train()
    return [sum(correct[i:i + samples]) / samples for i in range(0, len(correct), samples)]


def run_trl(policy: Policy, answers: TextIO, generation: str) -> None:
  """Trains with TRL's GRPOTrainer, whose callback waits for commands between steps."""
  clock, config = Clock(), policy.config
  seen: dict[str, float] = {}

  class Timed(trl.GRPOTrainer):

    def _generate(self, *args, **kwargs):
      with clock.phase("rollout"):
        return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
      with clock.phase("reward"):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
      seen.update(tokens=sum(map(len, completion_ids_list)), mean_reward=rewards.mean().item())
      return rewards

  class StepCallback(transformers.TrainerCallback):

    def on_train_begin(self, *args, **kwargs):
      clock.start()

    def on_step_end(self, *args, **kwargs):
      conversation.done(clock.row() | seen)
      clock.start()

  def reward(completions, answer, **columns):
    return sums.rewards(completions, answer)

  with tempfile.TemporaryDirectory() as folder:
    trainer = Timed(
        policy.model, reward, args=_trl_config(config, folder, generation),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": row["prompt"], "answer": row["answer"]} for row in config["train"]]),
        processing_class=policy.tokenizer, callbacks=[StepCallback()])
    if generation == "compiled":
      trainer.generation_config.disable_compile = False
    conversation = Conversation(
        answers, policy, lambda: policy.restore(trainer.optimizer.optimizer))
    trainer.train()


def _trl_config(config: dict[str, Any], folder: str, generation: str) -> Any:
  """Returns the settings of `bench_rl`'s own run, without logs, checkpoints or recomputation."""
  micro, bfloat16 = config["micro_batch_size"], config["compute"] == "bfloat16"
  return trl.GRPOConfig(
      output_dir=folder, per_device_train_batch_size=micro,
      gradient_accumulation_steps=config["num_sequences"] // micro,
      num_generations=config["num_generations"],
      max_completion_length=config["max_completion_length"], temperature=1.0, top_k=0,
      learning_rate=config["learning_rate"], lr_scheduler_type="constant", adam_beta2=0.95,
      weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused", beta=0.0, loss_type="dapo",
      epsilon=0.2, epsilon_high=0.28, max_steps=10**6, shuffle_dataset=False, seed=config["seed"],
      gradient_checkpointing=False, bf16=bfloat16, use_cpu=not torch.cuda.is_available(),
      cache_implementation="static" if generation == "compiled" else None,
      use_transformers_continuous_batching=generation == "continuous",
      # A fraction of the free memory: several programs share the device.
      transformers_continuous_batching_config={"max_memory_percent": 0.1},
      logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True)


def run_transformers(policy: Policy, answers: TextIO) -> None:
  """Trains with a minimal loop: generate, compute advantages within groups, update."""
  config, position = policy.config, 0
  optimizer = torch.optim.AdamW(policy.model.parameters(), lr=config["learning_rate"],
                                betas=(0.9, 0.95), weight_decay=0.0, fused=True)
  conversation = Conversation(answers, policy, lambda: policy.restore(optimizer))
  groups = config["num_sequences"] // config["num_generations"]
  while True:
    clock = Clock()
    problems = [config["train"][(position + i) % len(config["train"])] for i in range(groups)]
    position += groups
    rows = [row for row in problems for _ in range(config["num_generations"])]
    with clock.phase("rollout"):
      tokens_ST, real_ST, mask_SN, texts = policy.sample(rows)
    with clock.phase("reward"):
      reward = torch.tensor(sums.rewards(texts, [row["answer"] for row in rows]))
    by_group = reward.view(groups, -1)
    centred = by_group - by_group.mean(1, keepdim=True)
    advantage_S = (centred / (by_group.std(1, keepdim=True) + 1e-4)).flatten().to(policy.device)
    _learn(policy, optimizer, tokens_ST, real_ST, mask_SN, advantage_S)
    conversation.done(clock.row() | {"tokens": int(mask_SN.sum()),
                                     "mean_reward": reward.mean().item()})


def _learn(policy, optimizer, tokens_ST, real_ST, mask_SN, advantage_S) -> None:
  new, micro = mask_SN.shape[1], policy.config["micro_batch_size"]
  position_ST = (real_ST.cumsum(1) - 1).clamp(min=0)
  parts = zip(*(x.split(micro) for x in (tokens_ST, real_ST, position_ST, mask_SN, advantage_S)),
              strict=True)
  for tokens, real, positions, mask, advantage in parts:
    with policy.autocast():
      logits = policy.model(input_ids=tokens, attention_mask=real, position_ids=positions,
                            use_cache=False, logits_to_keep=new + 1).logits[:, :-1]
    logp = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens[:, -new:].flatten(), reduction="none")
    (-(logp.view_as(mask) * advantage[:, None] * mask).sum() / mask_SN.sum()).backward()
  torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
  optimizer.step()
  optimizer.zero_grad(set_to_none=True)


def _versions() -> dict[str, str]:
  return {module.__name__: module.__version__ for module in (torch, transformers, trl) if module}


def main(flags: argparse.Namespace) -> None:
  # Answers go to the original stdout, and what libraries print to stderr.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  torch.manual_seed(flags.config["seed"])
  narrow = flags.config["compute"] == "bfloat16" and flags.generation != "generate"
  policy = Policy(flags.config, torch.bfloat16 if narrow else torch.float32)
  if flags.kind == "trl":
    run_trl(policy, answers, flags.generation)
  else:
    run_transformers(policy, answers)


if __name__ == "__main__":
  parsed = parse(sys.argv[1:])
  trl = None
  try:
    import torch
    import transformers
    if parsed.kind == "trl":
      import datasets
      import trl
  except ImportError as missing:
    sys.exit(f"error: {sys.executable} lacks {missing.name}: run this with an interpreter that has "
             "torch, transformers and, for --kind=trl, trl and datasets")
  try:
    main(parsed)
  except ValueError as error:
    sys.exit(f"error: {error}")
