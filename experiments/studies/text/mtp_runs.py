"""Runs of studies of multi-token prediction: how often the modules' drafts are right.

Shape letters:  R rows  T tokens  P prompts  N new tokens  D drafts
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import model
from experiments.studies.text.text_runs import TextRuns, banded
from train.config import RunConfig
from train.data import HeldOut
from train.loop import Result
from train.losses import Batch, mtp_mask

_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 64, 32, 64
_FIRST, _TWO = 1, 2  # numbers of drafts


def agreement(cfg: model.ModelConfig, variables: dict, heldout: Mapping[str, HeldOut],
              loss: Mapping[str, float]) -> dict[str, float]:
  """Returns how often the first module predicts the model's own likeliest token on held-out text.

  Args:
    cfg: the architecture, with MTP modules.
    variables: its variables.
    heldout: held-out rows by domain.
    loss: the model's mean loss by domain.

  Returns:
    "agreement", over all tokens that both predict; "agreement_DOMAIN"; "agreement_certain" minus
    "agreement_uncertain" as "certainty_effect", those of the half of the tokens for which the
    entropy of the model's prediction is lowest and of the other half; and, with several domains,
    "domain_effect", the agreement in the domain with the lowest loss minus that in the one with the
    highest.
  """
  joined = lambda name: np.concatenate([getattr(rows, name) for rows in heldout.values()])
  mask_RT, agrees_RT, entropy_RT = map(np.asarray, _predictions(
      model.Transformer(cfg), variables, joined("tokens"), joined("loss_mask")))
  domain_R = np.repeat(list(heldout), [len(rows.tokens) for rows in heldout.values()])
  found = {"agreement": agrees_RT[mask_RT].mean()}
  for domain in heldout:
    own = (domain_R == domain)[:, None]
    found[f"agreement_{domain}"] = agrees_RT[mask_RT & own].mean()
  if len(heldout) > 1:
    found["domain_effect"] = (found[f"agreement_{min(loss, key=loss.get)}"]
                              - found[f"agreement_{max(loss, key=loss.get)}"])
  order = np.argsort(entropy_RT[mask_RT], kind="stable")
  certain, uncertain = np.array_split(agrees_RT[mask_RT][order], 2)
  found |= {"agreement_certain": certain.mean(), "agreement_uncertain": uncertain.mean(),
            "certainty_effect": certain.mean() - uncertain.mean()}
  return {name: float(value) for name, value in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _predictions(net: model.Transformer, variables: dict, tokens_RL: jax.Array,
                 loss_mask_RT: jax.Array) -> tuple[jax.Array, ...]:
  """Returns [R, T] arrays: the mask of the first module, whether it agrees, and the entropy.

  At position i they are those of token i + 2, which the module predicts there, and the model one
  position later.
  """
  def of_row(row):
    batch = Batch(row[0][None], row[1][None])
    output = net.apply(variables, batch.tokens[:, :-1], logits=False)
    logits = lambda hidden: net.apply(variables, hidden, method="unembed")
    logp_BTV = jax.nn.log_softmax(logits(output.hidden_BTD))
    entropy_BT = -(jnp.exp(logp_BTV) * logp_BTV).sum(-1)
    agrees_BT = jnp.roll(logp_BTV.argmax(-1), -1, axis=1) == logits(output.mtp_hidden[0]).argmax(-1)
    found = mtp_mask(batch, 1), agrees_BT, jnp.roll(entropy_BT, -1, axis=1)
    return jax.tree.map(lambda x: x[0], found)

  return jax.lax.map(of_row, (tokens_RL, loss_mask_RT))


def acceptance(cfg: model.ModelConfig, variables: dict,
               heldout: Mapping[str, HeldOut]) -> dict[str, float]:
  """Returns how many drafts are accepted when the model continues held-out text greedily.

  The model computes in float32, in which the tokens are those of decoding without drafts.

  Args:
    cfg: the architecture, with MTP modules.
    variables: its variables.
    heldout: held-out rows by domain.

  Returns:
    "acceptance", the fraction of passes of the trunk whose only draft was accepted; if the modules
    can draft two tokens, "tokens_per_pass_2", those that a pass with two drafts yields; and
    "identical", the fraction of texts that are the same as without drafts.
  """
  cfg = dataclasses.replace(cfg, numerics=model.NUMERICS["fp32"])
  shortest = min(rows.tokens.shape[1] for rows in heldout.values())
  _, prompts_PT = spread_prompts(heldout, min(_PROMPT_TOKENS, shortest), _PROMPTS)
  operands = variables, prompts_PT, np.full(len(prompts_PT), prompts_PT.shape[1])
  how = {"max_new_tokens": _NEW_TOKENS, "temperature": 0.0}
  plain = model.generate(
      model.Transformer(dataclasses.replace(cfg, mtp=None)), *operands, **how).tokens_BN
  found, same = {}, []
  counts = [_FIRST, _TWO] if cfg.mtp.depth > 1 or cfg.mtp.form == "sequential" else [_FIRST]
  for drafts in counts:
    result = model.speculate(model.Transformer(cfg), *operands, drafts=drafts, **how)
    passes = int(np.sum(result.passes_B))
    if drafts == _FIRST:
      found["acceptance"] = int(np.sum(result.accepted_BD)) / passes
    else:
      found["tokens_per_pass_2"] = 1 + int(np.sum(result.accepted_BD)) / passes
    same.append(np.asarray(result.generated.tokens_BN == plain).all(1))
  return found | {"identical": float(np.mean(same))}


def spread_prompts(heldout: Mapping[str, HeldOut], width: int,
                   count: int) -> tuple[list[str], np.ndarray]:
  """Returns pieces from the beginning of every domain's held-out text, as many as are its share.

  Args:
    heldout: held-out rows by domain.
    width: T, tokens of a piece.
    count: P, the number of pieces; fewer if there is less text.

  Returns:
    The domain of each piece, domains taking turns, and their tokens, int32 [P, T].
  """
  pieces = {domain: rows.tokens[:, :rows.tokens.shape[1] // width * width].reshape(-1, width)
            for domain, rows in heldout.items()}
  found = sorted(((index / len(rows), domain, row) for domain, rows in pieces.items()
                  for index, row in enumerate(rows)), key=lambda piece: piece[:2])[:count]
  return [domain for _, domain, _ in found], np.stack([row for *_, row in found])


class MTPRuns(TextRuns):
  """Runs that train on text with MTP modules, with metrics of their drafts.

  Their metrics are those of `TextRuns`, of `agreement` and of `acceptance`, and "agreement_gain",
  the agreement after training minus that at the first evaluation during it.
  """

  measuring: ClassVar = (*TextRuns.measuring, mtp_mask, agreement, _predictions, acceptance,
                         spread_prompts)

  def _measure(self, cfg: RunConfig, result: Result, run: int | None) -> dict[str, float]:
    variables = result.state.variables
    if run is not None:
      variables = jax.tree.map(lambda x: x[run], variables)
    metrics = super()._measure(cfg, result, run)
    pick = lambda x: np.asarray(x) if run is None else np.asarray(x)[run]
    loss = {domain: float(pick(x)) for domain, x in result.evaluation.loss.items()}
    metrics |= agreement(cfg.model, variables, self.data.heldout, loss)
    metrics |= acceptance(cfg.model, variables, self.data.heldout)
    during = [value for step, value in _agreement_curve(result, run) if step]
    if len(during) > 1:
      metrics["agreement_gain"] = during[-1] - during[0]
    return metrics

  def _curves(self, result: Result, run: int | None) -> dict[str, list[list[float]]]:
    return super()._curves(result, run) | {"agreement_curve": _agreement_curve(result, run)}

  def report_parts(self, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    parts = super().report_parts(runs)
    curves = {arm: banded([step for step, _ in by_seed[0]["agreement_curve"]],
                          [[value for _, value in run["agreement_curve"]] for run in by_seed])
              for arm, by_seed in runs.items() if by_seed}
    if not curves:
      return parts
    return parts | {"panels": [*parts["panels"], {
        "name": "agreement", "caption": "Agreement of the first module with the model, in training",
        "curves": {"fraction of held-out tokens": curves},
        "note": "Lines are means over seeds, bands go from the lowest to the highest."}]}


def _agreement_curve(result: Result, run: int | None) -> list[list[float]]:
  """Returns [step, agreement of the first module] of every evaluation."""
  return [[e["step"], e["mtp_acceptance"] if run is None else e["per_seed"]["mtp_acceptance"][run]]
          for e in result.evaluations]
