"""The built-in corpora exist in their known sizes, and the arithmetic is correct."""

import re

import pytest

from train import corpora
from train.config import Source
from train.sources import read


def documents(name):
  return list(read(Source(f"builtin:{name}")))


def num_bytes(found):
  return sum(len(one.text.encode()) for one in found)


def test_the_bible_is_complete():
  bible = documents("bible")
  assert len(bible) == 1074 and num_bytes(bible) == 4_907_644
  assert {(one.domain, one.language) for one in bible} == {("bible", "en")}


def test_the_python_corpus_is_the_standard_library_without_its_tests():
  paths = corpora.files("python")
  assert not any({"test", "tests", "site-packages", "idlelib"}.intersection(path.parts[-3:])
                 for path in paths)
  code = documents("python")
  assert num_bytes(code) > 5e6
  assert any("def dump(obj, fp" in one.text for one in code)
  assert {one.domain for one in code} == {"python"}


def test_arithmetic_has_its_stated_size_and_hardly_any_duplicates():
  problems = documents("arithmetic")
  assert 2.7e6 < num_bytes(problems) < 3.3e6
  assert len({one.text for one in problems}) > 0.98 * len(problems)


def test_a_problem_depends_on_its_index_alone():
  assert corpora.problem(4) == corpora.problem(4) != corpora.problem(9)
  assert corpora.problem(0).startswith("Question: ")


@pytest.mark.parametrize("kind", range(5))
def test_every_step_is_correct_and_leads_to_the_answer(kind):
  for index in range(kind, 2000, 5):
    text = corpora.problem(index)
    assert text.isascii()
    question, *steps, answer = text.rstrip("\n").split("\n")
    assert question.startswith("Question: ") and re.fullmatch(r"Answer: -?\d+", answer)
    answer = int(answer.removeprefix("Answer: "))
    equations = re.findall(r"(-?\d+(?: [-+*/] \d+)+) = (-?\d+)", "\n".join(steps))
    assert equations, text
    for left, right in equations:
      assert eval(left) == int(right), text
    assert int(equations[-1][1]) == answer, text
    if kind != 3:  # kind 3 asks in words, all others with a formula
      formula = re.search(r"[-(\d][-+*() \d]*\d\)?", question).group()
      assert eval(formula) == answer, text


def test_the_digits_written_in_an_addition_form_its_result():
  for index in range(0, 500, 5):
    text = corpora.problem(index)
    digits = "".join(reversed(re.findall(r"write (\d)", text)))
    carried = "".join(re.findall(r"The last carry gives (\d)", text))
    assert int(carried + digits) == int(text.split("Answer: ")[1])
