"""What a completion says: its reasoning, its answer, and whether its form is the template's.

A well-formed completion is `<think>reasoning</think><answer>answer</answer>`; where the prompt has
already opened the think block, the completion begins inside it.
"""

import re

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_TAG = re.compile("|".join(_TAGS))
_FORM = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_ANSWER_AT_END = re.compile(r"<answer>(.*)</answer>\s*\Z", re.DOTALL)
_ANSWER_WORD = re.compile(r"(?:answer\b|答案)\**\s*(?:is|是|为)?\s*[:：=]?\s*(.*)", re.IGNORECASE)
_EXPRESSION = re.compile(r"[0-9+\-*/(). ]+")
_NUMBER = re.compile(r"(?<![\w.])-?[0-9][0-9,]*(?:\.[0-9]+)?")
_REFLECTION = re.compile(r"(?:\bwait\b|等等|等一下)[^\n<]*", re.IGNORECASE)
_FENCE = re.compile(r"\s*```[a-z]*\n(.*?)\n?```\s*", re.DOTALL)


def reflection_at(completion: str) -> tuple[int, int] | None:
  """Where it first takes something back, to the end of that line; None if it does not.

  R1's "wait", which v2 of its paper counts as reflective.
  """
  found = _REFLECTION.search(completion)
  return found and found.span()


def reflects(completion: str) -> bool:
  """Whether it takes something back."""
  return reflection_at(completion) is not None


def opens_thinking(prompt: str) -> bool:
  """Whether the prompt ends inside a think block that it has opened."""
  return prompt.rstrip().endswith("<think>")


def is_well_formed(completion: str, *, thinking_opened: bool) -> bool:
  """Whether it is one think block and then one answer block, with nothing but space around them.

  No tag may occur twice, nor within a block of the other kind. Blocks may be empty.
  """
  whole = "<think>" * thinking_opened + completion
  return tuple(_TAG.findall(whole)) == _TAGS and _FORM.fullmatch(whole) is not None


def reasoning(completion: str, *, thinking_opened: bool) -> str | None:
  """What stands between the first `<think>` and the first tag after it; None if no block closes."""
  _, found, rest = ("<think>" * thinking_opened + completion).partition("<think>")
  tag = _TAG.search(rest)
  return rest[:tag.start()] if found and tag and tag[0] == "</think>" else None


def strict_answer(completion: str) -> str | None:
  """The text of the one answer block, with which the completion must end; None if there is none.

  A second answer tag of either kind anywhere, text after the block or nothing in it: no answer.
  Thinking is not looked at; that is for the format reward.
  """
  if any(completion.count(tag) != 1 for tag in _TAGS[2:]):
    return None
  match = _ANSWER_AT_END.search(completion)
  return (match[1].strip() or None) if match else None


def lenient_answer(completion: str) -> str | None:
  """The answer as a kind reader finds it, for evaluations that are to ignore form.

  In this order: what the last `<answer>` opens, closed or not; the last `\\boxed{}`; what follows
  the last word "answer" on its line; the last number. A gain that only `strict_answer` sees is a
  gain in form.
  """
  _, opened, inside = completion.rpartition("<answer>")
  inside = _TAG.split(inside)[0].strip() if opened else ""
  if inside:
    return _boxed(inside) or inside
  text = _TAG.sub("\n", completion)
  if boxed := _boxed(text):
    return boxed
  if lines := [line.strip() for line in _ANSWER_WORD.findall(text) if line.strip()]:
    return _value(lines[-1])
  numbers = _NUMBER.findall(text)
  return numbers[-1].rstrip(",") if numbers else None


def unfenced(text: str) -> str:
  """Code without the Markdown fence around it, if there is one."""
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


def _value(line: str) -> str:
  """A whole expression as it is, else the first number, else the line."""
  line = line.rstrip(". ")
  number = _NUMBER.search(line)
  return line if _EXPRESSION.fullmatch(line) or not number else number[0].rstrip(",")
