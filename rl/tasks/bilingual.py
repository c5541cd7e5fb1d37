"""Word problems in English or Chinese, with solutions in either language."""

import dataclasses
import functools
import random
from typing import Any, ClassVar, NamedTuple

from model.checks import require_range
from rl.tasks.documents import Writer, slip
from rl.tasks.generated import Generated

_NAMES = {"en": ("Tom", "Anna", "Mei", "Omar"), "zh": ("小明", "小红", "小丽", "小刚")}
_ITEMS = {"en": ("apples", "books", "coins", "stamps"), "zh": ("苹果", "书", "硬币", "邮票")}
_BEGIN = {"en": "{name} has {value} {item}.", "zh": "{name}有{value}个{item}。"}
_GAIN = {"en": " Then {value} more come.", "zh": "后来多了{value}个。"}
_LOSE = {"en": " Then {value} are gone.", "zh": "后来少了{value}个。"}
_ASK = {"en": " How many {item} are there?", "zh": "现在有多少个{item}？"}
_PLUS = {"en": "{left} plus {right} is {value}", "zh": "{left} 加 {right} 得 {value}"}
_MINUS = {"en": "{left} minus {right} is {value}", "zh": "{left} 减 {right} 得 {value}"}
_MORE = {"en": "{right} more come so ", "zh": "多了 {right} 个所以 "}
_FEWER = {"en": "{right} are gone so ", "zh": "少了 {right} 个所以 "}
_WAIT = {"en": "wait ", "zh": "等等 "}


class Story(NamedTuple):
  """A word problem.

  Attributes:
    language: language of the question, "en" or "zh".
    who: index of the person's name in `_NAMES`.
    what: index of the items' name in `_ITEMS`.
    values: the initial number of items, then the changes, negative for a loss.
  """

  language: str
  who: int
  what: int
  values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Bilingual(Generated[Story]):
  """Stories of a number of items with 1 to `events` changes; "harder" has `events` + 1.

  The column "language" is the question's language, "en" or "zh". Documents reason in one of the two
  at random: keeping to the question's language is left for RL to learn.

  Attributes:
    events: largest number of changes in a story, 1..10.
    digits: largest number of digits of the numbers in a story, 1..6.
    seed: seed of the problems.
  """

  name: ClassVar[str] = "bilingual"
  events: int = 2
  digits: int = 2
  seed: int = 0

  def __post_init__(self):
    require_range(self, 1, 10, "events")
    require_range(self, 1, 6, "digits")

  def draw(self, rng: random.Random, harder: bool) -> Story:
    """Returns a story in which the number of items stays positive."""
    limit = 10 ** self.digits
    values = [rng.randrange(1, limit)]
    for _ in range(self.events + 1 if harder else rng.randint(1, self.events)):
      loses = sum(values) > 1 and rng.random() < 0.5
      change = rng.randrange(1, min(limit, sum(values)) if loses else limit)
      values.append(-change if loses else change)
    return Story(rng.choice(("en", "zh")), rng.randrange(4), rng.randrange(4), tuple(values))

  def key(self, drawn: Story) -> str:
    """Returns the numbers: a story, its translation and others with the same are one problem."""
    return str(drawn.values)

  def pose(self, drawn: Story) -> tuple[str, str, dict[str, Any]]:
    """Returns the story with its question, the final number, and the column "language"."""
    language = drawn.language
    words = {"name": _NAMES[language][drawn.who], "item": _ITEMS[language][drawn.what]}
    parts = [_BEGIN, *(_GAIN if value > 0 else _LOSE for value in drawn.values[1:])]
    story = "".join(part[language].format(value=abs(value), **words)
                    for part, value in zip(parts, drawn.values, strict=True))
    return (story + _ASK[language].format(**words), str(sum(drawn.values)), {"language": language})

  def work(self, drawn: Story, write: Writer, detailed: bool) -> str:
    """Writes running totals; a detailed solution first says what changed."""
    language = write.rng.choice(("en", "zh"))
    total = drawn.values[0]
    for change in drawn.values[1:]:
      happened, sum_ = (_MORE, _PLUS) if change > 0 else (_FEWER, _MINUS)
      sentence = functools.partial((happened[language] * detailed + sum_[language]).format,
                                   left=total, right=abs(change))
      show = lambda value, sentence=sentence: sentence(value=value)
      correct = total + change
      total = write.step(correct, slip(write.rng, correct), show, _WAIT[language])
    return str(total)
