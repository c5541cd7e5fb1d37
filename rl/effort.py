"""Replies of models that think first: thought and answer apart, and how long they may think.

The dial of inference-time compute is the length of the thought. Its end is forced by writing
`</think>` after a number of tokens, and a longer one by writing "Wait" where it would have ended
(Muennighoff et al., "s1: Simple test-time scaling", arXiv:2501.19393).

Shape letters:  T prompt tokens
"""

import codecs
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import model
from model.checks import require
from rl.extraction import lenient_answer
from rl.tasks.equality import same_answer
from train.tokenizer import Tokenizer

_OPEN, _CLOSE = "<think>", "</think>"
_WAIT, _ENOUGH = "\nWait", f"\n{_CLOSE}\n\n"
_GUARD = "\ue000"  # in none of the forced texts


@dataclasses.dataclass(frozen=True)
class Effort:
  """How long a model thinks before it answers.

  Attributes:
    least: tokens of thought before which its end is replaced by "Wait".
    most: tokens of thought after which its end is written; None for no limit.
  """

  least: int = 0
  most: int | None = None

  def __post_init__(self):
    require(self.least >= 0 and (self.most is None or self.most >= self.least),
            f"a thought of least={self.least} to most={self.most} tokens is impossible")


class Divided(NamedTuple):
  """A text, divided at the end of its think block.

  Attributes:
    thought: the text within the block, so far; None if there is no block.
    answer: the text after it; None while the block is open, or while a block may still begin.
  """

  thought: str | None
  answer: str | None


def divide(text: str, *, opens_thinking: bool) -> Divided:
  """Divides the beginning of a completion into thought and answer.

  Args:
    text: the completion, or a beginning of it.
    opens_thinking: whether the prompt has already opened the think block.
  """
  if not opens_thinking:
    lead = text.lstrip()
    if not lead.startswith(_OPEN):
      return Divided(None, None if _OPEN.startswith(lead) else text)
    text = lead.removeprefix(_OPEN)
  thought, closed, answer = text.partition(_CLOSE)
  return Divided(thought, answer if closed else None)


@dataclasses.dataclass
class Part:
  """The thought or the answer of a reply: its text, its sampled tokens, and the seconds it took."""

  text: str = ""
  tokens: int = 0
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Reply:
  """What a model replied.

  Attributes:
    thought, answer: its parts. A thought's tokens include those of the tag that ends it, but not of
      the one that opens it; its text includes "Wait" where it was written, which is no token of it.
    status: why it ended; RUNNING if it was interrupted or ended by a stop string.
  """

  thought: Part
  answer: Part
  status: model.Status


def reply(
    network: model.Transformer, variables: dict, tokenizer: Tokenizer, prompt_T: np.ndarray, *,
    stop_tokens: Sequence[int], max_new_tokens: int, opens_thinking: bool = False,
    effort: Effort | None = None, stop: Sequence[str] = (),
    show: Callable[[str, bool], Any] = lambda text, thinking: None, **sampling: Any) -> Reply:
  """Samples a reply, and shows it as it grows.

  A `KeyboardInterrupt` ends the reply, which is returned as far as it has come.

  Args:
    network, variables, tokenizer: the model.
    prompt_T: int32, token ids of the prompt.
    stop_tokens: ids of the tokens that end the reply, and are not part of it.
    max_new_tokens: largest number of sampled tokens, thought and answer together.
    opens_thinking: whether the prompt has already opened the think block.
    effort: how long to think; None leaves it to the model.
    stop: strings before which the answer ends.
    show: takes a piece of text, and whether it belongs to the thought.
    **sampling: further arguments of `model.stream`.
  """
  growing = _Growing(tokenizer, opens_thinking, effort or Effort(), tuple(stop), show)
  key, begun, status = sampling.pop("key", None), 0, model.Status.RUNNING
  try:
    while growing.forced is not None and growing.sampled < max_new_tokens:
      growing.write()
      tokens = model.stream(
          network, variables, jnp.asarray([*prompt_T, *growing.context], jnp.int32),
          max_new_tokens=max_new_tokens, stop_token=tuple(stop_tokens),
          key=key if key is None or not begun else jax.random.fold_in(key, begun), **sampling)
      begun += 1
      while growing.goes_on and growing.sampled < max_new_tokens:
        try:
          token = next(tokens)
        except StopIteration as end:
          status = end.value
          break
        if token not in stop_tokens:  # after one of which the stream ends
          growing.add(token)
      tokens.close()
    if growing.sampled >= max_new_tokens and not growing.stopped:
      status = model.Status.LENGTH
  except KeyboardInterrupt:
    pass
  growing.finish()
  return Reply(*growing.parts, status)


def vote(replies: Sequence[Reply]) -> tuple[Reply, int]:
  """Returns the first of the replies whose answer most of them give, and how many give it.

  Answers are found by lenient matching and compared as rewards compare them. A reply without an
  answer does not vote; if none has one, the first is returned with 0 votes.
  """
  classes: list[tuple[str, list[Reply]]] = []
  for each in replies:
    answer = lenient_answer(each.answer.text)
    if answer is None:
      continue
    equal = next((same for known, same in classes
                  if answer == known or same_answer(answer, known)), None)
    if equal is None:
      classes.append((answer, [each]))
    else:
      equal.append(each)
  if not classes:
    return replies[0], 0
  _, most = max(classes, key=lambda found: len(found[1]))  # of equally many, the first
  return most[0], len(most)


class _Growing:
  """A reply as it is sampled.

  Attributes:
    parts: thought and answer as they have been shown.
    context: the tokens after the prompt, forced ones included.
    sampled: the number of sampled tokens, those that were dropped again included.
    forced: text to write before anything else is sampled; None for none.
  """

  def __init__(self, tokenizer: Tokenizer, opens_thinking: bool, effort: Effort,
               stop: tuple[str, ...], show: Callable[[str, bool], Any]):
    self._tokenizer, self._opens, self._effort = tokenizer, opens_thinking, effort
    self._stop, self._show, self._began = stop, show, time.monotonic()
    self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    self._text, self._undecided = "", 0
    self.parts, self.context, self.sampled = (Part(), Part()), [], 0
    self.forced: str | None = _ENOUGH if opens_thinking and effort.most == 0 else ""
    self._end = self.forced  # the end of the thought, if it is forced

  @property
  def stopped(self) -> bool:
    """Whether a stop string has ended the answer."""
    return _stopped(self._found().answer, self._stop)

  @property
  def goes_on(self) -> bool:
    """Whether the next token is to be sampled: no text is forced, and no stop string was found."""
    return self.forced is None and not self.stopped

  def write(self) -> None:
    """Writes the forced text, which there must be, if only an empty one."""
    if self.forced:
      self.context += self._tokenizer.encode_rendered(self.forced, _GUARD).tolist()
    self._text, self.forced = self._text + self.forced, None

  def add(self, token: int) -> None:
    """Takes the next token."""
    before = self._found()
    self.context.append(token)
    self.sampled += 1
    self._text += self._decoder.decode(self._tokenizer.decode_bytes([token]))
    found = self._found()
    self._undecided += 1  # tokens that may begin a thought, and this one
    if found == (None, None):
      return
    thinks = before.answer is None and found.thought is not None
    part = self.parts[not thinks]
    if not thinks or before.thought is not None:  # the tag that opens a thought is none of it
      part.tokens += self._undecided
    self._undecided = 0
    if thinks and found.answer is not None and part.tokens < self._effort.least:
      self._text, self.forced = self._text[:self._text.index(_CLOSE)], _WAIT
      self.context = _tokens_of(self._tokenizer, self.context, self._text)
    elif found.answer is None and self._effort.most is not None and (
        part.tokens >= self._effort.most and not self._decoder.getstate()[0]):
      self.forced = self._end = _ENOUGH  # not within a character
    self._grow(self._found())

  def finish(self) -> None:
    """Shows what was held back."""
    self._text += self._decoder.decode(b"", final=True)
    found = self._found()
    if found == (None, None):
      found = Divided(None, self._text)
      self.parts[1].tokens += self._undecided
    self._grow(found, whole=True)

  def _found(self) -> Divided:
    found = divide(self._text, opens_thinking=self._opens)
    if not self._end or found.answer is None:
      return found
    before, after = self._end.split(_CLOSE)  # neither is the model's
    return Divided(found.thought.removesuffix(before), found.answer.removeprefix(after))

  def _grow(self, found: Divided, *, whole: bool = False) -> None:
    """Shows what is new.

    What may be the beginning of a tag or of a stop string is held back until more is known.
    """
    began, self._began = self._began, time.monotonic()
    for part, text, ends, thinking in ((self.parts[0], found.thought, (_CLOSE,), True),
                                       (self.parts[1], found.answer, self._stop, False)):
      if text is None:
        continue
      is_last = found.answer is None or not thinking
      end, _ = end_of(text, len(part.text), ends)
      end = len(text) if not is_last or (whole and not _stopped(text, ends)) else end
      self._show(text[len(part.text):end], thinking)
      part.text = text[:max(end, len(part.text))]
      if is_last:
        part.seconds += self._began - began


def _tokens_of(tokenizer: Tokenizer, tokens: list[int], text: str) -> list[int]:
  """Returns the tokens, without those at the end that are not part of `text`, which they begin."""
  kept, wanted = list(tokens), text.encode()
  while kept and not wanted.startswith(tokenizer.decode_bytes(kept)):
    kept.pop()
  rest = wanted[len(tokenizer.decode_bytes(kept)):].decode(errors="replace")
  return kept + (tokenizer.encode(rest).tolist() if rest else [])


def _stopped(answer: str | None, stop: Sequence[str]) -> bool:
  return answer is not None and any(string in answer for string in stop)


def end_of(text: str, shown: int, stop: Sequence[str]) -> tuple[int, bool]:
  """Returns how much of a text can be shown, and whether a stop string ends it there.

  What may be the beginning of a stop string is held back until more is known.

  Args:
    text: the text so far.
    shown: how many of its characters have been shown.
    stop: the stop strings.
  """
  found = [at for at in (text.find(string, shown) for string in stop) if at >= 0]
  if found:
    return min(found), True
  begun = (at for at in range(shown, len(text))
           if any(string.startswith(text[at:]) for string in stop))
  return next(begun, len(text)), False
