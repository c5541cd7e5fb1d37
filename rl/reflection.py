"""Do reflections help? Where a completion takes something back, cut that out and sample on.

R1's paper calls "wait" an aha moment; others found the word in the base model, and no gain from it
(arXiv:2503.20783, section 2.3). That a completion with it is right more or less often says little,
as hard problems call for it. So the same beginnings are completed twice: from behind the reflection
and from before it.
"""

import numpy as np

from rl import rewards
from rl.extraction import reflection_at, reflects
from rl.pass_rates import estimate
from rl.sampler import Sampler, Samples
from train.tokenizer import Tokenizer

_STEP = 2**31 - 2  # as in rl.evaluate: no step of training samples with these keys


def effect(sampler: Sampler, variables: dict, drawn: Samples, samples: int = 4,
           most: int = 256) -> dict | None:
  """Accuracy with reflections kept and cut out.

  Args:
    sampler: that sampled.
    variables: of the model that sampled.
    drawn: completions; the first reflection of each is looked at.
    samples: continuations of each beginning.
    most: completions looked at, from the first.

  Returns:
    None if no completion reflects, or the context is too short for two of them. Else "completions"
    and "questions", counts, and shares as [estimate, low, high], 95 % bootstrap intervals over
    questions: "kept", the accuracy sampled on from behind the reflection; "cut", from before it;
    "difference", kept - cut; "again", how often the model reflects anyway after the cut; "without",
    the accuracy of those that do not, NaN if there is none.
  """
  spans = [(row, span) for row, text in enumerate(drawn.completions)
           if (span := reflection_at(text))][:most]
  sampling = sampler.cfg.sampling
  longest = sampling.max_prompt_length + 2 * sampling.max_completion_length
  if not spans or longest > sampler.net.cfg.max_seq_len:
    return None
  found = drawn.rows(np.array([row for row, _ in spans]))
  judged = found.rows(np.repeat(np.arange(len(found)), samples))
  texts, right = {}, {}
  for name, end in (("kept", 1), ("cut", 0)):
    kept = [_tokens_up_to(sampler.tokenizer, tokens[:length], span[end])
            for tokens, length, (_, span) in zip(
                found.tokens_SN, found.lengths_S, spans, strict=True)]
    texts[name] = sampler.resume(variables, found, kept, samples, step=_STEP)
    verdicts = rewards.accuracy(judged.prompts, texts[name], **judged.columns())
    right[name] = np.array([np.nan if verdict is None else verdict for verdict in verdicts])
  again = np.array([reflects(text) for text in texts["cut"]])  # nothing before the cut did
  questions = [problem.question for problem in judged.problems]
  shares = {**right, "difference": right["kept"] - right["cut"], "again": again.astype(float),
            "without": np.where(again, np.nan, right["cut"])}
  return {"completions": len(found), "questions": len(set(questions))} | {
      name: list(estimate(values, questions)) for name, values in shares.items()}


def _tokens_up_to(tokenizer: Tokenizer, tokens_N: np.ndarray, end: int) -> int:
  """The most tokens from the first whose text ends by character `end`."""
  lengths = (len(tokenizer.decode(tokens_N[:n])) for n in range(1, len(tokens_N) + 1))
  return next((n for n, length in enumerate(lengths) if length > end), len(tokens_N))

