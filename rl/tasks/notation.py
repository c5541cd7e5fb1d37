"""Rewrites mathematics in Unicode, ASCII or other conventions as LaTeX that math-verify parses."""

import re

_SYMBOLS = {ord(char): latex for char, latex in {
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "°": r"^\circ ", "π": r"\pi ",
    "∞": r"\infty ", "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}", "≈": r"\approx ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "}.items()}
_FRACTIONS = {ord(char): latex for char, latex in {
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}"}.items()}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+")
_POWER = re.compile(r"\s*\*\*\s*|\^\s*(?=\(|-|[0-9]{2})")
_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt(?![a-zA-Z])|\\sqrt(?!\s*[\[{a-zA-Z])|√")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_NAMES = (
    (re.compile(r"(?<![\\a-zA-Z])((?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h|cot|sec|csc|log|ln|exp)"
                r"(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"(?<![\\a-zA-Z])inf(?:inity|ty)?(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\\([RZNQC])(?![a-zA-Z])"), r"\\mathbb{\1}"))
_MOST = 50  # roots, and powers, that are rewritten in a text
_DEPTHS = {"(": 1, "{": 1, "[": 1, ")": -1, "}": -1, "]": -1}
_OPERAND = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+|[a-zA-Z]|\\[a-zA-Z]+")

_SIDED = re.compile(r"\\(?:left|right)\s*(?=[()\[\]])")
_INTERVAL = re.compile(r"([\[\]])([^\[\](),;]+)[,;]([^\[\](),;]+)([\[\]])")
_LESS, _MORE = r"<=|<|\\leq?(?:slant)?(?![a-zA-Z])|\\lt(?![a-zA-Z])", \
    r">=|>|\\geq?(?:slant)?(?![a-zA-Z])|\\gt(?![a-zA-Z])"
_RELATION = re.compile(rf"\s*({_LESS}|{_MORE})\s*")
_OR = re.compile(
    r"\s*(?:(?<![\\a-zA-Z])or(?![a-zA-Z])|\\text\s*\{\s*or\s*\}|\\lor(?![a-zA-Z])|∨)\s*")
_VARIABLE = re.compile(r"[a-zA-Z]|\\(?:theta|alpha|beta)")
_BOUND = re.compile(r"(?:\\(?:[dt]?frac|sqrt|pi|infty)|[-+0-9./{}()\s])+")


def as_latex(text: str) -> tuple[str, str | None]:
  """Returns mathematics as LaTeX, and the variable if it is a union of inequalities, else None."""
  text = _SIDED.sub("", with_ascii_numbers(text))
  text = _with_roots(_braced_powers(text)).translate(_SYMBOLS)
  for name, latex in _NAMES:
    text = name.sub(latex, text)
  if "[" in text or "]" in text:
    text = _INTERVAL.sub(_interval, text)
  parts = _RELATION.split(text)
  if "<" in text or ">" in text or "\\" in text:
    if union := _union(text):
      return union
    if len(parts) == 5 and "," not in text and all(_is_more(sign) for sign in parts[1::2]):
      text = " ".join((parts[4], _flipped(parts[3]), parts[2], _flipped(parts[1]), parts[0]))
  return text, None


def with_ascii_numbers(text: str) -> str:
  """Returns the text with `^{2}` for a superscript two, `\\frac{1}{2}` for `½`, and the like."""
  if text.isascii():
    return text
  text = text.translate(_FRACTIONS)
  return _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)


def _braced_powers(text: str) -> str:
  """Returns the text with `^{10}` for `**10`, and with braces for parentheses of an exponent."""
  for found in reversed(list(_POWER.finditer(text))[:_MOST]):  # the last first, if nested
    inside, end = _operand(text, found.end())
    text = text[:found.start()] + (f"^{text[found.end():]}" if inside is None
                                   else f"^{{{inside}}}{text[end:]}")
  return text


def _with_roots(text: str) -> str:
  """Returns the text with `\\sqrt{10}` for a root sign or `sqrt` before `10` or `(10)`."""
  text = _ROOT.sub("√", text)
  for at in [at for at, char in enumerate(text) if char in _ROOTS][:_MOST][::-1]:
    inside, end = _operand(text, at + 1)
    root = _ROOTS[text[at]]
    text = text[:at] + (f"{root} {text[at + 1:]}" if inside is None
                        else f"{root}{{{inside}}}{text[end:]}")
  return text


def _operand(text: str, at: int) -> tuple[str | None, int]:
  """Returns what a root or a power at an index applies to, and the index after it.

  That is the content of parentheses or braces, a number, a letter, or a command and its arguments,
  perhaps after a minus sign; None if there is none.
  """
  at += len(text[at:]) - len(text[at:].lstrip())
  minus = text[at:at + 1] == "-"
  at += minus
  if text[at:at + 1] in ("(", "{") and (end := _closing(text, at)):
    inside = text[at + 1:end - 1]
    return f"-({inside})" if minus else inside, end
  found = _OPERAND.match(text, at)
  if not found:
    return None, at
  end = found.end()
  while (found[0].startswith("\\") and text[end:end + 1] in ("{", "[")
         and (closed := _closing(text, end))):
    end = closed
  return text[at - minus:end], end


def _closing(text: str, at: int) -> int | None:
  """Returns the index after the bracket that closes the one at an index."""
  depth = 0
  for end in range(at, len(text)):
    depth += _DEPTHS.get(text[end], 0)
    if not depth:
      return end + 1
  return None


def _interval(match: re.Match) -> str:
  """Returns an interval such as `]0,1[` with parentheses where it is open."""
  opening, low, high, closing = match.groups()
  return f"{'[' if opening == '[' else '('}{low},{high}{']' if closing == ']' else ')'}"


def _union(text: str) -> tuple[str, str] | None:
  """Returns the intervals that `x<1 or x>2` states as a union, and the variable, or None."""
  pieces = _OR.split(text)
  if len(pieces) < 2:
    return None
  found = [_solutions(piece) for piece in pieces]
  if None in found or len({variable for _, variable in found}) > 1:
    return None
  return r"\cup".join(interval for interval, _ in found), found[0][1]


def _solutions(text: str) -> tuple[str, str] | None:
  """Returns the interval that an inequality such as `x<1` or `1<x<2` states, and the variable."""
  parts = _RELATION.split(text.strip())
  if len(parts) == 5 and all(map(_is_more, parts[1::2])):
    parts = [parts[4], _flipped(parts[3]), parts[2], _flipped(parts[1]), parts[0]]
  elif len(parts) == 3 and not _VARIABLE.fullmatch(parts[0]):
    parts = [parts[2], _flipped(parts[1]), parts[0]]
  if len(parts) == 3 and _is_more(parts[1]):
    parts = [parts[2], _flipped(parts[1]), parts[0], "<", r"\infty"]
  elif len(parts) == 3:
    parts = [r"-\infty", "<", *parts]
  if (len(parts) != 5 or any(map(_is_more, parts[1::2])) or not _VARIABLE.fullmatch(parts[2])
      or not all(map(_BOUND.fullmatch, parts[::4]))):
    return None
  low, first, variable, second, high = parts
  brackets = ("(" if first in ("<", r"\lt") else "["), (")" if second in ("<", r"\lt") else "]")
  return f"{brackets[0]}{low},{high}{brackets[1]}", variable


def _is_more(relation: str) -> bool:
  return re.fullmatch(_MORE, relation) is not None


def _flipped(relation: str) -> str:
  """Returns the relation that holds with its sides exchanged."""
  strict = relation in ("<", ">", r"\lt", r"\gt")
  return {(True, True): "<", (True, False): r"\le", (False, True): ">",
          (False, False): r"\ge"}[_is_more(relation), strict]
