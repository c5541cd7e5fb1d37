"""Check that a model's logits agree between its implementations: cached, absorbed, dense experts.

Without a checkpoint, the model is `nano` with random weights, and a round trip through a Hugging
Face folder is checked too. This takes under a minute on two CPU cores.
"""

import dataclasses
import functools
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments import settings
from experiments.options import Options
from rl.loading import load_model

_PROMPT_TOKENS, _NEW_TOKENS = 12, 12


@dataclasses.dataclass(frozen=True)
class CheckConfig:
  """The model that is checked.

  Attributes:
    checkpoint: a run folder or a Hugging Face folder; None for `nano` with random weights.
  """

  checkpoint: str | None = None


CONFIG = CheckConfig()


def main(options: Options) -> None:
  options.require_supported("scale", "out", "seeds", "a", "b", "arms", "profile", "max_minutes")
  checkpoint = settings.apply(CONFIG, options.settings).checkpoint
  if checkpoint is None:
    print(_describe("deepseek_v3", model.get_config("deepseek_v3")))
    cfg, variables = _round_trip(model.get_config("nano"))
  else:
    started = time.perf_counter()
    start = load_model(checkpoint)
    cfg, variables = start.cfg, start.variables
    print(f"loaded {checkpoint} in {time.perf_counter() - started:.1f} s")
  print(_describe(checkpoint or "nano", cfg))
  _check_count(cfg, variables)
  _check_forms(cfg, variables)
  _check_generation(cfg, variables)


def _describe(name: str, cfg: model.ModelConfig) -> str:
  return (f"{name}: {cfg.param_count():,} parameters, {cfg.active_param_count():,} active, "
          f"{cfg.mtp_param_count():,} for MTP; {cfg.kv_cache_elements_per_token():,} cache "
          f"elements per token; {cfg.flops_per_token(4096) / 1e9:,.3f} GFLOP per training token at "
          "a context of 4096")


def _round_trip(cfg: model.ModelConfig) -> tuple[model.ModelConfig, dict]:
  """Initialises a model, writes it as a Hugging Face folder, reads it back, and checks its logits.

  Returns:
    The config and the variables that were read.
  """
  variables = model.init(cfg, jax.random.key(0))
  with tempfile.TemporaryDirectory() as folder:
    model.hf.save(folder, cfg, variables)
    loaded_cfg, loaded = model.hf.load(folder)
  before, after = (_forward(cfg)(v, _prompt(cfg)).logits_BTV for v in (variables, loaded))
  _report("logits after writing and reading a Hugging Face folder", before, after, 0.0)
  return loaded_cfg, loaded


def _forward(cfg: model.ModelConfig, **fields):
  return _jitted(dataclasses.replace(cfg, mtp=None), **fields)


@functools.cache
def _jitted(cfg: model.ModelConfig, **fields):
  return jax.jit(model.Transformer(cfg, **fields).apply)


def _prompt(cfg: model.ModelConfig) -> jax.Array:
  return jax.random.randint(jax.random.key(1), (2, _PROMPT_TOKENS), 0, cfg.vocab_size)


def _report(what: str, ours: jax.Array, reference: jax.Array, tolerance: float) -> None:
  """Prints the relative difference of two arrays.

  Raises:
    ValueError: if the difference exceeds `tolerance`, or is NaN.
  """
  ours, reference = np.asarray(ours, np.float32), np.asarray(reference, np.float32)
  difference = float(np.abs(ours - reference).max() / np.abs(reference).max())
  if not difference <= tolerance:
    raise ValueError(f"{what}: relative difference {difference:.1e}, tolerance {tolerance:.0e}")
  print(f"ok  {what}: relative difference {difference:.1e}")


def _check_count(cfg: model.ModelConfig, variables: dict) -> None:
  count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
  if count != cfg.param_count(mtp=True):
    raise ValueError(
        f"{count:,} parameters, but the config computes {cfg.param_count(mtp=True):,}")
  print(f"ok  {count:,} parameters, as the config computes without building the model")


def _check_forms(cfg: model.ModelConfig, variables: dict) -> None:
  """Checks that all implementations of the model agree, and that no token is dropped.

  The logits of a whole sequence are compared with those of decoding token by token, with expanded
  and with absorbed MLA, and with those of computing every expert for every token.
  """
  tokens_BT = _prompt(cfg)
  plain = _forward(cfg)(variables, tokens_BT)
  if not bool(jnp.isfinite(plain.logits_BTV).all()):
    raise ValueError("some logits are not finite")
  # bfloat16 has 8 significant bits, so results that are rounded in another order differ by a few
  # per cent.
  tolerance = 1e-4 if cfg.numerics.compute == "float32" else 0.05
  latent = isinstance(cfg.attention, model.MLAConfig)
  for form in ("expanded", "absorbed") if latent else (None,):
    step = _forward(cfg, mla_form=form)
    cache, rows = model.init_cache(cfg, len(tokens_BT), _PROMPT_TOKENS), []
    for t in range(_PROMPT_TOKENS):
      output = step(variables, tokens_BT[:, t:t + 1], cache=cache)
      cache = output.cache
      rows.append(output.logits_BTV)
    _report(f"logits one token at a time, {form or 'cached'}", jnp.concatenate(rows, 1),
            plain.logits_BTV, tolerance)
  if cfg.moe:
    dense = _forward(cfg, experts="dense")(variables, tokens_BT)
    _report("logits with every expert computed for every token", plain.logits_BTV,
            dense.logits_BTV, tolerance)
    loads = np.asarray(plain.expert_load_LE).sum(1)
    expected = tokens_BT.size * cfg.moe.experts_per_token
    if (loads != expected).any():
      raise ValueError(f"MoE layers received {loads.tolist()} assignments, not {expected} each")
    print(f"ok  no token dropped: {expected} assignments in every MoE layer")


def _check_generation(cfg: model.ModelConfig, variables: dict) -> None:
  tokens_BT = _prompt(cfg)
  started = time.perf_counter()
  generated = model.generate(
      model.Transformer(cfg), variables, tokens_BT, jnp.full(len(tokens_BT), _PROMPT_TOKENS),
      max_new_tokens=_NEW_TOKENS, temperature=0)
  tokens = np.asarray(generated.tokens_BN[0]).tolist()
  print(f"ok  greedy continuation {tokens} in {time.perf_counter() - started:.1f} s")
