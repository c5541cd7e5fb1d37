"""A model that answers in ChatML, with a tokenizer of bytes, as a Hugging Face folder."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import tokenizers
from tokenizers import processors

import model
from train.tokenizer import Tokenizer

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def chat_tokenizer() -> Tokenizer:
  """Returns a tokenizer of bytes and ChatML's marks, which begins prompts with one of them."""
  plain = tokenizers.Tokenizer.from_str(Tokenizer.bytes()._json)
  plain.add_special_tokens(MARKS)
  plain.post_processor = processors.TemplateProcessing(
      single="<|im_start|> $A", special_tokens=[("<|im_start|>", 261)])
  return Tokenizer(plain.to_str())


TOKENIZER = chat_tokenizer()
START, END = (TOKENIZER._tokenizer.token_to_id(name) for name in MARKS[1:])
CFG = model.ModelConfig(
    vocab_size=TOKENIZER.vocab_size, d_model=24, num_layers=2, ffn_dim=22, max_seq_len=512,
    attention=model.GQAConfig(num_heads=3, num_kv_heads=1, head_dim=8),
    rope=model.RopeConfig(100.0, "half"))


@functools.cache
def variables() -> dict:
  """Returns variables with which the model writes "abcabc...", whatever it is given."""
  values = jax.tree.map(jnp.zeros_like, tiny.variables(CFG))
  values["params"]["norm"]["scale"] = jnp.ones(24)
  table = np.zeros((CFG.vocab_size, 24), np.float32)
  head = np.zeros((24, CFG.vocab_size), np.float32)
  table[:, 3] = 1
  for i, (now, then) in enumerate(zip("abc", "bca", strict=True)):
    table[ord(now)] = 0
    table[ord(now), i] = 1
    head[i, ord(then)] = 1
  head[3, ord("a")] = 1
  values["params"]["embedding"] = {"embedding": jnp.asarray(table), "head": jnp.asarray(head)}
  return values


def write(folder: pathlib.Path) -> pathlib.Path:
  """Writes the model, its tokenizer and its chat template to a folder, and returns that."""
  model.hf.save(folder, CFG, variables())
  TOKENIZER.save(folder / "tokenizer.json")
  (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
  return folder
