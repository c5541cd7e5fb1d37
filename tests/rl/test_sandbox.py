"""A program passes exactly if its functions return what the tests expect, whatever else it tries.

Tests of hostile programs run in every type of sandbox that works on this machine. Tests of how
values cross between the processes run on any machine.
"""

import ast
import functools
import gzip
import json
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import pytest

from rl import sandbox
from rl.sandbox_child import Wire

LIMITS = {"timeout_s": 10, "memory_mb": 256}
TIGHT = {"timeout_s": 1, "memory_mb": 128}
TEARDOWN_S = 5
SECRET = "assert f(3) == 918273645"


def passes(program, tests, limits=LIMITS, **kwargs):
  return sandbox.passes(program, tests, **limits, **kwargs)


def judged(program, tests):
  """Judges a harmless program without a sandbox; the process that runs the tests is the same."""
  return passes(program, tests, allow_unsandboxed=True)


@functools.cache
def tried(backend):
  return sandbox._tried(getattr(sandbox, f"_{backend}"))


@pytest.fixture(params=["bubblewrap", "unshare"])
def backend(request, monkeypatch):
  prefix, reason = tried(request.param)
  if reason:
    pytest.skip(reason)
  monkeypatch.setattr(sandbox, "_working_sandbox", lambda: (prefix, ""))
  return request.param


@pytest.fixture(scope="module")
def sandboxed():
  """Skips a test without a working sandbox; for what processes do, not what a sandbox prevents."""
  prefix, reasons = sandbox._working_sandbox()
  if prefix is None:
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
  passes = sandbox.passes
  monkeypatch.setattr(sandbox, "passes", lambda *pair, **limits: run.append(pair) or passes(
      *pair, **limits))
  correct, empty = ("def f(): return 1", "assert f() == 1"), (" \n", "assert f() == 1")
  assert sandbox.passes_many([correct, empty, correct], **LIMITS) == [True, False, True]
  assert run == [correct]


@pytest.mark.parametrize("program, tests", [
    ("def f(x): return 1", ""),
    ("def f(x): return 1", "def check(candidate):\n  assert candidate(1) == 1"),
    ("def f(x): return 1", "assert f(1) == "),
    ("def f(x) return 1", "assert f(1) == 1"),
    ("def g(x): return 1", "assert f(1) == 1"),
    ("def f(x): return 1", "assert f(1) == 1\nassert missing"),
    ("def f(x): return 1", "assert f(1) == 1\nraise SystemExit(0)"),
    ("def f(x): return 1", "assert f(1) == 1\nimport os\nos._exit(0)"),
    ("def f(x): return 1", "assert f(open) == 1"),
    ("N = 1\ndef f(x): return 1", "assert f(1) == 1\nassert N == 1 or N != 1"),
    ("f = '\ud800'", "assert f(1) == 1"),
], ids=["empty", "check never called", "broken tests", "broken program", "no such function",
        "missing name", "tests exit", "tests exit hard", "not plain argument",
        "not a function", "not a text"])
def test_a_program_whose_tests_do_not_complete_does_not_pass(program, tests):
  assert not judged(program, tests)


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
  passed = sandbox.passes_many([(program, SECRET) for program in HOSTILE.values()],
                               workers=workers, **TIGHT)
  assert [name for name, ok in zip(HOSTILE, passed, strict=True) if ok] == []
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
  marker = f"marker-{os.getpid()}-{backend}"
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
  marker = f"orphan-{os.getpid()}-{backend}"
  program = f"import os\nos.execv('/usr/bin/tail', ['{marker}', '-f', '/usr/bin/env'])"
  trainer = subprocess.Popen(
      [sys.executable, "-c", f"""
from rl import sandbox
prefix = sandbox._{backend}()
sandbox._working_sandbox = lambda: (prefix, "")
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


def without_sandboxes(monkeypatch, *make):
  def missing():
    raise FileNotFoundError("no such tool")
  for name, found in zip(("_bubblewrap", "_unshare"), (*make, missing, missing), strict=False):
    monkeypatch.setattr(sandbox, name, found)
  uncached = sandbox._working_sandbox.__wrapped__
  monkeypatch.setattr(sandbox, "_working_sandbox", uncached)


def test_without_a_sandbox_programs_are_refused_unless_explicitly_allowed(monkeypatch):
  without_sandboxes(monkeypatch)
  with pytest.raises(ValueError, match=r"no such tool.*Install bubblewrap.*allow_unsandboxed"):
    passes("def f(x): return 1", "assert f(1) == 1")
  assert judged("def f(x): return 1", "assert f(1) == 1")
  assert not judged("def f(x): return 2", "assert f(1) == 1")
  assert not passes("def f(x):\n  while True: pass", "assert f(1)", TIGHT, allow_unsandboxed=True)


def test_a_tool_that_does_not_isolate_is_not_accepted_as_a_sandbox(monkeypatch):
  without_sandboxes(monkeypatch, lambda: ["/usr/bin/env"], lambda: ["/usr/bin/false"])
  with pytest.raises(ValueError, match=r"env.*does not isolate.*false.*does not isolate"):
    passes("def f(x): return 1", "assert f(1) == 1")


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
