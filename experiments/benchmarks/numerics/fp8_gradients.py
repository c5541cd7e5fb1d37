"""Measure what quantising activation gradients in blocks costs, with and without outlier tokens.

DeepSeek-V3 saw a 16 B model diverge, after about 300 B tokens, when gradients of activations had
one scale for 128 x 128 of them instead of 1 x 128, and suspects outliers that belong to tokens
(arXiv:2412.19437, appendix B.2). Divergence is out of reach here; the errors behind it are not. The
first part multiplies random gradients in which a few tokens are larger; the second takes gradients
of a small trained language model, with a few tokens' losses weighted more, and compares them with
those in float32 by the kind of layer. Experts are those that float32 chose, so that no error is one
of routing.

Shape letters:  M tokens  K, N widths of a layer  B sequences  T tokens of each  L layers
                K experts per token (after T)
"""

import collections
import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments import settings
from experiments.options import Options
from experiments.reports import plots, results
from experiments.reports.markdown import figure, number
from experiments.reports.summary import backend, bench_summary, claim
from experiments.studies.v3 import fp8
from model.checks import require, require_positive
from pallas_kernels import Recipe, dequantize, quantize
from pallas_kernels.ops.fp8_linear import SMALLEST_GRADIENT_AMAX
from pallas_kernels.quantized import error
from pallas_kernels.recipe import InputGradient, Operand, WeightGradient
from train.config import OptimizerConfig, RunConfig
from train.config_io import to_dict
from train.data import load
from train.loading import load_model
from train.stages import train_on_text


def _run() -> RunConfig:
  """The FP8 study's small model, half-way through its training."""
  run = fp8.STUDY.scales["cpu"].config
  return dataclasses.replace(run, optimizer=OptimizerConfig(learning_rate=8e-4),
                             train=dataclasses.replace(run.train, steps=100))


@dataclasses.dataclass(frozen=True)
class GradientsConfig:
  """What is measured.

  Attributes:
    outlier_factors: by which the gradients of outlier tokens are larger, in the first part.
    tokens, width: of the random gradients; the layer is square.
    outlier_fraction: of tokens, drawn at random, in both parts.
    outlier_weight: of an outlier token's loss, in the second part.
    sequences: whose gradient is taken.
    run: how the small model is trained.
    seed: of everything random but the training.
  """

  outlier_factors: tuple[float, ...] = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
  tokens: int = 512
  width: int = 256
  outlier_fraction: float = 1 / 128
  outlier_weight: float = 100.0
  sequences: int = 4
  run: RunConfig = dataclasses.field(default_factory=_run)
  seed: int = 0

  def __post_init__(self):
    require_positive(self, "tokens", "width", "outlier_fraction", "outlier_weight", "sequences")
    require(self.outlier_factors and min(self.outlier_factors) >= 1,
            f"outlier_factors={self.outlier_factors} must be at least 1, and one at least")
    require(1 <= self.outlier_fraction * self.tokens <= self.tokens - 1,
            f"outlier_fraction={self.outlier_fraction} of tokens={self.tokens} must leave at "
            "least one outlier token and one ordinary one")


GRADIENTS = {
    "1x128": Operand(), "128x128": Operand(tile="128x128"),
    "whole matrix": Operand(tile="tensor"), "1x128, E5M2": Operand(format="e5m2")}
_KINDS = {"attention": "attention", "ffn/shared": "shared expert", "dense_layers/ffn": "dense FFN",
          "moe_layers/ffn/w": "routed experts", "router": "gate", "embedding": "embedding, head"}


CONFIG = GradientsConfig()


def main(options: Options) -> None:
  options.require_supported("scale", "seeds", "a", "b", "arms", "profile", "max_minutes")
  cfg = settings.apply(CONFIG, options.settings)
  random = [row for factor in cfg.outlier_factors for row in random_errors(cfg, factor)]
  trained = trained_errors(cfg)
  print("\n".join(verdicts(random, trained)))
  if options.out:
    result = {"config": to_dict(cfg), "random": random, "trained": trained}
    print(f"report: {results.record(options.out, result, summary, _sections)}")


# Random gradients.


def random_errors(cfg: GradientsConfig, factor: float) -> list[dict]:
  """Errors of both backward products against float64, a row for each way and product.

  "ordinary" is over the tokens that are no outliers: their rows of the input's gradient, and what
  they add to the weight's.
  """
  rng = np.random.default_rng(cfg.seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  x_MK, w_KN, dy_MN = draw(cfg.tokens, cfg.width), draw(cfg.width, cfg.width), draw(
      cfg.tokens, cfg.width)
  outlier_M = _outliers(cfg, cfg.tokens)
  dy_MN[outlier_M] *= factor
  exact = lambda x: np.asarray(x, np.float64)
  w, x = exact(_quantised(w_KN, Operand(tile="128x128"))), exact(_quantised(x_MK.T, Operand()))
  rows = []
  for way, operand in GRADIENTS.items():
    dx = exact(_quantised(dy_MN, operand)) @ w.T, exact(dy_MN) @ exact(w_KN).T
    dy = exact(_quantised(dy_MN.T, operand)).T
    dw = lambda of: (x[:, of] @ dy[of], exact(x_MK)[of].T @ exact(dy_MN)[of])  # noqa: B023
    for product, every, ordinary in (
        ("input gradient", dx, [side[~outlier_M] for side in dx]),
        ("weight gradient", dw(outlier_M | ~outlier_M), dw(~outlier_M))):
      rows.append({"factor": factor, "way": way, "product": product,
                   "all": error(*every), "ordinary": error(*ordinary)})
  return rows


def _outliers(cfg: GradientsConfig, count: int) -> np.ndarray:
  """Which tokens are outliers: bool [count]."""
  outliers = np.zeros(count, bool)
  outliers[:max(1, round(cfg.outlier_fraction * count))] = True
  return np.random.default_rng(cfg.seed + 1).permutation(outliers)


def _quantised(x: np.ndarray, operand: Operand) -> np.ndarray:
  return np.asarray(dequantize(quantize(
      jnp.asarray(x), operand.tile, format=operand.format, smallest_amax=SMALLEST_GRADIENT_AMAX)))


# Gradients of a trained model.


def trained_errors(cfg: GradientsConfig) -> list[dict]:
  """Relative errors of a trained model's gradient, a row for each way, weight and kind of layer."""
  net, params, tokens_BT = _trained(cfg)
  reference = dataclasses.replace(net, numerics=model.NUMERICS["fp32"])
  chosen = _chosen_experts(reference, params, tokens_BT)
  outlier_BT = _outliers(cfg, tokens_BT[:, 1:].size).reshape(tokens_BT[:, 1:].shape)
  numerics = {"bfloat16": model.NUMERICS["bf16"]} | {
      way: dataclasses.replace(model.NUMERICS["fp8"], recipe=recipe_of(operand))
      for way, operand in GRADIENTS.items()}
  rows = []
  for weight in (1.0, cfg.outlier_weight):
    weights_BT = jnp.where(outlier_BT, weight, 1.0)
    gradient = functools.partial(_by_kind, params, tokens_BT, weights_BT, chosen)
    exact = gradient(reference)
    for way, of_way in numerics.items():
      ours = gradient(dataclasses.replace(net, numerics=of_way))
      rows += [{"weight": weight, "way": way, "kind": kind, "error": error(ours[kind], exact[kind])}
               for kind in exact]
  return rows


def recipe_of(gradient: Operand) -> Recipe:
  """V3's recipe with another operand for gradients of activations, in both backward products."""
  return Recipe(input_gradient=InputGradient(gradient), weight_gradient=WeightGradient(
      gradient=gradient))


def _trained(cfg: GradientsConfig) -> tuple[model.ModelConfig, dict, np.ndarray]:
  """A model after training, its variables, and sequences that it has not seen."""
  with tempfile.TemporaryDirectory() as path:
    trained = load_model(train_on_text(cfg.run, None, out=path))
  rows = next(iter(load(cfg.run.data).batches(
      [cfg.run.train.seed], cfg.run.train.steps * cfg.run.train.batch_size, [cfg.sequences])))
  return trained.cfg, trained.variables, rows["tokens"]


def _chosen_experts(net: model.ModelConfig, variables: dict, tokens_BT) -> jax.Array | None:
  output = model.Transformer(net).apply(variables, tokens_BT[:, :-1], logits=False)
  return output.router["moe_layers"].experts_BTK if net.moe else None


@functools.partial(jax.jit, static_argnames="net")
def _gradient(variables, tokens_BT, weights_BT, experts_LBTK, net: model.ModelConfig):
  """Of the weighted mean of the tokens' losses."""
  transformer = model.Transformer(net)

  def loss(params):
    of = {**variables, "params": params}
    output = transformer.apply(
        of, tokens_BT[:, :-1], logits=False, mtp=False, experts_LBTK=experts_LBTK)
    logp_BT = transformer.apply(
        of, output.hidden_BTD, tokens_BT[:, 1:], method="token_logprobs")
    return -(weights_BT * logp_BT).sum() / weights_BT.sum()

  return jax.grad(loss)(variables["params"])


def _by_kind(variables, tokens_BT, weights_BT, chosen, net: model.ModelConfig) -> dict:
  """The matrices' gradients by the kind of layer, as one vector each."""
  grads = _gradient(variables, tokens_BT, weights_BT, chosen, net=net)
  found = collections.defaultdict(list)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    kind = next((kind for part, kind in _KINDS.items() if part in name), None)
    if kind and not name.endswith("scale"):
      found[kind].append(np.ravel(grad))
  return {kind: np.concatenate(found[kind]) for kind in _KINDS.values() if kind in found}


# What follows.


def verdicts(random: list[dict], trained: list[dict]) -> list[str]:
  """Sentences that the numbers bear out."""
  factors = list(dict.fromkeys(row["factor"] for row in random))
  lines = []
  for product in dict.fromkeys(row["product"] for row in random):
    by_factor = _by_factor(random, product, "ordinary")
    ratios = [of["128x128"] / of["1x128"] for of in by_factor]
    each = ", ".join(f"{number(ratio, 3)} at {factor:g}"
                     for factor, ratio in zip(factors, ratios, strict=True))
    larger = [f"{factor:g}" for factor, ratio in zip(factors, ratios, strict=True) if ratio > 1.1]
    lines.append(
        f"Random gradients, {product}, ordinary tokens: errors of 128x128 over those of "
        f"1x128, by the factor of outlier tokens: {each}; by more than a tenth "
        + (f"from {larger[0]} on: below, the exponents of E4M3 itself are enough." if larger else
           "nowhere: the exponents of E4M3 itself are enough."))
  for weight in dict.fromkeys(row["weight"] for row in trained):
    of = {(row["kind"], row["way"]): row["error"] for row in trained if row["weight"] == weight}
    kinds = dict.fromkeys(kind for kind, _ in of)
    against = lambda way: ", ".join(
        f"{kind} {number(of[kind, way] / of[kind, '1x128'], 3)}" for kind in kinds)  # noqa: B023
    lines.append(f"Trained model, weight of outlier tokens {weight:g}: 128x128 over 1x128: "
                 f"{against('128x128')}; E5M2 over E4M3: {against('1x128, E5M2')}.")
  return lines


def _by_factor(rows: list[dict], product: str, over: str) -> list[dict[str, float]]:
  found = collections.defaultdict(dict)
  for row in rows:
    if row["product"] == product:
      found[row["factor"]][row["way"]] = row[over]
  return list(found.values())


def summary(result: dict) -> dict:
  """The summary of what results.json holds."""
  random, trained = result["random"], result["trained"]
  factors = list(dict.fromkeys(row["factor"] for row in random))
  cells = [(product, over, _by_factor(random, product, over))
           for product in ("input gradient", "weight gradient") for over in ("ordinary", "all")]
  size = f"{result['config']['tokens']} tokens of width {result['config']['width']}"
  claims = [
      claim(f"random gradients, outliers {factor:g} times as large: {product} of ordinary tokens, "
            "128x128 over 1x128", "ratio of errors", of["128x128"] / of["1x128"], n=size)
      for product, over, by_factor in cells if over == "ordinary"
      for factor, of in zip(factors, by_factor, strict=True)]
  kinds = list(dict.fromkeys(row["kind"] for row in trained))
  by_way = collections.defaultdict(dict)
  for row in trained:
    by_way[row["weight"], row["way"]][row["kind"]] = row["error"]
  ways = list(dict.fromkeys(row["way"] for row in random))
  return bench_summary(
      "fp8_gradients", backend(result),
      "Errors of backward products by how gradients of activations are quantised: in 1x128 tiles, "
      "in 128x128 blocks, with one scale, and in E5M2.", result, claims=claims, tables=[
          {"name": "random", "caption": "Random gradients: relative Frobenius norm of the error",
           "header": ["product", "tokens", "factor of outliers", *ways],
           "rows": [[product, over, f"{factor:g}", *(_percent(of[way]) for way in ways)]
                    for product, over, by_factor in cells
                    for factor, of in zip(factors, by_factor, strict=True)]},
          {"name": "trained", "caption": "A trained model's gradients against float32's",
           "header": ["weight of outlier tokens", "gradients", *kinds],
           "rows": [[f"{weight:g}", way, *(_percent(of[kind]) for kind in kinds)]
                    for (weight, way), of in by_way.items()]}])


def _percent(value: float) -> str:
  return f"{100 * value:.2f} %"


def _sections(folder: pathlib.Path, result: dict) -> list[tuple[str, str]]:
  random = result["random"]
  factors = list(dict.fromkeys(row["factor"] for row in random))
  panels = {f"{product}: {over} tokens": {
      way: (factors, [of[way] for of in _by_factor(random, product, over)]) for way in GRADIENTS}
            for product in ("input gradient", "weight gradient") for over in ("ordinary", "all")}
  draw = functools.partial(plots.panels, doublings="factor of outlier tokens", logarithmic=True)
  return [
      ("What it shows", "\n".join(f"- {line}" for line in verdicts(random, result["trained"]))),
      ("", figure(folder, "errors", "Errors of the input's and weight's gradient", draw, panels))]
