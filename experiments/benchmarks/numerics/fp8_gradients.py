"""Measure the error of activation gradients quantised in blocks, with and without outlier tokens.

DeepSeek-V3 reports that a 16 B model diverged, after about 300 B tokens, when activation gradients
had one scale per 128 x 128 values instead of 1 x 128, and suspects outliers that are correlated
with tokens (arXiv:2412.19437, appendix B.2). Training to divergence is out of reach here, but the
errors that may cause it can be measured. The first part multiplies random gradients in which a few
tokens are larger. The second part takes the gradients of a small trained language model, with a
larger weight on the losses of a few tokens, and compares them with float32 gradients by type of
layer. All models use the experts that the float32 model chose, so that no error comes from routing.

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
from experiments.options import Options, writes_results
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
  """The training run of the FP8 study's small model, stopped half-way."""
  run = fp8.STUDY.scales["cpu"].config
  return dataclasses.replace(run, optimizer=OptimizerConfig(learning_rate=8e-4),
                             train=dataclasses.replace(run.train, steps=100))


@dataclasses.dataclass(frozen=True)
class GradientsConfig:
  """What is measured.

  Attributes:
    outlier_factors: factors by which the gradients of outlier tokens are larger, in the first part.
    tokens: number of tokens in the first part.
    width: width of the square layer in the first part.
    outlier_fraction: fraction of tokens that are outliers, drawn at random, in both parts.
    outlier_weight: weight of an outlier token's loss, relative to other tokens, in the second part.
    sequences: number of sequences whose gradient is taken, in the second part.
    run: the training run of the small model.
    seed: seed of everything random except the training.
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
            f"outlier_factors={self.outlier_factors} must be one or more factors of at least 1")
    require(1 <= self.outlier_fraction * self.tokens <= self.tokens - 1,
            f"outlier_fraction={self.outlier_fraction} of tokens={self.tokens} must give at "
            "least one outlier token and one ordinary one")


GRADIENTS = {
    "1x128": Operand(), "128x128": Operand(tile="128x128"),
    "whole matrix": Operand(tile="tensor"), "1x128, E5M2": Operand(format="e5m2")}
_KINDS = {"attention": "attention", "ffn/shared": "shared expert", "dense_layers/ffn": "dense FFN",
          "moe_layers/ffn/w": "routed experts", "router": "gate", "embedding": "embedding, head"}


CONFIG = GradientsConfig()


@writes_results
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
  """Errors of both backward products against float64: one row per quantisation and product.

  "ordinary" errors are those of the tokens that are not outliers: over their rows of the input
  gradient, and over their contribution to the weight gradient.
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
  for method, operand in GRADIENTS.items():
    dx = exact(_quantised(dy_MN, operand)) @ w.T, exact(dy_MN) @ exact(w_KN).T
    dy = exact(_quantised(dy_MN.T, operand)).T
    dw = lambda mask_M: (
        x[:, mask_M] @ dy[mask_M], exact(x_MK)[mask_M].T @ exact(dy_MN)[mask_M])  # noqa: B023
    for product, every, ordinary in (
        ("input gradient", dx, [gradient[~outlier_M] for gradient in dx]),
        ("weight gradient", dw(outlier_M | ~outlier_M), dw(~outlier_M))):
      rows.append({"factor": factor, "way": method, "product": product,
                   "all": error(*every), "ordinary": error(*ordinary)})
  return rows


def _outliers(cfg: GradientsConfig, count: int) -> np.ndarray:
  """Returns which tokens are outliers, bool [count]."""
  outliers = np.zeros(count, bool)
  outliers[:max(1, round(cfg.outlier_fraction * count))] = True
  return np.random.default_rng(cfg.seed + 1).permutation(outliers)


def _quantised(x: np.ndarray, operand: Operand) -> np.ndarray:
  """Returns the values of x after quantisation, in float32."""
  return np.asarray(dequantize(quantize(
      jnp.asarray(x), operand.tile, format=operand.format, smallest_amax=SMALLEST_GRADIENT_AMAX)))


# Gradients of a trained model.


def trained_errors(cfg: GradientsConfig) -> list[dict]:
  """Relative errors of a trained model's gradient, by outlier weight, method and type of layer."""
  net, params, tokens_BT = _trained(cfg)
  reference = dataclasses.replace(net, numerics=model.NUMERICS["fp32"])
  chosen = _chosen_experts(reference, params, tokens_BT)
  outlier_BT = _outliers(cfg, tokens_BT[:, 1:].size).reshape(tokens_BT[:, 1:].shape)
  numerics = {"bfloat16": model.NUMERICS["bf16"]} | {
      method: dataclasses.replace(model.NUMERICS["fp8"], recipe=recipe_of(operand))
      for method, operand in GRADIENTS.items()}
  rows = []
  for weight in (1.0, cfg.outlier_weight):
    weights_BT = jnp.where(outlier_BT, weight, 1.0)
    gradient = functools.partial(_by_kind, params, tokens_BT, weights_BT, chosen)
    exact = gradient(reference)
    for method, policy in numerics.items():
      ours = gradient(dataclasses.replace(net, numerics=policy))
      rows += [{"weight": weight, "way": method, "kind": kind,
                "error": error(ours[kind], exact[kind])} for kind in exact]
  return rows


def recipe_of(gradient: Operand) -> Recipe:
  """Returns V3's recipe with another format of activation gradients, in both backward products."""
  return Recipe(input_gradient=InputGradient(gradient), weight_gradient=WeightGradient(
      gradient=gradient))


def _trained(cfg: GradientsConfig) -> tuple[model.ModelConfig, dict, np.ndarray]:
  """Returns a trained model's config, its variables, and sequences that it has not seen."""
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
  """Returns the gradient of the weighted mean of the tokens' losses."""
  transformer = model.Transformer(net)

  def loss(params):
    replaced = {**variables, "params": params}
    output = transformer.apply(
        replaced, tokens_BT[:, :-1], logits=False, mtp=False, experts_LBTK=experts_LBTK)
    logp_BT = transformer.apply(
        replaced, output.hidden_BTD, tokens_BT[:, 1:], method="token_logprobs")
    return -(weights_BT * logp_BT).sum() / weights_BT.sum()

  return jax.grad(loss)(variables["params"])


def _by_kind(variables, tokens_BT, weights_BT, chosen, net: model.ModelConfig) -> dict:
  """Returns the gradients of weight matrices by type of layer, each as one vector."""
  grads = _gradient(variables, tokens_BT, weights_BT, chosen, net=net)
  found = collections.defaultdict(list)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    kind = next((kind for part, kind in _KINDS.items() if part in name), None)
    if kind and not name.endswith("scale"):
      found[kind].append(np.ravel(grad))
  return {kind: np.concatenate(found[kind]) for kind in _KINDS.values() if kind in found}


# Verdicts, summary and report.


def verdicts(random: list[dict], trained: list[dict]) -> list[str]:
  """Returns sentences that state the ratios of errors in these rows."""
  factors = list(dict.fromkeys(row["factor"] for row in random))
  lines = []
  for product in dict.fromkeys(row["product"] for row in random):
    by_factor = _by_factor(random, product, "ordinary")
    ratios = [errors["128x128"] / errors["1x128"] for errors in by_factor]
    each = ", ".join(f"{number(ratio, 3)} at {factor:g}"
                     for factor, ratio in zip(factors, ratios, strict=True))
    larger = [f"{factor:g}" for factor, ratio in zip(factors, ratios, strict=True) if ratio > 1.1]
    lines.append(
        f"Random gradients, {product}, ordinary tokens: the error of 128x128 over that of 1x128, "
        f"by the factor of outlier tokens, is {each}. It is more than a tenth larger "
        + (f"from {larger[0]} on; below, the exponents of E4M3 itself suffice." if larger else
           "at no factor: the exponents of E4M3 itself suffice."))
  for weight in dict.fromkeys(row["weight"] for row in trained):
    errors = {(row["kind"], row["way"]): row["error"] for row in trained if row["weight"] == weight}
    kinds = dict.fromkeys(kind for kind, _ in errors)
    compared = lambda method: ", ".join(
        f"{kind} {number(errors[kind, method] / errors[kind, '1x128'], 3)}"  # noqa: B023
        for kind in kinds)  # noqa: B023
    lines.append(f"Trained model, losses of outlier tokens weighted {weight:g}; ratios of errors, "
                 f"128x128 over 1x128: {compared('128x128')}; E5M2 over E4M3: "
                 f"{compared('1x128, E5M2')}.")
  return lines


def _by_factor(rows: list[dict], product: str, over: str) -> list[dict[str, float]]:
  """Returns the errors of a product over some tokens: for each factor, by method."""
  found = collections.defaultdict(dict)
  for row in rows:
    if row["product"] == product:
      found[row["factor"]][row["way"]] = row[over]
  return list(found.values())


def summary(result: dict) -> dict:
  """Returns the summary of a result, as read from results.json."""
  random, trained = result["random"], result["trained"]
  factors = list(dict.fromkeys(row["factor"] for row in random))
  cells = [(product, over, _by_factor(random, product, over))
           for product in ("input gradient", "weight gradient") for over in ("ordinary", "all")]
  size = f"{result['config']['tokens']} tokens of width {result['config']['width']}"
  claims = [
      claim(f"random gradients, outliers {factor:g} times as large: {product} of ordinary tokens, "
            "128x128 over 1x128", "ratio of errors", errors["128x128"] / errors["1x128"], n=size)
      for product, over, by_factor in cells if over == "ordinary"
      for factor, errors in zip(factors, by_factor, strict=True)]
  kinds = list(dict.fromkeys(row["kind"] for row in trained))
  by_method = collections.defaultdict(dict)
  for row in trained:
    by_method[row["weight"], row["way"]][row["kind"]] = row["error"]
  methods = list(dict.fromkeys(row["way"] for row in random))
  return bench_summary(
      "fp8_gradients", backend(result),
      "Errors of the backward products by how activation gradients are quantised: in 1x128 tiles, "
      "in 128x128 blocks, with one scale, and in E5M2.", result, claims=claims, tables=[
          {"name": "random", "caption": "Random gradients: relative Frobenius norm of the error",
           "header": ["product", "tokens", "factor of outliers", *methods],
           "rows": [[product, over, f"{factor:g}", *(_percent(errors[name]) for name in methods)]
                    for product, over, by_factor in cells
                    for factor, errors in zip(factors, by_factor, strict=True)]},
          {"name": "trained", "caption": "Gradients of a trained model, relative to float32",
           "header": ["weight of outlier tokens", "gradients in", *kinds],
           "rows": [[f"{weight:g}", method, *(_percent(errors[kind]) for kind in kinds)]
                    for (weight, method), errors in by_method.items()]}])


def _percent(value: float) -> str:
  return f"{100 * value:.2f} %"


def _sections(folder: pathlib.Path, result: dict) -> list[tuple[str, str]]:
  random = result["random"]
  factors = list(dict.fromkeys(row["factor"] for row in random))
  panels = {f"{product}, {over} tokens: relative error (%)": {
      method: (factors, [100 * errors[method] for errors in _by_factor(random, product, over)])
      for method in GRADIENTS}
            for product in ("input gradient", "weight gradient") for over in ("ordinary", "all")}
  draw = functools.partial(
      plots.panels, ratios="factor of outlier tokens", logarithmic=True,
      note="The factor is by how much the gradients of outlier tokens are larger; errors are "
           "Frobenius norms relative to that of the exact gradient.")
  return [
      ("Findings", "\n".join(f"- {line}" for line in verdicts(random, result["trained"]))),
      ("", figure(folder, "errors", "Errors of input and weight gradients", draw, panels))]
