"""A model, a tokenizer and a task on which RL runs within a test.

    python tests/rl/small.py TASK FOLDER    # trains for `RUN`, in a process that a test may kill

The model writes hardly anything but a correct answer, an incorrect one or the end, so that some of
its completions are correct, some are incorrect and some are truncated.
"""

import dataclasses
import functools
import pathlib
import sys

if __name__ == "__main__":
  _ROOT = pathlib.Path(__file__).parents[2]
  sys.path[:0] = [str(_ROOT), str(_ROOT / "tests" / "model")]

import jax
import jax.numpy as jnp
import tiny
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from rl.config import LoopConfig, ObjectiveConfig, RewardConfig, RLConfig, SamplingConfig
from rl.loop import train
from tests.train import small as train_small
from train.config import MeshConfig
from train.run_folder import RunFolder
from train.tokenizer import EOS, Tokenizer

CORRECT, INCORRECT = "<answer>1</answer>", "<answer>2</answer>"
OPTIMIZER = train_small.OPTIMIZER
SAMPLING = SamplingConfig(
    num_prompts=4, num_generations=4, max_prompt_length=10, max_completion_length=3, slots=5)
REWARDS = RewardConfig(format=0, overlong_tokens=3)
LOOP = LoopConfig(steps=4, eval_problems=2, eval_samples=3, checkpoint_every=0)
# A run to be interrupted: it is too long to end before that.
RUN = {"steps": 40, "checkpoint_every": 7, "eval_every": 25}


@functools.cache
def tokenizer() -> Tokenizer:
  """Returns a tokenizer with a token for each byte, each of the two answers, and the end."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  plain = tokenizers.Tokenizer(
      models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
  plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  plain.decoder = decoders.ByteLevel()
  plain.add_special_tokens([EOS, CORRECT, INCORRECT])
  return Tokenizer(plain.to_str())


MODEL = dataclasses.replace(
    train_small.DENSE, mtp=None, vocab_size=tokenizer().vocab_size, max_seq_len=32)


@functools.cache
def variables() -> dict:
  """Returns random variables, except for a hidden value that favours three tokens.

  The value is always large; the tokens are the two answers and the end.
  """
  values = jax.tree.map(jnp.copy, tiny.variables(MODEL))
  eos = tokenizer().eos
  table = values["params"]["embedding"]
  table["embedding"] = table["embedding"].at[:, 0].set(2.0)
  table["head"] = table["head"].at[0, eos:eos + 3].set(jnp.array([3.2, 3.0, 3.0]))
  return values


def write_task(folder: pathlib.Path, bad: int = 0) -> str:
  """Writes 60 questions with the answer 1, and `bad` ones with an answer that cannot be parsed.

  Returns:
    The spec of the task.
  """
  rows = [f'{{"question": "{i}", "answer": 1}}' for i in range(60)]
  rows += [f'{{"question": "{i}?", "answer": "who knows"}}' for i in range(bad)]
  path = folder / "task.jsonl"
  path.write_text("\n".join(rows) + "\n")
  return f"file:{path}"


def config(task: str, *, optimizer: dict | None = None, sampling: dict | None = None,
           rewards: dict | None = None, objective: dict | None = None,
           loop: dict | None = None, mesh: dict | None = None) -> RLConfig:
  """Returns the config of a small run, with these fields of its sections replaced."""
  changed = lambda base, fields: dataclasses.replace(base, **(fields or {}))
  return RLConfig(
      task=task, template="short", optimizer=changed(OPTIMIZER, optimizer),
      sampling=changed(SAMPLING, sampling), rewards=changed(REWARDS, rewards),
      objective=ObjectiveConfig(**{"minibatches": 2} | (objective or {})),
      loop=changed(LOOP, loop), mesh=MeshConfig(**(mesh or {})))


def run(cfg: RLConfig, path: pathlib.Path, **kwargs):
  """Runs `rl.loop.train` from `variables` in the run folder at `path`."""
  folder = RunFolder(path)
  try:
    return train(cfg, MODEL, variables(), tokenizer(), folder, show=False, **kwargs)
  finally:
    folder.close()


if __name__ == "__main__":
  print(run(config(sys.argv[1], loop=RUN), pathlib.Path(sys.argv[2])).status)
