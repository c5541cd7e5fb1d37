"""The contents of reports on runs that train on text."""

import numpy as np

from experiments.studies.text import text_runs


def run(seed: int, losses: list[float]) -> dict:
  return {"seed": seed, "curve": [[10 * (i + 1), loss] for i, loss in enumerate(losses)],
          "metrics": {"validation_loss": losses[-1]}}


def test_losses_are_shown_as_differences_from_the_first_arms_run_of_the_same_seed():
  panel = text_runs.loss_panel({
      "plain": [run(0, [4.0, 2.0]), run(1, [4.0, 3.0])],
      "new": [run(1, [4.5, 2.0]), run(0, [4.5, 1.5]), run(7, [9.0, 9.0])],
      "alone": [run(9, [1.0, 1.0])]})
  name, label, own = panel["first"]
  assert (name, label) == ("plain", "training loss (nats per token)")
  np.testing.assert_allclose(own, [[10, 20], [4.0, 2.5], [4.0, 2.0], [4.0, 3.0]])
  assert set(panel["curves"]) == {"new"}  # no seed of the third arm has a partner
  np.testing.assert_allclose(
      panel["curves"]["new"], [[10, 20], [0.5, -0.75], [0.5, -1.0], [0.5, -0.5]])
  assert "loss of plain (nats per token)" in panel["label"]


def test_arms_that_trained_at_another_learning_rate_are_named():
  at = lambda rate: [run(0, [4.0, 2.0]) | {"learning_rate": rate}]
  panel = text_runs.loss_panel({"plain": at(0.005), "same": at(0.005), "other": at(0.002)})
  assert panel["note"].endswith("plain trained at a learning rate of 0.005, other at 0.002.")
  assert "rate" not in text_runs.loss_panel({"plain": at(None), "same": at(None)})["note"]


def test_the_loss_of_a_single_arm_is_shown_itself():
  panel = text_runs.loss_panel({"plain": [run(0, [4.0, 2.0])]})
  (curves,) = panel["curves"].values()
  assert curves == {"plain": [[10, 20], [4.0, 2.0]]}
  assert "label" not in panel
