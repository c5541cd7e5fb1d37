"""Generate text with a model of a run folder or a Hugging Face folder, or chat with it."""

import codecs
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments import settings
from experiments.options import Options
from experiments.programs.chatting import NOT_A_NUMBER, Chat
from rl.effort import Effort, end_of
from rl.loading import load_model
from train.chat import PromptFormat, stop_tokens
from train.hardware import memory_bytes
from train.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
  """The model, the prompt, and how the continuation is sampled.

  Attributes:
    checkpoint: the model: a folder that pretrain or r1_zero wrote, or a Hugging Face folder.
    prompt: the beginning of the text, or with `chat` the user's message. None starts a conversation
      in the terminal with a model that has a chat template, or that was fine-tuned or trained by RL
      with a prompt template; any other model continues "In the beginning".
    chat: whether the model is to answer the prompt. The prompt is then rendered by the chat
      template of the Hugging Face folder. Without a prompt there is a conversation.
    system: in a chat, the system's message; empty for none, or for the template's own.
    effort: in a chat, the number of tokens of thought after which its end is forced, so that the
      model answers; None for no limit.
    least_effort: in a chat, the number of tokens of thought before which its end is replaced by
      "Wait", so that the model thinks on.
    votes: in a chat, the number of replies that are sampled; one is shown whose answer most of them
      give.
    stop: strings before which the text ends.
    max_new_tokens: largest number of sampled tokens, unless a token that ends the text comes first:
      one that the Hugging Face folder names as `eos_token_id`, with `chat` also the one that the
      chat template writes after an answer, or else the tokenizer's end-of-document token.
    temperature: sampling temperature; 0 for greedy decoding.
    top_p: probability mass of nucleus sampling, in (0, 1].
    top_k: number of most likely tokens of which one is sampled; 0 for all.
    min_p: smallest probability of a token that may be sampled, relative to that of the most likely
      one, in [0, 1].
    seed: seed of the sampling.
    drafts: tokens that the model's MTP modules draft at a time, which are kept where they are what
      would have been sampled: the text is the same, and takes fewer passes. At most the number of
      modules, or any number for a model with one; 0 for none.
    cache_dtype: format of the cache of keys and values, or of MLA's latents; None for the format
      that the model computes in.
    tokenizer: path of a tokenizer.json, for folders without one.
  """

  checkpoint: str = ""
  prompt: str | None = None
  chat: bool = False
  system: str = ""
  effort: int | None = None
  least_effort: int = 0
  votes: int = 1
  stop: tuple[str, ...] = ()
  max_new_tokens: int = 200
  temperature: float = 0.8
  top_p: float = 0.95
  top_k: int = 0
  min_p: float = 0.0
  seed: int = 0
  drafts: int = 0
  cache_dtype: Literal["float32", "bfloat16", "float8_e4m3fn", "float8_e5m2"] | None = None
  tokenizer: str | None = None

  def __post_init__(self):
    for name in ("drafts", "top_k"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)} must not be negative")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"min_p={self.min_p} must lie in [0, 1]")
    if self.max_new_tokens < 1:
      raise ValueError(f"max_new_tokens={self.max_new_tokens} must be positive")
    Effort(self.least_effort, self.effort)
    if self.votes < 1 or (self.votes > 1 and self.temperature == 0):
      raise ValueError(f"votes={self.votes} must be at least 1, and more than 1 need a temperature "
                       "above 0, as all replies would be the same")
    if self.prompt is not None and not self.chat:
      self.require_no_chat("add --set chat=true, or leave the prompt out")
    if "" in self.stop:
      raise ValueError(f"stop={self.stop} has an empty string, before which every text would end")
    if not 0 <= self.seed < 2**31:
      raise ValueError(f"seed={self.seed} must lie in 0..2^31 - 1")
    require_sampling(self.temperature, self.top_p)

  def require_no_chat(self, advice: str) -> None:
    """Raises ValueError if a setting is not the default that has a meaning in a chat only."""
    for name, default in (("system", ""), ("effort", None), ("least_effort", 0), ("votes", 1)):
      if getattr(self, name) != default:
        raise ValueError(f"{name}={getattr(self, name)!r} needs a chat: {advice}")


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
  tokenizer, form = start.tokenizer(cfg.tokenizer), start.prompt_format()
  _require_cache_fits(start.cfg, cfg.max_new_tokens, cfg.cache_dtype)
  chat = Chat.of(cfg, start, tokenizer, form)
  if chat is not None:
    chat.run()
    return
  cfg.require_no_chat(f"{cfg.checkpoint} has no chat template, so leave it out")
  # The models of run folders were trained on text that begins with no special token.
  encode = tokenizer.encode if _is_run(cfg.checkpoint) else tokenizer.encode_prompt
  prompt = "In the beginning" if cfg.prompt is None else cfg.prompt
  if form.chat_template:
    print(f"{cfg.checkpoint} has a chat template: add --set chat=true for an answer instead of a "
          "continuation", file=sys.stderr)
  print(prompt, end="", flush=True)
  write_continuation(start.cfg, start.variables, tokenizer, encode(prompt),
                     max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                     top_p=cfg.top_p, top_k=cfg.top_k, min_p=cfg.min_p, seed=cfg.seed,
                     stop=cfg.stop, drafts=cfg.drafts, cache_dtype=cfg.cache_dtype,
                     stop_tokens=_stop_tokens(cfg, form, tokenizer))
  print()


def _require_cache_fits(cfg: model.ModelConfig, num_tokens: int, dtype: str | None) -> None:
  """Raises ValueError if the cache of so many tokens is larger than the devices' memory."""
  needed = cfg.kv_cache_elements_per_token() * num_tokens * jnp.dtype(
      dtype or cfg.numerics.compute_dtype).itemsize
  available = memory_bytes()
  if num_tokens >= 2**31 or (available is not None and needed > available):
    raise ValueError(f"max_new_tokens={num_tokens} needs a cache of {needed / 1e9:,.0f} GB, more "
                     f"than there is memory; the model's context is {cfg.max_seq_len} tokens")


def _is_run(checkpoint: str) -> bool:
  return (pathlib.Path(checkpoint) / "checkpoints").is_dir()


def _stop_tokens(cfg: GenerateConfig, form: PromptFormat, tokenizer: Tokenizer) -> tuple[int, ...]:
  """Returns the tokens that end a text: in a run folder, that of its training documents, too."""
  return stop_tokens(tokenizer, form) if _is_run(cfg.checkpoint) else form.stop_tokens


def write_continuation(
    cfg: model.ModelConfig, variables: dict, tokenizer: Tokenizer, prompt: str | np.ndarray, *,
    max_new_tokens: int, temperature: float, top_p: float = 1.0, seed: int = 0,
    stop_tokens: Sequence[int] = (), stop: Sequence[str] = (), drafts: int = 0, top_k: int = 0,
    min_p: float = 0.0, cache_dtype: str | None = None) -> str:
  """Prints a continuation of a prompt as it is sampled, and returns it.

  Args:
    cfg: the architecture.
    variables: the model's variables.
    tokenizer: the model's tokenizer.
    prompt: the text to continue, or its token ids; if it is empty, the end-of-document token is
      continued.
    max_new_tokens: largest number of sampled tokens.
    temperature: sampling temperature; 0 for greedy decoding.
    top_p: probability mass of nucleus sampling, in (0, 1].
    seed: seed of the sampling.
    stop_tokens: ids of the tokens that end the text; empty for the end-of-document token. They are
      not a part of the text.
    stop: strings before which the text ends.
    drafts: tokens that MTP modules draft at a time; see `model.speculate`.
    top_k, min_p, cache_dtype: see `model.generate`.
  """
  prompt_T = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
  if not len(prompt_T):
    prompt_T = np.array([tokenizer.eos], np.int32)
  stop_tokens = tuple(stop_tokens) or (tokenizer.eos,)
  network = model.Transformer(cfg if drafts else dataclasses.replace(cfg, mtp=None))
  decoder, text, shown = codecs.getincrementaldecoder("utf-8")(errors="replace"), "", 0
  tokens = model.stream(
      network, variables, jnp.asarray(prompt_T), max_new_tokens=max_new_tokens,
      key=jax.random.key(seed), temperature=temperature, top_p=top_p, stop_token=stop_tokens,
      drafts=drafts, top_k=top_k, min_p=min_p, cache_dtype=cache_dtype)
  while True:
    try:
      token = next(tokens)
    except StopIteration as end:
      if end.value == model.Status.INVALID:
        print(NOT_A_NUMBER, file=sys.stderr)
      break
    if token in stop_tokens:
      break
    # The bytes of a character may be divided between tokens: the decoder waits for the last one.
    text += decoder.decode(tokenizer.decode_bytes([token]))
    end, ended = end_of(text, shown, stop)
    print(text[shown:end], end="", flush=True)
    shown = end
    if ended:
      return text[:end]
  print(text[shown:], end="", flush=True)
  return text
