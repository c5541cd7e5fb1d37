"""A program passes exactly if its functions return what the tests expect, whatever else it tries.

Tests of hostile programs run in every type of sandbox that works on this machine. Tests of how
values cross between the processes run on any machine.

With the extra `sandbox`, with bubblewrap 0.8 or newer, and with a Python that the user nobody may
read (or as another user than root), all types of sandboxes are tested.
"""

import ast
import dataclasses
import functools
import gzip
import json
import math
import os
import pathlib
import platform
import re
import signal
import socket
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from rl import isolation, sandbox
from rl.sandbox_child import ABSENT, MAX_MESSAGE, Wire

LIMITS = {"timeout_s": 10, "memory_mb": 256}
TIGHT = {"timeout_s": 1, "memory_mb": 128}
TEARDOWN_S = 5
SECRET = "assert f(3) == 918273645"


def passes(program, tests, limits=LIMITS, **kwargs):
  return sandbox.passes(program, tests, **limits, **kwargs)


def judged(program, tests):
  """Judges a harmless program without a sandbox; the process that runs the tests is the same."""
  return passes(program, tests, allow_unsandboxed=True)


def judge(program, tests, limits=LIMITS, **kwargs):
  return sandbox.judge(program, tests, **limits, **kwargs)


BACKENDS = {
    "bubblewrap": lambda: isolation.bubblewrap(),
    "bubblewrap without nested namespaces": lambda: isolation.bubblewrap(nests=False),
    "bubblewrap with a filter": lambda: isolation.bubblewrap(
        bpf=isolation.filter_of_system_calls()),
    "bubblewrap with both": lambda: isolation.bubblewrap(
        nests=False, bpf=isolation.filter_of_system_calls()),
    "unshare": lambda: isolation.unshare(),
}


@functools.cache
def tried(name):
  if name in ("bubblewrap with a filter", "bubblewrap with both") and (
      not isolation.filter_of_system_calls()):
    return None, "the extra sandbox, or libseccomp, is not installed"
  return sandbox._tried(BACKENDS[name])


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
  made, reason = tried(request.param)
  if reason:
    pytest.skip(reason)
  monkeypatch.setattr(sandbox, "_working_sandbox", lambda: (made, ""))
  return request.param


@pytest.fixture(scope="module")
def sandboxed():
  """Skips a test without a working sandbox; for what processes do, not what a sandbox prevents."""
  found, reasons = sandbox._working_sandbox()
  if found is None:
    pytest.skip(reasons)


def running(marker):
  """Whether any process of this machine, in any namespace, has the marker as an argument."""
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      if marker.encode() in path.read_bytes().split(b"\0"):
        return True
    except OSError:
      continue
  return False


def gone(marker):
  deadline = time.monotonic() + TEARDOWN_S
  while running(marker) and time.monotonic() < deadline:
    time.sleep(0.02)
  return not running(marker)


def describe(value):
  """Returns a text that, unlike ==, distinguishes types, signs of zero and NaN; sorts sets."""
  if isinstance(value, set | frozenset):
    return f"{type(value)} {sorted(map(describe, value))}"
  if isinstance(value, dict):
    return f"dict {[(describe(k), describe(x)) for k, x in value.items()]}"
  return f"{type(value)} {[*map(describe, value)]}" if type(value) in (list, tuple) else repr(value)


# In the style of HumanEval: program, tests, and an edit that makes the program incorrect.
CASES = {
    "numbers": (
        "def f(a, b=1):\n  return a * 2 + b",
        "def check(candidate):\n  assert candidate(2) == 5\n  assert candidate(2, b=3) == 7\n"
        "check(f)",
        ("* 2", "* 3")),
    "floats": (
        "import math\ndef area(r):\n  return math.pi * r ** 2",
        "def check(candidate):\n  assert abs(candidate(2.0) - 12.566370614) < 1e-6\ncheck(area)",
        ("** 2", "* 2.1")),
    "helpers": (
        "def double(x):\n  return 2 * x\ndef half(x):\n  return x // 2",
        "def check(candidate):\n  for i in range(20):\n    assert candidate(double(i)) == i\n"
        "check(half)",
        ("x // 2", "x // 3")),
    "comparison": (
        "def largest(xs):\n  best = xs[0]\n  for x in xs:\n    if x > best: best = x\n"
        "  return best",
        "assert largest([1, 5, 2]) == 5\nassert largest([-3]) == -3",
        ("x > best", "x < best")),
    "containers": (
        "def group(words):\n  out = {}\n  for w in words: out.setdefault(len(w), []).append(w)\n"
        "  return out, set(out)",
        "assert group(['a', 'bb', 'c']) == ({1: ['a', 'c'], 2: ['bb']}, {1, 2})\n"
        "assert isinstance(group([]), tuple)",
        ("len(w)", "len(w) + 1")),
    "arguments changed in place": (
        "def push(xs, x):\n  xs.append(x)\n  return xs",
        "xs = [1]\nassert push(xs, 2) is xs\nassert xs == [1, 2]",
        ("xs.append(x)", "xs = [*xs, x]")),
    "exceptions": (
        "def root(x):\n  if x < 0: raise ValueError('negative')\n  return x ** 0.5",
        "try:\n  root(-1)\n  assert False\nexcept ValueError as e:\n  assert 'neg' in str(e)\n"
        "assert root(4) == 2",
        ("x < 0", "x < -2")),
    "dataclasses": (
        "import dataclasses\n@dataclasses.dataclass\nclass P:\n  x: int\n"
        "def f(x):\n  return P(x).x",
        "assert f(4) == 4", ("P(x).x", "P(x).x + 1")),
}


@pytest.mark.parametrize("case", CASES)
def test_correct_programs_pass_and_incorrect_ones_do_not(case):
  program, tests, (correct, incorrect) = CASES[case]
  assert correct in program
  assert judged(program, tests)
  assert not judged(program.replace(correct, incorrect), tests)


def test_many_programs_are_judged_in_order(sandboxed):
  pairs = [(f"def f(x): return x + {i % 2}", SECRET.replace("918273645", "4")) for i in range(6)]
  assert sandbox.passes_many(pairs, **LIMITS, workers=3) == [False, True] * 3


def test_equal_pairs_are_run_once_and_empty_programs_never(monkeypatch, sandboxed):
  run = []
  original = sandbox.judge
  monkeypatch.setattr(sandbox, "judge", lambda *pair, **limits: run.append(pair) or original(
      *pair, **limits))
  correct, empty = ("def f(): return 1", "assert f() == 1"), (" \n", "assert f() == 1")
  assert sandbox.passes_many([correct, empty, correct], **LIMITS) == [True, False, True]
  assert run == [correct]


@pytest.mark.parametrize("program, tests", [
    ("def f(x) return 1", "assert f(1) == 1"),
    ("def g(x): return 1", "assert f(1) == 1"),
    ("def g(x): return 1", "try: f(1)\nexcept NameError: pass"),
    ("def f(x): return 1", "assert f(1) == 1\nassert missing"),
    ("def f(x): return 1", "assert f(1) == 1\nraise SystemExit(0)"),
    ("def f(x): return 1", "assert f(open) == 1"),
    ("def f(x): return ')'", "assert eval(f(1)) == 1"),
    ("import numpy\ndef f(x): return 1", "assert f(1) == 1"),
    ("def f(x): import numpy", "assert f(1) == 1"),
    ("N = 1\ndef f(x): return 1", "assert f(1) == 1\nassert N == 1 or N != 1"),
    ("f = '\ud800'", "assert f(1) == 1"),
], ids=["broken program", "no such function", "never called", "missing name", "tests exit",
        "not plain argument", "result is no expression", "missing module", "missing module in call",
        "not a function", "not a text"])
def test_a_program_whose_tests_do_not_complete_fails(program, tests):
  assert judge(program, tests, allow_unsandboxed=True) == (False, "")


BROKEN = {
    "empty": (" ", "they are empty"),
    "no asserts": ("# todo", "they call no function"),
    "check never called": ("def check(candidate):\n  assert candidate(1) == 1",
                           "they call no function"),
    "calls only builtins": ("import math\nassert math.isclose(sum([1]), 1)",
                            "they call no function"),
    "syntax": ("assert f(1) == ", "SyntaxError: invalid syntax (tests, line 1)"),
    "indentation": ("assert f(1) == 1\n  assert f(2)", "IndentationError"),
    "null byte": ("assert f(1) == 1\0", "null bytes"),
    "too deep": ("assert f(1) == " + "(" * 1000 + "1" + ")" * 1000, "Error"),
    "missing module": ("import numpy as np\nassert f(1) == 1", "No module named 'numpy'"),
    "missing module in a function": (
        "def check(f):\n  assert f(1) == 1\n  import numpy\ncheck(f)", "No module named 'numpy'"),
    "an error before any call": ("expected = {}['x']\nassert f(1) == expected", "KeyError: 'x'"),
    "exit without a verdict": ("assert f(1) == 1\nimport os\nos._exit(0)", "status 0"),
    "no pairs": ([], "should be Python source, or a list of"),
    "missing": (None, "not NoneType"),
    "a number": (7, "not int"),
    "bytes": (b"assert f(1) == 1", "not bytes"),
    "pair without output": ([{"input": "1", "output": "1"}, {"input": "1"}], "but item 1 is"),
    "pair of numbers": ([{"input": 1, "output": 1}], "but item 0 is"),
    "pair of lists": ([["1", "1"]], "but item 0 is"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tests_are_not_the_programs_fault(case):
  tests, reason = BROKEN[case]
  passed, why = judge("def f(x): return 1", tests, allow_unsandboxed=True)
  assert passed is None and reason in why
  with pytest.raises(ValueError, match=re.escape(reason)):
    judged("def f(x): return 1", tests)


def test_one_row_with_broken_tests_does_not_stop_the_others(sandboxed, caplog):
  pairs = [("def f(x): return 1", tests) for tests in ("assert f(1) == 1", "assert f(1) ==", [])]
  sandbox._warn_once.cache_clear()
  verdicts = sandbox.judge_many(pairs, **LIMITS)
  assert [verdict.passed for verdict in verdicts] == [True, None, None]
  with pytest.raises(ValueError, match=r"program 1: the tests are broken: SyntaxError"):
    sandbox.passes_many(pairs, **LIMITS)
  assert caplog.text.count("SyntaxError") == 1


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers()
    | st.text(st.characters(codec=None, exclude_categories=[])) | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple)
    | st.dictionaries(st.text() | st.integers(), inner) | st.sets(st.integers())
    | st.frozensets(st.text()) | st.binary().map(bytearray), max_leaves=12)


@hypothesis.given(PLAIN)
@hypothesis.settings(max_examples=80, deadline=None)
def test_plain_values_cross_between_processes_unchanged(value):
  assert describe(Wire().decode(Wire().encode(value))) == describe(value)


def test_integers_too_long_for_decimal_notation_cross_between_processes():
  assert judged("def f(n):\n  return n ** n", "assert f(5000) == 5000 ** 5000")


def test_shared_references_and_cycles_cross_between_processes():
  inner = [1]
  copy = Wire().decode(Wire().encode([inner, inner, {"k": inner}]))
  assert copy[0] is copy[1] is copy[2]["k"]
  inner.append(inner)
  copy = Wire().decode(Wire().encode(inner))
  assert copy[1] is copy


LINES = st.sampled_from(["n", "b1", "i0x1", "fnan", "s\\n", "y00", "@0", "@1", "@-1", "=list 2 0",
                         "=list 1 1", "=dict 2 0", "=set 1 0", "=tuple 1 ", "=list 99 0",
                         "=type 1 0", "=bytearray 1 0", "", "q", "=", "izz", "s\\N{bad}"])


@hypothesis.given(st.lists(LINES, max_size=8).map("\n".join))
@hypothesis.settings(max_examples=200, deadline=None)
def test_a_message_is_either_decoded_to_plain_values_or_refused(message):
  try:
    value = Wire().decode(message.encode())
  except Exception:
    return
  Wire().encode(value)


@pytest.mark.parametrize("program", [
    "class E:\n  __eq__ = lambda self, other: True\ndef f(x): return E()",
    "class E:\n  __eq__ = lambda self, other: True\ndef f(x): return [E()]",
    "class E(int):\n  __eq__ = lambda self, other: True\n  __hash__ = int.__hash__\n"
    "def f(x): return E()",
    "class E(list):\n  __eq__ = lambda self, other: True\ndef f(x): return E()",
    "def f(x): return type('E', (), {'__eq__': lambda *_: True, '__class__': int})()",
], ids=["object", "inside a list", "int", "list", "disguised"])
@pytest.mark.parametrize("tests", ["assert f(3) == 1", "assert f(3) != 1 or True",
                                   "try: f(3)\nexcept Exception: pass"])
def test_only_values_of_exact_builtin_types_are_accepted_from_a_program(program, tests):
  assert not judged(program, tests)


def test_a_program_cannot_replace_what_the_tests_call():
  program = "def f(x): return 0\ndef abs(x): return 0\ndef isinstance(*_): return True\n"
  assert not judged(program, "assert abs(f(1) - 5) < 1e-6")
  assert not judged(program, "assert isinstance(f(1), str)")
  assert not judged(program + "def check(f): pass", "def check(c):\n  assert c(1) == 5\ncheck(f)")


RAISED = {
    "builtin": ("raise KeyError('k')",
                "except KeyError as e: assert type(e) is KeyError and e.args == ('k',)"),
    "several arguments": ("raise ValueError('a', 1, [2])",
                          "except ValueError as e: assert e.args == ('a', 1, [2])"),
    "no argument": ("raise IndexError", "except LookupError as e: assert e.args == ()"),
    "arguments that are not plain": ("raise ValueError(f, 1)",
                                     "except ValueError as e: assert e.args[1] == 1"),
    "standard library": (
        "import json\n  json.loads('{')",
        "except ValueError as e:\n"
        "    assert type(e).__name__ == 'JSONDecodeError' and e.pos == 1 and 'column 2' in str(e)"),
    "arithmetic": ("import decimal\n  decimal.Decimal(1) / 0", "except ZeroDivisionError: pass"),
    "of two builtin types": ("import io\n  raise io.UnsupportedOperation('no')",
                             "except OSError as e: assert isinstance(e, ValueError)"),
    "file": ("open('missing')",
             "except FileNotFoundError as e:\n"
             "    assert (e.errno, e.filename) == (2, 'missing') and 'missing' in str(e)"),
    "unicode": ("b'\\xff'.decode()",
                "except UnicodeDecodeError as e: assert (e.start, e.object) == (0, b'\\xff')"),
    "import": ("import nothing",
               "except ImportError as e: assert e.name == 'nothing'"),
    "attribute": ("(1).x", "except AttributeError as e: assert e.name == 'x'"),
    "syntax": ("compile('1 +', 'a', 'eval')", "except SyntaxError as e: assert e.lineno == 1"),
    "exit": ("raise SystemExit(3)", "except SystemExit as e: assert e.code == 3"),
    "group": ("raise ExceptionGroup('many', [ValueError(1)])",
              "except Exception as e: assert 'many' in str(e)"),
    "of the program": ("raise Full(3, 'x')",
                       "except ValueError as e:\n    assert type(e).__name__ == 'Full'\n"
                       "    assert (e.size, e.args, str(e)) == (3, (3, 'x'), 'full: 3')"),
    "no builtin type but Exception": (
        "class E(Exception): pass\n  raise E('why')",
        "except (ValueError, RuntimeError): assert False\n"
        "  except Exception as e: assert str(e) == 'why'"),
}
FULL = """
class Full(IndexError, ValueError):
  def __init__(self, size, _):
    self.size = size
  def __str__(self):
    return f'full: {self.size}'
"""


@pytest.mark.parametrize("case", RAISED)
def test_exceptions_keep_their_builtin_types_arguments_and_attributes(case):
  raising, handler = RAISED[case]
  program = f"{FULL}\ndef f():\n  {raising}\n"
  tests = f"def check(f):\n  try:\n    f()\n  {handler}\n  else:\n    assert False\ncheck(f)"
  assert judged(program, tests)
  assert not judged("def f(): return 1", tests)
  assert not judged("def f(): raise Warning('another')", tests.replace("Exception", "TypeError"))


def test_an_exception_that_the_tests_do_not_expect_fails_them():
  for raised in ("ValueError(1)", "ImportError", "SystemExit(0)", "KeyboardInterrupt",
                 "ModuleNotFoundError('x')", "SystemExit(87)"):
    verdict = judge(f"def f(x): raise {raised}", "assert f(1) == 1", allow_unsandboxed=True)
    assert verdict == (False, "")


def test_stop_iteration_of_a_program_does_not_end_the_loops_of_its_tests():
  tests = "assert all(map(lambda x: f(x) == x, range(3)))"
  assert judged("def f(x): return x", tests)
  for raised in ("StopIteration", "StopAsyncIteration", "GeneratorExit",
                 "type('E', (StopIteration,), {})"):
    assert not judged(f"def f(x): raise {raised}", tests)


@pytest.mark.parametrize("raised", [
    "type('SkipTest', (Exception,), {'__module__': 'unittest.case'})()",
    "type('ValueError', (Exception,), {})()", "type('E', (BaseException,), {})()",
    "type('E', (Exception,), {'__str__': lambda self: 'x' * (20 << 20)})()",
    "type('E', (Exception,), {'__str__': lambda self: 1})()",
    "type('E', (ValueError,), {'__class__': AssertionError})()"])
def test_no_exception_of_a_program_is_more_than_it_derives_from(raised):
  tests = "import unittest\ntry:\n  f(1)\nexcept (unittest.SkipTest, AssertionError, OSError): pass"
  assert judge(f"def f(x): raise {raised}", tests, allow_unsandboxed=True) == (False, "")


SUM = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "4\n5\n6\n", "output": "15"}]
SCRIPTS = {
    "input()": "n = int(input())\nfor _ in range(n):\n  print(sum(map(int, input().split())))",
    "lines": "import sys\nnext(sys.stdin)\nfor line in sys.stdin:\n"
             "  print(sum(map(int, line.split())))",
    "file 0": "_, *rows = open(0).read().splitlines()\nfor row in rows:\n"
              "  print(eval(row.replace(' ', '+')))",
    "buffers": "import sys\nread = sys.stdin.buffer.readline\nfor _ in range(int(read())):\n"
               "  sys.stdout.buffer.write(b'%d\\n' % sum(map(int, read().split())))",
    "descriptors": "import os\n_, *rows = os.read(0, 1 << 20).split(b'\\n')\nfor row in rows:\n"
                   "  if row: os.write(1, b'%d\\n' % sum(map(int, row.split())))",
    "main": "def main():\n  for _ in range(int(input())):\n"
            "    print(sum(map(int, input().split())))\n"
            "if __name__ == '__main__':\n  main()\n  exit()",
    "spaces": "n = int(input())\nfor _ in range(n):\n"
              "  print(sum(map(int, input().split())), end='  \\r\\n')\nprint('\\n')",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_read_stdin_and_pass_by_what_they_print(script):
  pairs = [{"input": "2\n1 2\n30 4\n", "output": "3\n34\n"}, {"input": "0\n", "output": ""}]
  assert judged(SCRIPTS[script], pairs)
  assert not judged(SCRIPTS[script], [*pairs, {"input": "1\n1 1\n", "output": "3\n"}])


@pytest.mark.parametrize("script, passed", [
    (SUM, True), (SUM + "\nimport sys; sys.exit(0)", True), (SUM + "\nsys.exit(1)", False),
    (SUM + "\nraise ValueError", False), (SUM.replace("sum", "max"), False), ("print(3)", False),
    ("print(3) if", False), ("print(3 if input() == '1 2' else 16)", False), ("\ud800", False),
    (SUM.replace("print(", "print('', "), False), (SUM + "\nprint(0)", False), (" ", False),
    (SUM + "\nprint('x', file=sys.stderr)", True),
], ids=["sum", "exits", "exits with 1", "raises", "wrong", "one right", "syntax", "other wrong",
        "not a text", "leading space", "more output", "empty", "stderr"])
def test_a_script_passes_if_all_outputs_are_equal_and_it_ends_with_status_0(script, passed):
  [verdict] = sandbox.judge_many([(script, PAIRS)], allow_unsandboxed=True, **LIMITS)
  assert verdict == (passed, "")


def test_text_of_any_language_and_large_inputs_reach_a_script():
  assert judged("print(input()[::-1])", [{"input": "äß 数\n", "output": "数 ßä"}])
  big = " ".join(map(str, range(400_000)))
  assert judged(SUM, [{"input": big, "output": str(sum(range(400_000)))}])
  assert judged("print('7' * (1 << 20))", [{"input": "", "output": "7" * (1 << 20)}])
  passed, reason = judge(SUM, [{"input": "", "output": "7" * (MAX_MESSAGE + 1)}],
                         allow_unsandboxed=True)
  assert passed is None and "item 0 is longer" in reason


HOSTILE_SCRIPTS = {
    "prints without end": "while True: print('x' * 10 ** 6)",
    "loops": "while True: pass",
    "sleeps": "import time; time.sleep(60)",
    "closes its output and sleeps": "import os, time\nos.closerange(0, 64)\ntime.sleep(60)",
    "writes that it is ready": "import os; os.write(1, b'\\0ready\\n')",
    "exits as the judge would": "import os; os._exit(87)",
    "exits as without a sandbox": "import os; os._exit(1)",
    "kills itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "truncates its output": "import os\nfor fd in (0, 1):\n  try: os.ftruncate(fd, 0)\n"
                            "  except OSError: pass",
    "allocates": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "prints its environment": "import sys, os\nprint(sys.argv, dict(os.environ), vars())",
}


def test_no_hostile_script_passes_hangs_or_avoids_a_verdict(sandboxed):
  begun = time.monotonic()
  verdicts = sandbox.judge_many([(script, [{"input": "", "output": "918273645"}])
                                 for script in HOSTILE_SCRIPTS.values()], workers=4, **TIGHT)
  assert [(name, verdict) for name, verdict in zip(HOSTILE_SCRIPTS, verdicts, strict=True)
          if verdict != (False, "")] == []
  rounds = math.ceil(len(HOSTILE_SCRIPTS) / 4)
  assert time.monotonic() - begun < rounds * (TIGHT["timeout_s"] + 1)


def test_scripts_run_in_every_sandbox(backend):
  assert passes(SUM, PAIRS)
  assert not passes(SUM.replace("sum", "max"), PAIRS)
  assert not passes("import os; print(3); os._exit(1)", PAIRS[:1])


ROW = {"prompt": "def encode(s: str):\n  return s[::-1]\n\n\ndef decode(s: str):\n  '''Undo.'''\n",
       "entry_point": "decode",
       "test": "def check(candidate):\n  for s in ('ab', 'cde'):\n"
               "    assert candidate(encode(s)) == s\n"}


def test_tests_call_the_helpers_of_a_humaneval_prompt_not_the_programs():
  assert judged(*sandbox.humaneval_case(ROW, "  return s[::-1]\n"))
  assert not judged(*sandbox.humaneval_case(ROW, "  return s\ndef encode(s):\n  return s\n"))


LOOK = """
import gc, os, re, sys
def found(thing):
  return isinstance(thing, int) and thing > 10 ** 8 and thing < 10 ** 9
def f(x):
  frame, seen = sys._getframe(), list(gc.get_objects())
  while frame:
    seen += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]
    frame = frame.f_back
  seen += [c for o in list(seen) if type(o) is type(f.__code__) for c in o.co_consts]
  text = repr(os.environ) + repr(sys.argv)
  for path in ("/proc/self/mem", "/proc/1/environ", "/proc/1/cmdline"):
    try: text += open(path).read()
    except OSError: pass
  return next((x for x in [*seen, *map(int, re.findall(r"\\d{9}", text))] if found(x)), 0)
"""

HOSTILE = {
    "exits before the asserts": "import sys; sys.exit(0)",
    "exits hard": "import os; os._exit(0)",
    "exits as the judge would": "import os\ndef f(x): os._exit(87)",
    "writes to every descriptor":
        "import os\ndef f(x):\n  for fd in range(64):\n"
        "    try: os.write(fd, b'PASSED 87 True\\n')\n    except OSError: pass\n  return 0",
    "closes every descriptor": "import os\ndef f(x): os.closerange(0, 64)",
    "patches the judge":
        "import builtins, json, os, sys, unittest\nbuiltins.AssertionError = Warning\n"
        "builtins.compile = builtins.exec = builtins.all = lambda *_: True\n"
        "json.loads = lambda *_: 918273646\nunittest.TestCase.assertEqual = lambda *_: 0\n"
        "main = sys.modules['__main__'].__dict__\n"
        "main.update(FAILED=87, run_program=0, passed=True)\ndef f(x): return 0",
    "looks for the answer": LOOK,
    "recurses": "def f(x): return f(x)",
    "recurses through the interpreter": "def f(x):\n  for _ in range(10 ** 6): x = [x]\n  return x",
    "allocates": "def f(x):\n  y = []\n  while True: y.append(bytearray(1 << 24))",
    "returns too much": "def f(x): return 'x' * (40 << 20)",
    "returns many values": "def f(x): return [0] * (4 << 20)",
    "loops": "def f(x):\n  while True: pass",
    "loops when imported": "while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(60)",
    "prints without end": "import sys\ndef f(x):\n  while True: print('x' * 10 ** 6, flush=True)",
    "floods every descriptor":
        "import os\nwhile True:\n  for fd in range(16):\n    try: os.write(fd, bytes(10 ** 6))\n"
        "    except OSError: pass",
    "forks": "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    "starts threads":
        "import _thread\ndef f(x):\n  while True: _thread.start_new_thread(f, (x,))",
    "kills other processes": "import os, signal\nfor pid in (os.getppid(), 0, -1, 1):\n"
             "  try: os.kill(pid, signal.SIGKILL)\n  except OSError: pass\ndef f(x): return 0",
    "fills the disk":
        "def f(x):\n  for i in range(10 ** 6):\n    try: open(str(i), 'wb').write(bytes(10 ** 6))\n"
        "    except OSError: return i",
}


def test_no_hostile_program_passes_or_hangs(sandboxed):
  begun, workers = time.monotonic(), 4
  verdicts = sandbox.judge_many([(program, SECRET) for program in HOSTILE.values()],
                                workers=workers, **TIGHT)
  # None would be no verdict, by which a program could avoid a low reward.
  assert [(name, verdict) for name, verdict in zip(HOSTILE, verdicts, strict=True)
          if verdict != (False, "")] == []
  rounds = math.ceil(len(HOSTILE) / workers)
  assert time.monotonic() - begun < rounds * (TIGHT["timeout_s"] + 1)


def test_the_expected_answer_passes_if_returned_or_found_in_memory(sandboxed):
  assert passes("def f(x): return 918273645", SECRET)
  assert passes(LOOK.replace("def f(x):", "def f(x):\n  answer = 918273645"), SECRET)


def test_tests_that_loop_or_allocate_are_ended_too(sandboxed):
  program = "def f(x): return 1"
  assert not passes(program, "while True: f(1)", TIGHT)
  assert not passes(program, "f(1)\nx = 'x' * (1 << 30)", TIGHT)


def test_a_program_starts_no_other_process_and_none_survives_it(backend):
  marker = f"marker-{os.getpid()}-{backend}".replace(" ", "-")
  program = f"""
import os, subprocess
def f():
  ways = []
  for way in (lambda: os.fork() or os.execv("/usr/bin/env", ["{marker}", "sleep", "99"]),
              lambda: subprocess.Popen(["/usr/bin/env", "sleep", "99", "{marker}"]),
              lambda: os.posix_spawn("/usr/bin/env", ["{marker}", "sleep", "99"], {{}})):
    try:
      way()
      ways.append("started")
    except OSError:
      pass
  return ways
def become():
  os.setsid() if os.getpid() != os.getsid(0) else None
  os.execv("/usr/bin/tail", ["{marker}", "-f", "/usr/bin/env"])
"""
  assert passes(program, "assert f() == []")
  assert gone(marker)
  assert not passes(program, "become()", TIGHT)
  assert gone(marker)


def test_no_process_survives_a_killed_trainer(backend):
  marker = f"orphan-{os.getpid()}-{backend}".replace(" ", "-")
  program = f"import os\nos.execv('/usr/bin/tail', ['{marker}', '-f', '/usr/bin/env'])"
  trainer = subprocess.Popen(
      [sys.executable, "-c", f"""
from rl import isolation, sandbox
made = isolation.Sandbox(**{dataclasses.asdict(tried(backend)[0])!r})
sandbox._working_sandbox = lambda: (made, "")
sandbox.passes({program!r}, "import time; time.sleep(60); f(1)", timeout_s=60, memory_mb=128)
"""], cwd=pathlib.Path(sandbox.__file__).parent.parent)
  try:
    deadline = time.monotonic() + 20
    while not running(marker) and time.monotonic() < deadline:
      time.sleep(0.05)
    assert running(marker), "the program never started, so that the test shows nothing"
  finally:
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
  assert gone(marker)


def test_a_program_sees_neither_our_files_nor_our_environment(backend, tmp_path, monkeypatch):
  monkeypatch.setenv("SECRET_TOKEN", "hunter2")
  kept = tmp_path / "kept"
  kept.write_text("ours")
  for path in (tmp_path, kept):  # permissions must not be what protects them
    path.chmod(0o777)
  program = f"""
import os
def attempt(what):
  try: return what() or True
  except OSError: return False
def f():
  return [attempt(lambda: open({str(kept)!r}).read()),
          attempt(lambda: os.remove({str(kept)!r})),
          attempt(lambda: open({str(tmp_path / "new")!r}, "w").close()),
          attempt(lambda: open({os.__file__!r}, "a").close()),
          attempt(lambda: open({__file__!r}).close()),
          attempt(lambda: open("/etc/passwd").close()),
          attempt(lambda: os.listdir("/proc/1")),
          attempt(lambda: os.setuid(0)), attempt(lambda: os.chroot("/usr"))]
def here():
  return os.listdir(), "hunter2" in repr(os.environ), attempt(lambda: open("x", "w").close())
"""
  assert passes(program, "assert f()[:7] == [False] * 7")
  assert passes(program, "assert f()[8] is False")
  assert passes(program, "assert here() == ([], False, True)\nassert here()[0] == ['x']")
  assert passes(program, "assert here() == ([], False, True)"), "a working directory was used twice"
  assert kept.read_text() == "ours" and not (tmp_path / "new").exists()


def test_a_program_has_no_network(backend):
  with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
    local.bind(name := f"\0sandbox-{os.getpid()}-{backend}")
    local.listen()
    program = f"""
import socket
def f():
  open_to = []
  for kind, where in ((socket.AF_INET, {server.getsockname()!r}), (socket.AF_UNIX, {name!r}),
                      (socket.AF_INET, ("1.1.1.1", 53))):
    try:
      socket.socket(kind).connect(where)
      open_to.append(where)
    except OSError:
      pass
  return open_to
"""
    assert passes(program, "assert f() == []")


SYSCALL = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(number, *args):
  ctypes.set_errno(0)
  result = libc.syscall(number, *(ctypes.c_long(arg) for arg in args))
  return result == -1 and ctypes.get_errno() == errno.EPERM
"""
# Without a filter, most of these calls fail otherwise than by EPERM, or succeed and do nothing.
CALLS = {
    "mount": (0, 0, 0, 0, 0), "umount2": (0, 0), "pivot_root": (0, 0), "fsopen": (0, 0),
    "move_mount": (-1, 0, -1, 0, 0), "open_tree": (-1, 0, 0), "unshare": (0,), "setns": (-1, 0),
    "ptrace": (0, 0, 0, 0), "process_vm_readv": (1, 0, 0, 0, 0, 0), "pidfd_getfd": (-1, 0, 0),
    "perf_event_open": (0, 0, -1, -1, 0), "bpf": (0, 0, 0), "userfaultfd": (0,),
    "io_uring_setup": (1, 0), "add_key": (0, 0, 0, 0, -3), "request_key": (0, 0, 0, -3),
    "keyctl": (0, -3, 0), "init_module": (0, 0, 0), "finit_module": (-1, 0, 0),
    "kexec_load": (0, 0, 0, 0), "personality": (0xFFFFFFFF,), "shmget": (0, 4096, 0o600),
    "msgget": (0, 0o600),
}


def test_the_filter_refuses_system_calls_that_programs_do_not_need(backend):
  seccomp = isolation._binding()
  if seccomp is None:
    pytest.skip("the numbers of system calls are taken from the extra sandbox")
  names = [*CALLS, "clone3", "getpid"]
  numbers = {name: seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) for name in names}
  program = SYSCALL + f"""
def allowed():
  return [name for name, args in {CALLS}.items() if not refused({numbers}[name], *args)]
def clone3():
  libc.syscall({numbers["clone3"]}, 0, 0)
  return ctypes.get_errno() == errno.ENOSYS
def getpid():
  return libc.syscall({numbers["getpid"]})
"""
  tests = ("assert allowed() == [] and clone3()" if tried(backend)[0].filter else
           "assert len(allowed()) > 5")
  assert passes(program, tests + "\nassert getpid() > 0")


def test_the_filter_refuses_namespaces_terminal_input_and_sockets_of_other_families(backend):
  if not tried(backend)[0].filter:
    pytest.skip("this sandbox has no filter")
  seccomp = isolation._binding()
  clone, ioctl = (seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) for name in ("clone", "ioctl"))
  program = SYSCALL + f"""
import socket
def clones():
  # SIGCHLD in the low byte; RLIMIT_NPROC refuses a clone without flags by another error.
  return [flag for flag in {list(isolation._NAMESPACES.values())}
          if not refused({clone}, flag | 17, 0, 0, 0, 0)]
def plain_clone_is_refused():
  return refused({clone}, 17, 0, 0, 0, 0)
def terminal():
  return [request for request in {list(isolation._TERMINAL.values())}
          if not refused({ioctl}, 0, request) or not refused({ioctl}, 0, request | 1 << 32)]
def families():
  made = []
  for family in range(50):
    try:
      socket.socket(family, socket.SOCK_DGRAM).close()
      made.append(family)
    except OSError as error:
      assert error.errno == errno.EPERM, error
  return made
def pair():
  a, b = socket.socketpair()
  a.send(b"x")
  return b.recv(1)
"""
  assert passes(program, "assert clones() == []\nassert not plain_clone_is_refused()\n"
                         "assert terminal() == []\nassert families() == [1]\nassert pair() == b'x'")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is an interface of x86-64")
def test_the_filter_ends_programs_that_call_the_kernel_as_another_architecture(backend):
  program = "import ctypes\ndef f(x):\n  ctypes.CDLL(None).syscall(x)\n  return 1"
  getpid = 39
  assert passes(program, f"assert f({getpid}) == 1")
  ended = bool(tried(backend)[0].filter)
  assert judge(program, f"assert f({getpid | 1 << 30}) == 1") == (not ended, "")


def test_a_program_cannot_create_a_namespace_with_privileges_of_its_own(backend):
  if tried(backend)[0].nests and not tried(backend)[0].filter:
    pytest.skip("this sandbox cannot prevent it")
  program = """
import os
def made():
  done = []
  for name in dir(os):
    if name.startswith("CLONE_NEW"):
      for flags in (getattr(os, name), getattr(os, name) | os.CLONE_NEWUSER):
        try:
          os.unshare(flags)
          done.append(name)
        except OSError:
          pass
  return done
"""
  assert passes(program, "assert made() == []")


def test_programs_that_compute_run_under_the_filter(backend):
  program = """
import asyncio, collections, decimal, fractions, hashlib, heapq, itertools, json, random, re
import subprocess, tempfile, threading, time, uuid, zoneinfo
def f():
  async def wait():
    await asyncio.sleep(0.001)
    return hashlib.sha256(json.dumps([1]).encode()).hexdigest()
  with tempfile.TemporaryFile() as file:
    file.write(b"x")
  return asyncio.run(wait())[:4], str(decimal.Decimal(1) / 7)[:5], time.time() > 0
"""
  assert passes(program, "assert f()[1:] == ('0.142', True)")


def without_sandboxes(monkeypatch, *prefixes):
  def missing():
    raise FileNotFoundError("no such tool")
  makers = [functools.partial(isolation.Sandbox, tuple(prefix)) for prefix in prefixes]
  monkeypatch.setattr(isolation, "candidates",
                      lambda: [("made up", make) for make in makers or [missing]])
  monkeypatch.setattr(sandbox, "_working_sandbox", sandbox._working_sandbox.__wrapped__)


def test_without_a_sandbox_programs_are_refused_unless_explicitly_allowed(monkeypatch):
  without_sandboxes(monkeypatch)
  with pytest.raises(ValueError, match=r"no such tool.*Install bubblewrap.*allow_unsandboxed"):
    passes("def f(x): return 1", "assert f(1) == 1")
  assert judged("def f(x): return 1", "assert f(1) == 1")
  assert not judged("def f(x): return 2", "assert f(1) == 1")
  assert not passes("def f(x):\n  while True: pass", "assert f(1)", TIGHT, allow_unsandboxed=True)


def test_a_tool_that_does_not_isolate_or_start_is_not_accepted_as_a_sandbox(monkeypatch):
  without_sandboxes(monkeypatch, ["/usr/bin/env"], ["/usr/bin/false"],
                    ["/bin/sh", "-c", "echo no namespaces here >&2; exit 3"])
  with pytest.raises(ValueError, match=r"env works but does not isolate.*false ended with status 1"
                                       r".*status 3: no namespaces here.*Install bubblewrap"):
    passes("def f(x): return 1", "assert f(1) == 1")


@pytest.mark.parametrize("tests", ["assert f(1) == 1", [{"input": "", "output": ""}]],
                         ids=["asserts", "pairs"])
def test_a_sandbox_that_stops_working_is_an_error_and_no_verdict(monkeypatch, tmp_path, tests):
  works = tmp_path / "works"
  works.touch()
  broken = isolation.Sandbox(("/bin/sh", "-c", f"""
    [ -e {works} ] || {{ echo out of namespaces >&2; exit 1; }}
    exec "$@" """, "sh"))
  monkeypatch.setattr(sandbox, "_working_sandbox", lambda: (broken, ""))
  assert passes("def f(x): return 1", tests)
  works.unlink()
  for judge_it in (judge, lambda program, tests: sandbox.judge_many([(program, tests)], **LIMITS)):
    with pytest.raises(ValueError, match=r"does not work: /bin/sh.*out of namespaces.*Install"):
      judge_it("def f(x): return 1", tests)


def test_a_sandbox_that_fails_once_is_tried_again(monkeypatch, tmp_path):
  failed = tmp_path / "failed"
  # The process of the program fails the first time that it is not a trivial one's.
  flaky = isolation.Sandbox(("/bin/sh", "-c", f"""
    if [ -e {failed} ] && [ "$9" = program ]; then rm {failed}; exit 1; fi
    exec "$@" """, "sh"))
  monkeypatch.setattr(sandbox, "_working_sandbox", lambda: (flaky, ""))
  assert passes("def f(x): return 1", "assert f(1) == 1")
  failed.touch()
  assert passes("def f(x): return 1", "assert f(1) == 1")
  assert not failed.exists()


def test_limits_too_small_for_any_program_are_an_error_that_names_them(monkeypatch):
  slow = isolation.Sandbox(("/bin/sh", "-c", "sleep 0.2; exec \"$@\"", "sh"))
  monkeypatch.setattr(sandbox, "_working_sandbox", lambda: (slow, ""))
  with pytest.raises(ValueError, match=r"timeout_s=0\.1 is too short: a trivial program takes"):
    judge("def f(x): return 1", "assert f(1) == 1", {"timeout_s": 0.1, "memory_mb": 256})
  monkeypatch.setattr(sandbox, "_run_asserts", lambda *_: (ABSENT, "it did not start"))
  with pytest.raises(ValueError, match=r"memory_mb=64 \(it did not start\): raise the limit"):
    judge("def f(x): return 1", "assert f(1) == 1", {"timeout_s": 10, "memory_mb": 64})


@pytest.mark.parametrize("name, made, bpf, missing", [
    ("bubblewrap", isolation.Sandbox(("bwrap",), nests=True), b"",
     r"not filtered, and they can create user namespaces: install libseccomp.*pyseccomp"),
    ("bubblewrap", isolation.Sandbox(("bwrap",)), b"", "not filtered: install libseccomp"),
    ("unshare", isolation.Sandbox(("setpriv",)), b"", "bubblewrap and libseccomp.*pyseccomp"),
    ("unshare", isolation.Sandbox(("setpriv",)), b"bpf", r"bubblewrap.*cannot \(it is too old\)"),
    ("bubblewrap", isolation.Sandbox(("bwrap",), b"bpf"), b"bpf", None),
])
def test_what_a_sandbox_lacks_is_said_once(monkeypatch, caplog, name, made, bpf, missing):
  monkeypatch.setattr(isolation, "filter_of_system_calls", lambda: bpf)
  sandbox._warn_once.cache_clear()
  for _ in range(2):
    sandbox._say_what_is_missing(name, made, ["it is too old"])
  assert len(caplog.messages) == (missing is not None)
  assert missing is None or re.search(missing, caplog.messages[0])


def test_without_libseccomp_sandboxes_have_no_filter(monkeypatch):
  monkeypatch.setattr(isolation, "_binding", lambda: None)
  monkeypatch.setattr(isolation, "filter_of_system_calls",
                      isolation.filter_of_system_calls.__wrapped__)
  assert isolation.filter_of_system_calls() == b""
  names = [(name, make.keywords.get("bpf", b"")) for name, make in isolation.candidates()]
  assert names == [("bubblewrap", b""), ("bubblewrap", b""), ("unshare", b"")]


@pytest.mark.parametrize("limits", [{"timeout_s": 0}, {"timeout_s": math.nan},
                                    {"timeout_s": math.inf}, {"memory_mb": 8}])
def test_impossible_limits_are_refused(limits):
  with pytest.raises(ValueError, match=next(iter(limits))):
    sandbox.passes("", "", **(LIMITS | limits))


class ReturnsSomethingElse(ast.NodeTransformer):
  """Makes a function return a value that no test of HumanEval expects."""

  def __init__(self, name):
    self.name = name

  def visit_FunctionDef(self, node):
    if node.name != self.name:
      return node
    return ast.parse(f"def {self.name}(*_, **__): return 'mutant'").body[0]


@pytest.mark.long("runs all of HumanEval twice")
@pytest.mark.skipif("DEEPSEEK_JAX_HUMANEVAL" not in os.environ,
                    reason="set DEEPSEEK_JAX_HUMANEVAL to the path of HumanEval.jsonl.gz")
def test_humaneval_solutions_pass_and_their_mutants_do_not():
  with gzip.open(os.environ["DEEPSEEK_JAX_HUMANEVAL"], "rt") as lines:
    rows = [json.loads(line) for line in lines]
  solutions = [sandbox.humaneval_case(row, row["canonical_solution"]) for row in rows]
  mutants = [
      (ast.unparse(ReturnsSomethingElse(row["entry_point"]).visit(ast.parse(program))), tests)
      for row, (program, tests) in zip(rows, solutions, strict=True)]
  limits = {"timeout_s": 60, "memory_mb": 512}
  names = [row["task_id"] for row in rows]
  assert len(rows) == 164
  passed = sandbox.passes_many(solutions, **limits)
  assert [name for name, ok in zip(names, passed, strict=True) if not ok] == []
  passed_mutants = sandbox.passes_many(mutants, **limits)
  assert [name for name, ok in zip(names, passed_mutants, strict=True) if ok] == []
