"""Cutting reflections out: where the cut is, how sampling resumes, and what is counted."""

import dataclasses

import numpy as np
import pytest

import model
from rl import reflection
from rl.extraction import reflection_at
from rl.sampler import Sampler, Samples
from rl.tasks import get_task
from tests.rl import small

TEXTS = ("1+1=3\nwait 1+1=2\n2+1=3", "1+1=2", "no, 等一下 2</think>", "Wait")


@pytest.fixture(scope="module")
def sampler(task) -> Sampler:
  cfg = small.config(task, sampling={"max_completion_length": 24})
  longer = dataclasses.replace(small.MODEL, max_seq_len=64)
  return Sampler(model.Transformer(longer), cfg, small.tokenizer())


def written(sampler: Sampler, texts=TEXTS) -> Samples:
  """Returns texts as if they had been sampled, one per problem."""
  problems = [get_task(sampler.cfg.task).problem("heldout", i) for i in range(len(texts))]
  prompts = [sampler.template.render(problem.question) for problem in problems]
  tokens = sampler.tokenizer.encode_batch(list(texts))
  lengths = np.array([len(row) for row in tokens])
  padded = np.zeros((len(texts), lengths.max()), np.int32)
  for row, own in zip(padded, tokens, strict=True):
    row[:len(own)] = own
  return Samples(problems, prompts, sampler.tokenizer.encode_batch(prompts), list(texts), padded,
                 lengths, np.zeros(padded.shape, np.float32), np.ones(len(texts), bool))


@pytest.mark.parametrize("text, found", list(zip(TEXTS, (
    "wait 1+1=2", None, "等一下 2", "Wait"), strict=True)))
def test_a_reflection_ends_with_its_line_or_at_a_tag(text, found):
  span = reflection_at(text)
  assert (span and text[slice(*span)]) == found
  assert reflection_at("awaiting") is None


def test_the_kept_prefix_ends_before_or_after_the_reflection(sampler, monkeypatch):
  prefixes = []
  resume = sampler.resume

  def recording(variables, drawn, begun, *args, **kwargs):
    prefixes.append([sampler.tokenizer.decode(tokens) for tokens in begun])
    return resume(variables, drawn, begun, *args, **kwargs)

  monkeypatch.setattr(sampler, "resume", recording)
  found = reflection.effect(sampler, small.variables(), written(sampler), samples=2)
  assert prefixes == [["1+1=3\nwait 1+1=2", "no, 等一下 2", "Wait"], ["1+1=3\n", "no, ", ""]]
  assert found["completions"] == found["questions"] == 3
  assert found["again"] == [0, 0, 0]  # this model never writes the word
  assert found["without"] == found["cut"]
  assert found["difference"][0] == pytest.approx(found["kept"][0] - found["cut"][0])
  assert 0 < found["kept"][0] < 1


def test_completions_without_a_reflection_have_no_effect_to_measure(sampler):
  assert reflection.effect(sampler, small.variables(), written(sampler, TEXTS[1:2])) is None


def test_resumed_sampling_keeps_the_prefix_and_is_reproducible(sampler):
  drawn, kept = written(sampler), [3, 5, 0, 1]
  begun = [tokens[:most] for tokens, most in zip(drawn.tokens_SN, kept, strict=True)]
  first, again = (sampler.resume(small.variables(), drawn, begun, 4, step=7) for _ in range(2))
  once = first.completions
  assert once == again.completions and len(set(once)) > len(drawn)
  for i, text in enumerate(once):
    row = i // 4
    assert text.startswith(sampler.tokenizer.decode(begun[row]))
    assert first.problems[i] is drawn.problems[row]
    length = first.lengths_S[i]
    assert text == sampler.tokenizer.decode(first.tokens_SN[i, :length - first.ended_S[i]])
    assert (first.logprobs_SN[i, :kept[row]] == 0).all()
    assert (first.logprobs_SN[i, kept[row]:length] < 0).all()
