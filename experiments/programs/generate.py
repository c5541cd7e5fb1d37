"""Prints text from a checkpoint of ours or a Hugging Face folder, token by token."""

import codecs
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments import settings
from experiments.options import Options
from rl.loading import load_model
from train.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
  """What to read and how to go on.

  Attributes:
    checkpoint: a folder that pretrain or r1_zero wrote, or a Hugging Face folder.
    prompt: what the text begins with.
    max_new_tokens: where it ends, if no end-of-document token does.
    temperature: 0 for the likeliest token.
    top_p: nucleus mass.
    seed: of the sampling.
    tokenizer: a tokenizer.json, where the folder has none.
  """

  checkpoint: str = ""
  prompt: str = "In the beginning"
  max_new_tokens: int = 200
  temperature: float = 0.8
  top_p: float = 0.95
  seed: int = 0
  tokenizer: str | None = None

  def __post_init__(self):
    if self.max_new_tokens < 1:
      raise ValueError(f"max_new_tokens={self.max_new_tokens} must be positive")
    require_sampling(self.temperature, self.top_p)


def require_sampling(temperature: float, top_p: float) -> None:
  """Raises ValueError unless one can sample with these."""
  if temperature < 0 or not 0 < top_p <= 1:
    raise ValueError(f"temperature={temperature} must not be negative, and top_p={top_p} must lie "
                     "in (0, 1]")


CONFIG = GenerateConfig()


def main(options: Options) -> None:
  options.require_supported("scale", "out", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  if not cfg.checkpoint:
    raise ValueError("say what to read: --set checkpoint=DIR")
  start = load_model(cfg.checkpoint)
  tokenizer = start.tokenizer(cfg.tokenizer)
  print(cfg.prompt, end="", flush=True)
  write_continuation(start.cfg, start.variables, tokenizer, cfg.prompt,
                     max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                     top_p=cfg.top_p, seed=cfg.seed)
  print()


def write_continuation(
    cfg: model.ModelConfig, variables: dict, tokenizer: Tokenizer, prompt: str, *,
    max_new_tokens: int, temperature: float, top_p: float = 1.0, seed: int = 0) -> str:
  """Prints a continuation as it is sampled, and returns it."""
  prompt_T = tokenizer.encode(prompt)
  if not len(prompt_T):
    prompt_T = np.array([tokenizer.eos], np.int32)
  network = model.Transformer(dataclasses.replace(cfg, mtp=None))
  decoder, text = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
  for token in model.stream(
      network, variables, jnp.asarray(prompt_T), max_new_tokens=max_new_tokens,
      key=jax.random.key(seed), temperature=temperature, top_p=top_p, stop_token=tokenizer.eos):
    # A character may be spread over several tokens: the decoder waits for its last byte.
    piece = "" if token == tokenizer.eos else decoder.decode(tokenizer.decode_bytes([token]))
    text += piece
    print(piece, end="", flush=True)
  return text
