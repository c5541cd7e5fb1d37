"""Extracts the reasoning and the answer of a completion, and checks its format.

A well-formed completion is `<think>reasoning</think><answer>answer</answer>`. If the prompt has
already opened the think block, the completion begins inside it.
"""

import re
from typing import Any

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_TAG = re.compile("|".join(_TAGS))
_FORM = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_ANSWER_AT_END = re.compile(r"<answer>(.*)</answer>\s*\Z", re.DOTALL)
_SENTENCE = re.compile(r"\W*(?:\w+,? ){0,3}(?:answer\W*?(?:\bis\b|[:：])|答案)", re.IGNORECASE)
_ANSWER_WORD = re.compile(
    r"(?:answer\b|答案)[\s*]*(?:is|是|为)?[\s*]*[:：=]?[*]*\s*(.*)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?[0-9][0-9,]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+(?!\w))?")
_MINUS = dict.fromkeys(map(ord, "−﹣－"), "-")
# Mathematics at the start of a sentence: in delimiters, or up to a word, the end of a clause, or
# the end of the text.
_DELIMITED = re.compile(r"\$\$(.+?)\$\$|\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]|`([^`]+)`")
_CLAUSE_END = re.compile(
    r"(?<![\\\w{])[^\W\d_]{2,}|(?<=[0-9])\s+[^\W\d_]\b|[.,;!?](?=\s*[^\W\d_]{2})|[.;!?](?=\s)"
    r"|[。，；！？]")
_ARITHMETIC = re.compile(r"(?=\D*[0-9])[0-9+\-*/().,% ]+")
_IS = re.compile(r"\b(?:is|are|equals)\b|[:：=是为]", re.IGNORECASE)
_REFLECTION = re.compile(r"(?:\bwait\b|等等|等一下)[^\n<]*", re.IGNORECASE)
_FENCE = re.compile(r"\s*```[a-z]*\n(.*?)\n?```\s*", re.DOTALL)


def reflection_at(completion: str) -> tuple[int, int] | None:
  """Returns the span of the first reflection, from "wait" to the end of the line or the next tag.

  The words are "wait", which v2 of R1's paper counts as reflective, and two Chinese equivalents.

  Returns:
    Offsets (start, end) in characters; None if there is no reflection.
  """
  found = _REFLECTION.search(completion)
  return found and found.span()


def reflects(completion: str) -> bool:
  """Whether the completion has a reflection, see `reflection_at`."""
  return reflection_at(completion) is not None


def is_well_formed(completion: str, *, thinking_opened: bool) -> bool:
  """Whether the completion is one think block, then one answer block, and only whitespace besides.

  Every tag must occur exactly once and in this order. Blocks may be empty.

  Args:
    completion: the text sampled.
    thinking_opened: whether the prompt has already opened the think block.
  """
  whole = "<think>" * thinking_opened + completion
  return tuple(_TAG.findall(whole)) == _TAGS and _FORM.fullmatch(whole) is not None


def reasoning(completion: str, *, thinking_opened: bool) -> str | None:
  """Returns the text of the first think block; None if the next tag after it is not `</think>`.

  Args:
    completion: the text sampled.
    thinking_opened: whether the prompt has already opened the think block.
  """
  _, found, rest = ("<think>" * thinking_opened + completion).partition("<think>")
  tag = _TAG.search(rest)
  return rest[:tag.start()] if found and tag and tag[0] == "</think>" else None


def strict_answer(completion: str) -> str | None:
  """Returns the text of the only answer block, with which the completion must end, or None.

  There is no answer unless the opening and the closing answer tag occur exactly once each, only
  whitespace follows the block, and the block is not empty. The think block is not checked: that is
  left to the format reward.
  """
  if any(completion.count(tag) != 1 for tag in _TAGS[2:]):
    return None
  match = _ANSWER_AT_END.search(completion)
  return (match[1].strip() or None) if match else None


def lenient_answer(completion: str) -> str | None:
  """Returns the answer by lenient matching, for evaluations that should ignore the format, or None.

  The first of these that is found: the text after the last `<answer>` up to the next tag, if there
  is one; the content of the last `\\boxed{}`; the text after the last word "answer", on its line;
  the last number. Of a sentence, the mathematics at its start is taken, without delimiters,
  emphasis and full stop. An improvement that `strict_answer` shows and this does not is one of
  format.
  """
  completion = completion.translate(_MINUS)
  _, opened, inside = completion.rpartition("<answer>")
  inside = _TAG.split(inside)[0].strip() if opened else ""
  if inside:
    stated = _stated(inside) if _SENTENCE.match(inside) else None
    return _boxed(inside) or stated or _bare(inside) or inside
  text = _TAG.sub("\n", completion)
  if boxed := _boxed(text):
    return boxed
  if stated := _stated(text):
    return stated
  numbers = _NUMBER.findall(text)
  return numbers[-1].rstrip(",") if numbers else None


def joined(tests: Any) -> Any:
  """Returns unit tests with a list of texts as one text, and tests in any other form unchanged."""
  texts = isinstance(tests, list) and tests and all(isinstance(one, str) for one in tests)
  return "\n".join(tests) if texts else tests


def unfenced(text: str) -> str:
  """Returns code without the Markdown fence around it, if there is one."""
  match = _FENCE.fullmatch(text)
  return match[1] if match else text


def _boxed(text: str) -> str | None:
  _, found, rest = text.rpartition(r"\boxed{")
  depth = 1
  for end, char in enumerate(rest if found else ""):
    depth += {"{": 1, "}": -1}.get(char, 0)
    if not depth:
      return rest[:end].strip() or None
  return None


def _stated(text: str) -> str | None:
  """Returns what the text after the last word "answer" states, or None if there is no such word."""
  lines = [line.strip() for line in _ANSWER_WORD.findall(text) if line.strip(" .*")]
  return _value(_bare(lines[-1])) if lines else None


def _value(line: str) -> str:
  """Returns the mathematics with which a line begins, else its first number, else the line."""
  if match := _DELIMITED.match(line):
    return next(filter(None, match.groups())).strip()
  end = _CLAUSE_END.search(line)
  start = _bare(line[:end.start()] if end else line)
  if _ARITHMETIC.fullmatch(start) or re.search(r"[\\^_=]|[0-9][a-zA-Z]|[+*/-]", start):
    return start
  later = _IS.split(line, maxsplit=1)
  if not start and len(later) > 1 and later[1].strip():
    return _value(_bare(later[1]))
  number = _NUMBER.search(line)
  return number[0].rstrip(",") if number else start or line


def _bare(text: str) -> str:
  """Returns a text without emphasis and full stop."""
  before = None
  while text != before:
    before, text = text, text.strip().rstrip(".。,，;；")
    if "**" not in text.strip("*"):
      text = text.strip("*")
  return text
