"""Answers are compared as numbers or as LaTeX, by one rule, and within a bound on time."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from rl.tasks import algebra
from rl.tasks.equality import is_parsable, number, same_answer

ROOT = pathlib.Path(__file__).parents[2]
HOSTILE = ["(x+y+z)^{999}", "9^{9^{9^{9}}}", "99999999!", "\\int_0^1 e^{e^{x^x}} dx"]


@pytest.mark.parametrize(("given", "gold"), [
    ("1.0\\times10^{-20}", "6.63\\times10^{-34}"), ("0.00000002", "10^{-8}"), ("0.0", "10^{-20}"),
    ("0", "1e-9"), ("\\frac{1}{3\\cdot2^{206}}", "\\frac{2^{205}+1}{3\\cdot2^{206}}"),
    ("(10^{-8},1)", "(0.00000002,1)"), ("x=0.00000002", "x=10^{-8}"),
    ("\\begin{pmatrix}0.0000002\\\\1\\end{pmatrix}", "\\begin{pmatrix}10^{-8}\\\\1\\end{pmatrix}"),
    ("10^{400}+1", "10^{400}"), ("6.626\\times10^{-34}", "6.63\\times10^{-34}")])
def test_numbers_far_from_one_are_told_apart(given, gold):
  assert same_answer(given, gold) is False
  assert same_answer(gold, gold) is True


@pytest.mark.parametrize("gold", ["1/3", "\\frac{1}{3}", "\\frac13", "\\dfrac{2}{6}",
                                  "\\frac{1}{\\sqrt{9}}"])
@pytest.mark.parametrize(("given", "verdict"), [
    ("0.333333", True), ("0.33333333", True), ("3.33333\\times10^{-1}", True), ("0.33333", False),
    ("0.33", False), ("0.333334", False), ("333333/1000000", False)])
def test_a_decimal_may_be_rounded_to_a_millionth_however_the_reference_is_written(
    given, gold, verdict):
  assert same_answer(given, gold) is verdict


@pytest.mark.parametrize(("given", "gold", "verdict"), [
    ("1.414214", "\\sqrt{2}", True), ("\\sqrt{2}", "1.414214", True), ("1.41", "\\sqrt{2}", False),
    ("3.14159", "\\pi", True), ("3.14", "\\pi", False), ("1000001", "1000000", False),
    ("1000001.0", "1000000", False), ("0.9999999", "1", False), ("7.0", "7", True),
    ("0.30000000000000004", "0.3", True), ("(0.333333, 1)", "(\\frac{1}{3}, 1)", True),
    ("50\\%", "0.5", True), ("\\sqrt{2}+\\sqrt{3}-\\sqrt{5+2\\sqrt{6}}", "0", True)])
def test_integers_are_exact_and_decimals_approximate(given, gold, verdict):
  assert same_answer(given, gold) is verdict


@pytest.mark.parametrize(("text", "value"), [
    ("0.00001", "1/100000"), ("1e-05", "1/100000"), ("1e+16", "1" + "0" * 16), ("1E3", "1000"),
    ("2.5\\times10^{-2}", "1/40"), ("3 1/2", "7/2"), ("3\\frac{1}{2}", "7/2"),
    ("-\\frac12", "-1/2"), ("1 000", "1000"), ("10{,}000", "10000"), ("10,\\!000", "10000"),
    ("７", "7"), ("－１．５", "-3/2"), ("–5", "-5"), ("−5", "-5"), ("90.", "90"),
    ("**5**", "5"), ("$1,234$.", "1234"), ("-$5", "-5"), (".5", "1/2")])
def test_numbers_are_read_exactly_however_they_are_written(text, value):
  assert str(number(text)) == value


@pytest.mark.parametrize("text", ["", "x", "1/0", "\\frac{1}{0}", "1,23", "1e99999", "٧", "e-5",
                                  "--5", "3 4", "."])
def test_other_texts_are_no_numbers(text):
  assert number(text) is None


@pytest.mark.parametrize(("given", "gold"), [
    ("90.", "90^\\circ"), ("90°", "90^\\circ"), ("2.", "x=2"), ("x = 2.", "2"), ("７", "7"),
    ("–5", "-5"), ("1e3", "1000"), ("x=1e-5", "10^{-5}"), ("$\\frac{7}{3}$.", "\\dfrac{7}{3}."),
    ("\\(x^2\\)", "$x^2$."), ("(x^2-1)^2", "(x+1)^2(x-1)^2"), ("120", "5!"),
    ("10", "\\binom{5}{2}"),
    ("\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
    ("10", "10\\text{ inches}"), ("x²", "x^2"), ("sqrt(2)", "\\sqrt{2}"), ("sin(x)", "\\sin x")])
def test_the_same_answer_is_recognised_however_it_is_written(given, gold):
  assert is_parsable(gold)
  assert same_answer(given, gold) is True
  assert same_answer("11", gold) is False


@pytest.mark.parametrize("given", HOSTILE)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_comparison_that_does_not_end_is_false_within_a_bound_and_remembered(given, in_thread):
  verdicts, began = [], time.monotonic()
  compare = lambda: verdicts.append(same_answer(given, "x+y"))
  for _ in range(2):
    began = time.monotonic()
    if in_thread:
      thread = threading.Thread(target=compare, daemon=True)
      thread.start()
      thread.join(30)
    else:
      compare()
  assert verdicts == [False, False]
  assert time.monotonic() - began < 0.5  # the second time
  assert same_answer("y+x", "x+y") is True  # by a new process


def test_a_process_that_died_is_replaced():
  assert same_answer("2x+x", "3x") is True
  for process in algebra._pool._all:
    if process._process:
      os.kill(process._process.pid, signal.SIGKILL)
      process._process.wait()
  assert same_answer("5x+x", "6x") is True
  assert same_answer("7x+x", "8x") is True


def test_comparisons_in_several_threads_do_not_mix_up_their_verdicts():
  pairs = [(f"{a}y+{b}y", f"{c}y") for a in (1, 2) for b in (1, 3) for c in (2, 3, 4, 5)]
  expected = [eval(given.replace("y", "")) == int(gold[:-1]) for given, gold in pairs]
  assert algebra.same_many(pairs * 2) == expected * 2


def test_a_forked_process_compares_by_processes_of_its_own():
  source = """if True:
    import os
    from rl.tasks.equality import same_answer
    assert same_answer("3z+z", "4z") is True
    pid = os.fork()
    if not pid:
      os._exit(0 if same_answer("4z+z", "5z") is True else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert same_answer("5z+z", "6z") is True"""
  subprocess.run([sys.executable, "-c", source], check=True, cwd=ROOT, timeout=120)
