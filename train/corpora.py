"""Three corpora that need no download: the World English Bible, Python's library, arithmetic.

The Bible (public domain, 1,074 chapters, 4.9 MB) is packaged as LZMA-compressed JSONL. Python's
library is the standard library of the running interpreter. Arithmetic problems are generated:
problem i is the same on every machine.
"""

import pathlib
import random
import sysconfig
from collections.abc import Callable, Iterator

NUM_PROBLEMS = 18_500

_LEFT_OUT = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages",
             "__pycache__"}


def files(name: str) -> list[pathlib.Path]:
  """Returns the files whose contents determine the builtin corpus `name`.

  For arithmetic, that is the generator: this file.

  Raises:
    ValueError: if the name is unknown, or if the standard library is not installed as files.
  """
  if name not in _FILES:
    raise ValueError(f"there is no builtin:{name}; there are "
                     f"{', '.join('builtin:' + known for known in _FILES)}")
  return _FILES[name]()


def _standard_library() -> list[pathlib.Path]:
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  # _sysconfigdata differs between two builds of one version.
  found = [path for path in sorted(root.rglob("*.py"))
           if not _LEFT_OUT.intersection(path.relative_to(root).parts)
           and not path.name.startswith("_sysconfigdata")]
  if not found:
    raise ValueError(f"builtin:python: this Python has no .py files in {root}. Use another "
                     "installation of Python, or leave this source out")
  return found


_HERE = pathlib.Path(__file__)
_FILES = {
    "bible": lambda: [_HERE.parent / "corpora_data" / "web_bible.jsonl.xz"],
    "python": _standard_library,
    "arithmetic": lambda: [_HERE],
}


def arithmetic() -> Iterator[str]:
  """Yields the texts of all problems in order, about 3 MB in total."""
  return map(problem, range(NUM_PROBLEMS))


def problem(index: int) -> str:
  """Returns problem `index` >= 0: "Question: ...", worked steps, and "Answer: " with an integer."""
  rng = random.Random(index)
  kinds = (_addition, _subtraction, _multiplication, _word_problem, _expression)
  question, steps, answer = kinds[index % len(kinds)](rng)
  return "\n".join([f"Question: {question}", *steps, f"Answer: {answer}\n"])


Worked = tuple[str, list[str], int]  # the question, its worked steps, and the answer


def _number(rng: random.Random, max_digits: int) -> int:
  digits = rng.randint(1, max_digits)
  return rng.randrange(10 ** (digits - 1), 10 ** digits)


def _ask(rng: random.Random, expression: str) -> str:
  return rng.choice(("What is {}?", "Compute {}.", "Work out {}.", "Find the value of {}.",
                     "{} = ?", "Calculate {} step by step.")).format(expression)


def _addition(rng: random.Random) -> Worked:
  a, b = _number(rng, 6), _number(rng, 6)
  return _ask(rng, f"{a} + {b}"), [*_add_digits(a, b), f"So {a} + {b} = {a + b}."], a + b


def _add_digits(a: int, b: int) -> list[str]:
  steps, carry = [], 0
  for place in range(len(str(max(a, b)))):
    x, y = a // 10**place % 10, b // 10**place % 10
    total = x + y + carry
    terms = f"{x} + {y} + {carry}" if carry else f"{x} + {y}"
    carry = total // 10
    steps.append(f"{terms} = {total}, write {total % 10}" + (f", carry {carry}." if carry else "."))
  return steps + [f"The last carry gives {carry}."] * carry


def _subtraction(rng: random.Random) -> Worked:
  a, b = _number(rng, 6), _number(rng, 6)
  high, low = max(a, b), min(a, b)
  steps = _subtract_digits(high, low)
  if a < b:
    steps = [f"{a} is less than {b}, so take {b} - {a} and negate it.", *steps,
             f"{b} - {a} = {b - a}."]
  return _ask(rng, f"{a} - {b}"), [*steps, f"So {a} - {b} = {a - b}."], a - b


def _subtract_digits(high: int, low: int) -> list[str]:
  steps, borrow = [], 0
  for place in range(len(str(high))):
    x, y = high // 10**place % 10 - borrow, low // 10**place % 10
    borrow = int(x < y)
    text = f"{x + 10 * borrow} - {y} = {x + 10 * borrow - y}, write {x + 10 * borrow - y}"
    steps.append(text + (", borrow 1." if borrow else "."))
  return steps


def _multiplication(rng: random.Random) -> Worked:
  a, b = _number(rng, 4), _number(rng, 3)
  steps, total = [], 0
  for place, digit in enumerate(map(int, reversed(str(b)))):
    partial = a * digit * 10**place
    steps.append(f"{a} * {digit * 10**place} = {partial}.")
    if place:
      steps.append(f"{total} + {partial} = {total + partial}.")
    total += partial
  return _ask(rng, f"{a} * {b}"), [*steps, f"So {a} * {b} = {total}."], total


def _expression(rng: random.Random) -> Worked:
  """An expression worked from left to right, with brackets where precedence requires them."""
  value = rng.randint(1, 99)
  text, is_sum, steps = str(value), False, []
  for _ in range(rng.randint(2, 5)):
    sign, operand = rng.choice("+-*"), rng.randint(1, 99)
    if sign == "*":
      operand = rng.randint(2, 9)
      text = f"({text})" if is_sum else text
    result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
    steps.append(f"{value} {sign} {operand} = {result}.")
    text, value, is_sum = f"{text} {sign} {operand}", result, sign != "*"
  return _ask(rng, text), steps, value


_NAMES = ("Ana", "Ben", "Chen", "Dora", "Emil", "Fatima", "Goro", "Hana", "Ivan", "Jia", "Kofi",
          "Lena", "Mei", "Nils", "Olga", "Priya", "Ravi", "Sara", "Tom", "Yuki")
_THINGS = ("apples", "books", "coins", "pencils", "shells", "stamps", "marbles", "cards", "eggs",
           "tickets", "stones", "buttons", "oranges", "flowers", "cups", "nails")


def _word_problem(rng: random.Random) -> Worked:
  kinds: tuple[Callable[..., Worked], ...] = (_shopping, _giving, _sharing, _walking)
  return rng.choice(kinds)(rng, rng.choice(_NAMES), rng.choice(_THINGS))


def _shopping(rng: random.Random, who: str, things: str) -> Worked:
  count, price, left = rng.randint(2, 20), rng.randint(2, 30), rng.randint(1, 200)
  cost = count * price
  money = cost + left
  question = (f"{who} has {money} dollars and buys {count} {things} for {price} dollars each. "
              f"How many dollars does {who} have left?")
  return question, [f"The {things} cost {count} * {price} = {cost} dollars.",
                    f"That leaves {money} - {cost} = {left} dollars."], left


def _giving(rng: random.Random, who: str, things: str) -> Worked:
  first, more, gone = rng.randint(10, 500), rng.randint(2, 300), rng.randint(1, 10)
  total = first + more
  question = (f"{who} has {first} {things}, finds {more} more and then gives {gone} away. "
              f"How many {things} does {who} have now?")
  return question, [f"With the new ones there are {first} + {more} = {total} {things}.",
                    f"After giving some away there are {total} - {gone} = {total - gone}."
                    ], total - gone


def _sharing(rng: random.Random, who: str, things: str) -> Worked:
  friends, each, kept = rng.randint(2, 12), rng.randint(2, 40), rng.randint(1, 30)
  shared = friends * each
  question = (f"{who} has {shared + kept} {things}, keeps {kept} of them and shares the rest "
              f"equally among {friends} friends. How many {things} does each friend get?")
  return question, [f"To share there are {shared + kept} - {kept} = {shared} {things}.",
                    f"Each friend gets {shared} / {friends} = {each}."], each


def _walking(rng: random.Random, who: str, things: str) -> Worked:
  speed, hours, extra = rng.randint(3, 90), rng.randint(2, 12), rng.randint(1, 99)
  distance = speed * hours
  question = (f"{who} carries {things} to market, at {speed} km an hour for {hours} hours and then "
              f"{extra} km more. How many km is that in all?")
  return question, [f"In {hours} hours it is {speed} * {hours} = {distance} km.",
                    f"In all it is {distance} + {extra} = {distance + extra} km."
                    ], distance + extra
