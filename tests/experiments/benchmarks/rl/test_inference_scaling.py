"""Thoughts are cut at their budget or lengthened, and votes are compared at equal tokens."""

import dataclasses

import numpy as np
import pytest

import model
from experiments.benchmarks.rl import inference_scaling
from experiments.options import Options
from experiments.reports import provenance
from rl.sampler import Sampler, Samples
from tests.rl import small

RL = inference_scaling.SCALES["cpu"].rl
LONG, DRAFTING = (dataclasses.replace(RL, sampling=dataclasses.replace(RL.sampling, **changes))
                  for changes in ({"max_completion_length": 248}, {"drafts": 1}))
TEXTS = ("<think>1+1=2\n2+3=5</think>\n<answer>5</answer>", "<think>1</think>\n<answer>1</answer>",
         "no thought", "<think>without an end")


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
  task = small.write_task(tmp_path_factory.mktemp("task"))
  cfg = small.config(task, sampling={"max_completion_length": 24})
  longer = dataclasses.replace(small.MODEL, max_seq_len=128)
  return Sampler(model.Transformer(longer), cfg, small.tokenizer())


def written(sampler) -> Samples:
  problems = [sampler.task.problem("heldout", 0)] * len(TEXTS)
  prompts, prompt_tokens = sampler.prompts(problems)
  tokens = sampler.tokenizer.encode_batch(TEXTS)
  lengths = np.array([len(row) for row in tokens])
  padded = np.zeros((len(TEXTS), lengths.max()), np.int32)
  for row, own in zip(padded, tokens, strict=True):
    row[:len(own)] = own
  return Samples(problems, prompts, prompt_tokens, list(TEXTS), padded, lengths,
                 np.zeros(padded.shape, np.float32), np.zeros(len(TEXTS), bool))


def test_thoughts_are_cut_after_their_budget_and_others_stay_as_they_are(sampler):
  drawn = written(sampler)
  spans = inference_scaling._thoughts(sampler, drawn)
  assert [span and sampler.tokenizer.decode(drawn.tokens_SN[i, slice(*span)])
          for i, span in enumerate(spans)] == ["1+1=2\n2+3=5", "1", None, None]
  size = spans[0][1] - spans[0][0]
  cut = inference_scaling._forced(sampler, small.variables(), drawn, spans, size - 1)
  assert cut.completions[1:] == drawn.completions[1:]
  assert cut.completions[0].startswith("<think>1+1=2\n2+3=</think>\n")
  assert cut.completions[0] != drawn.completions[0]
  same = inference_scaling._forced(sampler, small.variables(), drawn, spans, size)
  assert same.completions == drawn.completions
  longer = inference_scaling._longer(sampler, small.variables(), drawn, spans)
  assert longer.completions[0].startswith("<think>1+1=2\n2+3=5\nwait ")
  assert longer.completions[2:] == drawn.completions[2:]
  assert longer.lengths_S[0] >= spans[0][1] and longer.lengths_S[2] == drawn.lengths_S[2]


def result(natural: float, cut: float, voted: float):
  rate = lambda value: [value] * 6
  way = lambda name, one, four, tokens: {
      "name": name, "seconds": 0.01, "tokens": rate(tokens),
      "right": {"1": rate(one), "2": rate((one + four) / 2), "4": rate(four)}}
  each = {"seed": 0, "parameters": 1, "questions": list("abcdef"),
          "thought_tokens": {"heldout": rate(8.0), "harder": [12.0, None] * 3},
          "ways": [way("0", 0.1, 0.2, 4.0), way("4", cut, voted, 8.0),
                   way("unlimited", natural, 0.9, 16.0), way("wait once", 0.6, 0.9, 20.0)]}
  return provenance.describe() | {
      "scale": "cpu", "task": "arithmetic", "budgets": [0, 4], "models": [each]}


def test_votes_of_shorter_thoughts_are_compared_at_the_tokens_of_one_thought():
  found = inference_scaling.summary(result(natural=0.7, cut=0.5, voted=0.8))
  value = {claim["claim"]: claim["value"] for claim in found["claims"]}
  assert value["an unlimited thought against one of 4 tokens"] == pytest.approx(0.2)
  # Four votes of 4 tokens take 16, two of 8 tokens do.
  assert value["an unlimited thought against votes of thoughts of 0 tokens, as many tokens in all"
               ] == pytest.approx(0.7 - 0.2)
  assert value["an unlimited thought against votes of thoughts of 4 tokens, as many tokens in all"
               ] == pytest.approx(0.7 - 0.65)
  assert value["unforced thoughts, harder problems against held-out ones"] == pytest.approx(4)
  assert found["tables"][0]["rows"][1][:2] == ["4 tokens", 8.0]


def test_settings_of_models_that_are_not_trained_are_refused():
  how = ("checkpoints=a,b", "base.train.steps=5", "models=2")
  with pytest.raises(ValueError, match=r"base\.train\.steps, models would have no effect"):
    inference_scaling.main(Options("inference_scaling", settings=how))


def test_a_smoke_run_writes_a_report_with_its_figure(tmp_path, capsys):
  inference_scaling.main(Options("inference_scaling", out=tmp_path))
  assert "unlimited" in capsys.readouterr().out
  assert "](tokens.png)" in (tmp_path / "report.md").read_text()
  assert (tmp_path / "tokens.png").stat().st_size > 10_000


@pytest.mark.parametrize(("changes", "message"), [
    ({"budgets": (4, 4)}, "budgets="), ({"budgets": ()}, "budgets="), ({"samples": 6}, "samples=6"),
    ({"samples": 2}, "samples=2"), ({"problems": 1}, "problems=1"), ({"models": 0}, "models=0"),
    ({"rl": LONG}, "may take 528 tokens"), ({"rl": DRAFTING}, "no MTP modules to draft with")])
def test_impossible_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(inference_scaling.SCALES["cpu"], **changes)
