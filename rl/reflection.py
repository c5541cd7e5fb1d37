"""Measures whether reflections help, by continuing completions with and without theirs.

R1's paper calls "wait" an aha moment; others found the word in the base model, and no gain from it
(arXiv:2503.20783, section 2.3). The accuracy of the completions that contain it says little, as
hard problems elicit it. So the same beginnings are completed twice: from the end of the reflection,
and from just before it.
"""

import numpy as np

from rl import rewards
from rl.extraction import reflection_at, reflects
from rl.pass_rates import estimate
from rl.sampler import Sampler, Samples
from train.tokenizer import Tokenizer

_STEP = 2**31 - 2  # no training step reaches this number, so the random keys are its own


def effect(sampler: Sampler, variables: dict, drawn: Samples, samples: int = 4,
           most: int = 256) -> dict | None:
  """Returns the accuracy of completions continued with their first reflection kept and cut out.

  Args:
    sampler: the sampler that drew the completions.
    variables: variables of the model that drew the completions.
    drawn: completions, of which those with a reflection are continued.
    samples: number of continuations of each beginning.
    most: largest number of completions with a reflection to use, the first ones.

  Returns:
    None if no completion reflects, or if the model's context cannot hold a prompt and two
    completions. Otherwise, counts of "completions" and of distinct "questions", and these figures
    as [estimate, low, high] with a 95 % bootstrap interval over questions: "kept", the accuracy
    when continuing from the end of the reflection; "cut", when continuing from just before it;
    "difference", kept - cut; "again", the fraction of the cut completions in which the model
    reflects anyway; "without", the accuracy of the cut completions in which it does not, NaN if
    there are none.
  """
  spans = [(row, span) for row, text in enumerate(drawn.completions)
           if (span := reflection_at(text))][:most]
  sampling = sampler.cfg.sampling
  longest = sampling.max_prompt_length + 2 * sampling.max_completion_length
  if not spans or longest > sampler.net.cfg.max_seq_len:
    return None
  found = drawn.rows(np.array([row for row, _ in spans]))
  judged = found.rows(np.repeat(np.arange(len(found)), samples))
  texts, correct = {}, {}
  for name, end in (("kept", 1), ("cut", 0)):
    begun = [tokens[:tokens_up_to(sampler.tokenizer, tokens[:length], span[end])]
             for tokens, length, (_, span) in zip(
                 found.tokens_SN, found.lengths_S, spans, strict=True)]
    texts[name] = sampler.resume(variables, found, begun, samples, step=_STEP).completions
    verdicts = rewards.accuracy(judged.prompts, texts[name], **judged.columns())
    correct[name] = np.array([np.nan if verdict is None else verdict for verdict in verdicts])
  # Only a continuation can reflect: the cut is before the first reflection.
  again = np.array([reflects(text) for text in texts["cut"]])
  questions = [problem.question for problem in judged.problems]
  rates = {**correct, "difference": correct["kept"] - correct["cut"],
           "again": again.astype(float), "without": np.where(again, np.nan, correct["cut"])}
  return {"completions": len(found), "questions": len(set(questions))} | {
      name: list(estimate(values, questions)) for name, values in rates.items()}


def tokens_up_to(tokenizer: Tokenizer, tokens_N: np.ndarray, end: int) -> int:
  """Returns the largest number of leading tokens whose text has at most `end` characters."""
  lengths = (len(tokenizer.decode(tokens_N[:n])) for n in range(1, len(tokens_N) + 1))
  return next((n for n, length in enumerate(lengths) if length > end), len(tokens_N))

