"""Expressions are evaluated exactly, within limits, and never by Python itself."""

import fractions
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.tasks.countdown import Countdown, evaluate

COLUMNS = {"answer": "", "numbers": [3, 5, 5, 12], "target": 44}


@pytest.mark.parametrize(("text", "value"), [
    ("1+2*3", 7), ("(1+2)*3", 9), ("8-3-2", 3), ("8/4/2", 1), (" 2 * ( 3 + 4 ) ", 14),
    ("1/3*3", 1), ("7/2", fractions.Fraction(7, 2)), ("((5))", 5), ("007", 7)])
def test_expressions_are_evaluated_exactly(text, value):
  assert evaluate(text)[0] == value


_EXPRESSIONS = st.recursive(
    st.integers(0, 30).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda parts: f"({''.join(parts)})"), max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(_EXPRESSIONS)
def test_evaluation_agrees_with_python_on_random_expressions_of_the_grammar(text):
  reference = "".join(f"F({part})" if part.isdigit() else part for part in _parts(text))
  try:
    want = eval(reference, {"F": fractions.Fraction})
  except ZeroDivisionError:
    with pytest.raises(ValueError, match="zero"):
      evaluate(text)
  else:
    assert evaluate(text)[0] == want


def _parts(text):
  for sign in "+-*/()":
    text = text.replace(sign, f" {sign} ")
  return text.split()


@pytest.mark.parametrize("text", [
    "9**9**9", "9**9**9**9", "2^3", "--5", "-" * 150 + "5", "+5", "3*-5", "٣+٤", "３+４", "²", "",
    " ", "(", ")", "()", "(3+5", "3+5)", "3 5", "3+", "*3", "1/0", "5//2", "5%2", "1e9", "0x10",
    "1_0", "1.5", "f(3)", "__import__('os')", "lambda:0", "3\n+5", "(" * 100 + "1" + ")" * 100,
    "(" * 100000, "9" * 100000, "9" * 190, "*".join(["999999"] * 20), "1/999999" * 15, "44=44",
    "3+5 # 44", "[3]", "3,5", "True"])
def test_expressions_outside_the_grammar_or_limits_are_refused_quickly(text):
  start = time.perf_counter()
  with pytest.raises(ValueError):
    evaluate(text)
  assert not Countdown().check(text, COLUMNS)
  assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("answer", ["5*5+12+3+4", "44", "3*(12+5)-5-5+3", "12*3+5+3"])
def test_reaching_the_target_with_other_numbers_is_incorrect(answer):
  assert evaluate(answer)[0] == COLUMNS["target"]
  assert not Countdown().check(answer, COLUMNS)


def test_each_number_may_be_used_at_most_once():
  columns = {"numbers": [3, 5, 5, 12], "target": 17}
  answers = ["12+5", "5*5-5-3", "3*5+5-3", "5+12", "(12+5)*5/5", "12+5+3-3"]
  assert [Countdown().check(text, columns) for text in answers] == [
      True, False, False, True, False, False]
  assert Countdown().check("5+5+12/3", {"numbers": [3, 5, 5, 12], "target": 14})


def test_fractions_as_intermediate_results_are_allowed():
  assert Countdown().check("8/(3-8/3)", {"numbers": [3, 3, 8, 8], "target": 24})


@pytest.mark.parametrize("split", Countdown.splits)
def test_the_answer_of_every_problem_solves_it(split):
  task = Countdown(numbers=5)
  for index in range(50):
    problem = task.problem(split, index)
    assert task.check(problem.answer, problem.row())
    assert str(problem.columns["target"]) in problem.question
    assert problem.columns["target"] not in problem.columns["numbers"]
