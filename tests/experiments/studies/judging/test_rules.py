"""The hash of code changes with what it does, and with nothing else."""

import ast

import pytest

from experiments.studies.judging import rules
from experiments.studies.runner import judging

PLAIN = 'def f(x, y=1):\n  return x + y\n'


def hashed(source: str) -> str:
  return rules._dump(ast.parse(source))


@pytest.mark.parametrize("source", [
    'def f(x, y=1):\n  """Adds."""\n  return x + y\n',
    "def f(x, y = 1):  # adds\n    return (x + y)\n",
    '"""A module."""\n\ndef f(x, y=1):\n  return x + y'])
def test_wording_and_layout_do_not_change_it(source):
  assert hashed(source) == hashed(PLAIN)


@pytest.mark.parametrize("source", [
    "def f(x, y=2):\n  return x + y\n", "def f(x, y=1):\n  return x - y\n",
    "def f(x, *, y=1):\n  return x + y\n", "def f(x, y=1):\n  return y + x\n",
    'def f(x, y=1):\n  x = "Adds."\n  return x + y\n', "def f(x, y=None):\n  return x + y\n"])
def test_whatever_the_code_does_changes_it(source):
  assert hashed(source) != hashed(PLAIN)


def test_functions_and_modules_are_hashed_alike_each_time():
  assert judging() == judging() and len(judging()) == 16
  assert rules.syntax_hash([hashed]) != rules.syntax_hash([rules])
