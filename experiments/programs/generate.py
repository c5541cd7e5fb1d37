"""Generate text with a model of a run folder or a Hugging Face folder, printed token by token."""

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
  """The model, the prompt, and how the continuation is sampled.

  Attributes:
    checkpoint: the model: a folder that pretrain or r1_zero wrote, or a Hugging Face folder.
    prompt: the beginning of the text.
    max_new_tokens: largest number of sampled tokens, unless an end-of-document token comes first.
    temperature: sampling temperature; 0 for greedy decoding.
    top_p: probability mass of nucleus sampling, in (0, 1].
    seed: seed of the sampling.
    tokenizer: path of a tokenizer.json, for folders without one.
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
  """Raises ValueError unless temperature and top-p are valid for sampling."""
  if temperature < 0 or not 0 < top_p <= 1:
    raise ValueError(f"temperature={temperature} must not be negative, and top_p={top_p} must lie "
                     "in (0, 1]")


CONFIG = GenerateConfig()


def main(options: Options) -> None:
  options.require_supported("scale", "out", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  if not cfg.checkpoint:
    raise ValueError("no model to sample from: give its folder, --set checkpoint=DIR")
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
  """Prints a continuation of a prompt as it is sampled, and returns it.

  Args:
    cfg: the architecture.
    variables: the model's variables.
    tokenizer: the model's tokenizer.
    prompt: the text to continue; if it is empty, the end-of-document token is continued.
    max_new_tokens: largest number of sampled tokens.
    temperature: sampling temperature; 0 for greedy decoding.
    top_p: probability mass of nucleus sampling, in (0, 1].
    seed: seed of the sampling.
  """
  prompt_T = tokenizer.encode(prompt)
  if not len(prompt_T):
    prompt_T = np.array([tokenizer.eos], np.int32)
  network = model.Transformer(dataclasses.replace(cfg, mtp=None))
  decoder, text = codecs.getincrementaldecoder("utf-8")(errors="replace"), ""
  for token in model.stream(
      network, variables, jnp.asarray(prompt_T), max_new_tokens=max_new_tokens,
      key=jax.random.key(seed), temperature=temperature, top_p=top_p, stop_token=tokenizer.eos):
    # The bytes of a character may be divided between tokens: the decoder waits for the last one.
    piece = "" if token == tokenizer.eos else decoder.decode(tokenizer.decode_bytes([token]))
    text += piece
    print(piece, end="", flush=True)
  return text
