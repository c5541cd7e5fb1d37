"""Tasks give the same problems each time, keep splits disjoint, and judge answers correctly."""

import collections
import dataclasses
import importlib.util
import json
import os
import random
import re
import sys
import time

import pytest

from rl import rewards
from rl.extraction import is_well_formed, strict_answer
from rl.tasks import GENERATED, Noise, get_task
from rl.tasks import gym as gym_task
from rl.tasks.columns import Columns
from rl.tasks.generated import half_of
from train.templates import get_template

SHORT = get_template("short")
PERFECT = Noise(direct=0, detailed=0.5, step_error=0, detailed_error=0, self_correction=0,
                malformed=0)
NO_SANDBOX = importlib.util.find_spec("rl.sandbox") is None
SPECS = ["arithmetic", "arithmetic:terms=4,digits=1,operators=+-*", "columns", "bilingual",
         "countdown", "programs"]
NUMERIC = ["arithmetic", "columns", "bilingual"]


def documents(task, noise, count, seed=0):
  """Yields the question and the completion of each document."""
  rng = random.Random(seed)
  for _ in range(count):
    prompt, completion = task.document(rng, noise, SHORT)
    yield prompt.removeprefix("Q: ").removesuffix("\nA:"), completion


@pytest.mark.parametrize("spec", SPECS)
def test_problems_depend_on_spec_split_and_index_alone(spec):
  task = get_task(spec)
  again = type(task)(**vars(task))
  for split in task.splits:
    assert [task.problem(split, i) for i in range(5)] == [again.problem(split, i) for i in range(5)]
  questions = {task.problem(split, i).question for split in task.splits for i in range(20)}
  assert len(questions) > 30
  other = get_task(f"{spec}{',' if ':' in spec else ':'}seed=1")
  assert other.problem("train", 0) != task.problem("train", 0)


@pytest.mark.parametrize("spec", SPECS)
def test_no_question_is_in_two_splits_whatever_the_seed(spec):
  sizes = collections.Counter()
  split_of = {}
  for seed in (0, 1):
    task = get_task(f"{spec}{',' if ':' in spec else ':'}seed={seed}")
    for split in task.splits:
      for index in range(300):
        question = task.problem(split, index).question
        assert split_of.setdefault(question, split) == split
        sizes[split] += 1
  assert min(sizes.values()) == 600


@pytest.mark.parametrize("spec", SPECS)
def test_documents_contain_questions_of_the_train_split_only(spec):
  task = get_task(spec)
  heldout = {task.problem(split, i).question for split in ("heldout", "harder")
             for i in range(300)}
  assert heldout.isdisjoint(question for question, _ in documents(task, PERFECT, 300))


@pytest.mark.parametrize("spec", [*NUMERIC, "countdown"])
def test_a_problems_row_leads_to_its_task_which_accepts_its_answer_only(spec):
  for index in range(20):
    problem = get_task(spec).problem("train", index)
    task = get_task(problem.task)
    assert task.check(problem.answer, problem.row()) is True
    assert task.check(problem.answer + "1", problem.row()) is False
    assert not task.check("", problem.row())


@pytest.mark.parametrize("operators", ["+-", "+-*"])
def test_arithmetic_answers_are_the_values_of_the_questions(operators):
  for split in ("train", "harder"):
    for index in range(100):
      problem = get_task(f"arithmetic:operators={operators}").problem(split, index)
      assert re.fullmatch(r"\d+([-+*]\d+)+", problem.question)
      assert int(problem.answer) == eval(problem.question)


def test_the_answer_to_a_story_is_the_sum_of_its_events():
  languages = set()
  for index in range(50):
    problem = get_task("bilingual:events=3").problem("train", index)
    total = 0
    for change, number, after in re.findall(r"(Then |多了|少了)?(\d+)( more| are gone)?",
                                            problem.question):
      loses = change == "少了" or after == " are gone"
      total += -int(number) if loses else int(number)
      assert total >= 0
    assert total == int(problem.answer)
    assert problem.question.isascii() == (problem.columns["language"] == "en")
    languages.add(problem.columns["language"])
  assert languages == {"en", "zh"}


def solved(task, question, completion):
  """Whether a completion's strict answer to a question of a numeric task is correct."""
  text = re.sub(r"少了(\d+)个", r"-\1", question)
  numbers = re.sub(r"(\d+) are gone", r"-\1", text)
  total = eval(question) if task.name != "bilingual" else sum(
      int(number) for number in re.findall(r"-?\d+", numbers))
  return task.check(strict_answer(completion) or "", {"answer": str(total)})


@pytest.mark.parametrize("spec", NUMERIC)
def test_documents_without_noise_are_correct_and_well_formed(spec):
  task = get_task(spec)
  for question, completion in documents(task, PERFECT, 100):
    assert solved(task, question, completion)
    assert is_well_formed(completion, thinking_opened=False)


@pytest.mark.parametrize("spec", NUMERIC)
def test_10_to_30_percent_of_documents_with_the_default_noise_are_correct(spec):
  task = get_task(spec)
  correct = [solved(task, *document) for document in documents(task, Noise(), 1500)]
  assert 0.1 < sum(correct) / len(correct) < 0.3


def test_longer_styles_of_solution_are_more_accurate():
  task, accuracies, lengths = get_task("columns"), [], []
  for direct, detailed in ((1, 0), (0, 0), (0, 1)):
    noise = Noise(direct=direct, detailed=detailed, malformed=0)
    some = list(documents(task, noise, 300))
    accuracies.append(sum(solved(task, *document) for document in some) / 300)
    lengths.append(sum(len(completion) for _, completion in some) / 300)
  assert accuracies[0] + 0.2 < accuracies[1] and accuracies[1] + 0.2 < accuracies[2]
  assert lengths[0] + 10 < lengths[1] and lengths[1] + 10 < lengths[2]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 1.0])
def test_self_corrections_are_as_frequent_as_configured(spec, fraction):
  noise = Noise(direct=0, step_error=0, self_correction=fraction, malformed=0)
  waits = [bool(re.search("^(wait|等等) ", completion.removeprefix("<think>"), re.MULTILINE))
           for _, completion in documents(get_task(spec), noise, 300)]
  # Four standard deviations of a fraction of 300 documents.
  assert abs(sum(waits) / 300 - fraction) <= 4 * (fraction * (1 - fraction) / 300) ** 0.5


@pytest.mark.parametrize("spec", NUMERIC)
def test_self_corrected_documents_are_correct(spec):
  noise = Noise(direct=0, self_correction=1, malformed=0)
  task = get_task(spec)
  assert all(solved(task, *document) for document in documents(task, noise, 100))


@pytest.mark.parametrize("spec", SPECS)
def test_no_document_is_malformed_at_fraction_0_and_every_one_is_at_fraction_1(spec):
  for fraction in (0, 1):
    noise = Noise(malformed=fraction)
    assert all(is_well_formed(completion, thinking_opened=False) != bool(fraction)
               for _, completion in documents(get_task(spec), noise, 50))


def test_documents_reason_in_either_language_whatever_that_of_the_question():
  languages = {True: [], False: []}
  for question, completion in documents(get_task("bilingual"), PERFECT, 400):
    languages[question.isascii()].append(
        rewards.language_consistency(["?"], [completion], language=["en"])[0])
  for scores in languages.values():
    assert set(scores) == {0, 1}
    assert abs(sum(scores) / len(scores) - 0.5) < 4 * (0.25 / len(scores)) ** 0.5


@pytest.mark.parametrize("values", [{"direct": 1.1}, {"malformed": -0.1},
                                    {"direct": 0.6, "detailed": 0.5}])
def test_noise_must_consist_of_probabilities(values):
  with pytest.raises(ValueError, match="Noise"):
    Noise(**values)


def column_steps(*lines, thinking_opened=False):
  completion = "<think>" * (not thinking_opened) + "\n".join(lines) + "</think>\n<answer>?</answer>"
  steps = Columns().steps(completion, {"operands": [475, 368]}, thinking_opened=thinking_opened)
  return completion, steps


def test_steps_of_a_correct_solution_are_correct():
  for lines in (("5+8+0=13", "7+6+1=14", "4+3+1=8"),
                ("5+8+0=13 write 3 carry 1", "", "7+6+1=14", "4+3+1=8 write 8 carry 0")):
    for opened in (False, True):
      completion, steps = column_steps(*lines, thinking_opened=opened)
      assert [correct for _, correct in steps] == [True] * 3
      ends = [completion[:end].rsplit(">")[-1].split("\n")[-1] for end, _ in steps]
      assert ends == [line for line in lines if line]


@pytest.mark.parametrize(("lines", "correct"), [
    (("5+8+0=12", "7+6+1=14", "4+3+1=8"), [False, True, True]),
    (("5+8+0=13", "7+6+0=13", "4+3+1=8"), [True, False, True]),
    (("5+8+0=13", "4+3+1=8"), [True, False]),
    (("5+8+0=13 write 3 carry 0",), [False]), (("5+8+0=13 write 1 carry 1",), [False]),
    (("5+8+0=12", "wait 5+8+0=13", "7+6+1=14"), [False, True, True]),
    (("wait 5+8+0=13",), [True]), (("so", "5+8+0=13"), [False, False]),
    (("5+8+0=13", "7+6+1=14", "4+3+1=8", "0+0+0=0"), [True, True, True, False])])
def test_incorrect_steps_are_detected(lines, correct):
  assert [step.right for step in column_steps(*lines)[1]] == correct


def test_steps_of_documents_are_correct_except_for_the_noise():
  task = get_task("columns")
  erroneous = dataclasses.replace(PERFECT, step_error=1, detailed_error=1)
  for noise, correct in ((PERFECT, True), (erroneous, False)):
    for question, completion in documents(task, noise, 50):
      operands = [int(number) for number in question.split("+")]
      steps = task.steps(completion, {"operands": operands})
      assert [step.right for step in steps] == [correct] * len(str(operands[0]))


def test_reference_programs_pass_their_tests():
  task = get_task("programs:conditions=2")
  for split in task.splits:
    for index in range(30):
      problem = task.problem(split, index)
      scope = {}
      exec(problem.answer, scope)
      exec(problem.columns["tests"], scope)


@pytest.mark.skipif(NO_SANDBOX, reason="rl.sandbox does not exist")
def test_programs_are_checked_in_the_sandbox():
  task = get_task("programs")
  problem = task.problem("train", 0)
  assert task.check(f"```python\n{problem.answer}\n```", problem.row())
  assert not task.check("def f(xs): return 0 if xs else 1", problem.row())
  assert not task.check("", problem.row())


@pytest.mark.skipif(NO_SANDBOX, reason="rl.sandbox does not exist")
def test_a_row_with_broken_tests_is_not_judged_and_does_not_stop_the_others():
  tests = ["assert f(2) == 4", "assert f(2) ==", [{"input": "2", "output": "4"}], [],
           [{"input": "2"}]]
  rows = [{"tests": one} for one in tests]
  function, script = "def f(x): return x * x", "print(int(input()) ** 2)"
  task = get_task("programs")
  assert task.check_all([function] * 5, rows) == [True, None, False, None, None]
  assert task.check_all([script] * 5, rows) == [False, None, True, None, None]


@pytest.mark.parametrize(("spec", "message"), [
    ("programs:memory_mb=16", r"Programs.memory_mb=16 must lie in 64\.\.65536"),
    ("programs:memory_mb=63", "memory_mb"), ("programs:memory_mb=65537", "memory_mb"),
    ("programs:timeout_s=0", "timeout_s"), ("programs:timeout_s=nan", "timeout_s"),
    ("programs:timeout_s=inf", "timeout_s"), ("programs:conditions=0", "conditions"),
    ("arithmetik", "did you mean 'arithmetic'"), ("", r"no task ''\. The tasks are"),
    ("poetry", r"no task 'poetry'\. The tasks are"),
    ("arithmetic:zzz=2", r"no field 'zzz'\. Its fields are: terms"),
    ("arithmetic:digit=2", "did you mean 'digits'"), ("arithmetic:digits=two", "should be int"),
    ("arithmetic:digits", "field=value"), ("arithmetic:digits=1,digits=2", "set twice"),
    ("arithmetic:digits=0", r"must lie in 1\.\.9"), ("arithmetic:operators=+/", "some of"),
    ("countdown:numbers=2", "numbers"), ("file:no/such.jsonl", "no such file"),
    ("gym:chain_sum:sed=1", "did you mean 'seed'")])
def test_an_invalid_spec_is_an_error_that_says_why(spec, message):
  with pytest.raises(ValueError, match=message):
    get_task(spec)


@pytest.mark.parametrize("spec", SPECS)
def test_an_unknown_split_is_an_error(spec):
  with pytest.raises(ValueError, match="has no split 'test'; it has train, heldout, harder"):
    get_task(spec).problem("test", 0)


def test_a_task_too_small_for_a_heldout_split_is_an_error():
  class Tiny(Columns):
    def key(self, drawn):
      return next(str(i) for i in range(100) if half_of(str(i)) == "train")

  Tiny().problem("train", 0)
  with pytest.raises(ValueError, match="too few problems for a split 'heldout'"):
    Tiny().problem("heldout", 0)


@pytest.fixture
def jsonl(tmp_path):
  def write(*rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return get_task(f"file:{path}")

  get_task.cache_clear()
  return write


def test_rows_of_gsm8k_are_read_without_conversion(jsonl):
  task = jsonl({"question": "How many?", "answer": "8 * <<8*200=1600>>1600\n#### 1,600"},
               {"question": "Half?", "answer": "\\frac{1}{2}"}, {"question": "Two?", "answer": 2})
  rows = [task.problem("all", i) for i in range(3)]
  assert [row.answer for row in rows] == ["1,600", "\\frac{1}{2}", "2"]
  assert [task.check(given, row.row()) for given, row in zip(("1600", "0.5", "2.0"), rows,
                                                           strict=True)] == [True] * 3
  assert task.check("8", rows[0].row()) is False
  assert task.excluded == {}


@pytest.mark.parametrize(("answer", "text", "given", "wrong"), [
    ("0.00001", "0.00001", "10^{-5}", "e-5"), ("1e16", "1" + "0" * 16, "10^{16}", "16e"),
    ("1.5", "1.5", "3/2", "1"), ("1e-300", "1e-300", "10^{-300}", "0"),
    ('"1e-05"', "1e-05", "0.00001", "e-5"), ('"\\\\dfrac{7}{3}."', "\\dfrac{7}{3}.", "7/3", "7"),
    ('"$x^2$."', "$x^2$.", "x^2", "x"), ('"(x+1)^2(x-1)^2"', "(x+1)^2(x-1)^2", "(x^2-1)^2", "x")])
def test_numbers_and_latex_of_a_file_are_read_as_they_are_meant(jsonl, answer, text, given, wrong):
  task = jsonl(f'{{"question": "?", "answer": {answer}}}')
  row = task.problem("all", 0).row()
  assert row["answer"] == text and task.excluded == {}
  assert task.check_all([text, given, wrong], [row] * 3) == [True, True, False]


def test_all_columns_of_a_file_are_passed_to_rewards_except_reserved_ones(jsonl):
  task = jsonl({"question": "?", "answer": 2, "language": "en", "level": 3, "task": "algebra"})
  assert task.problem("all", 0).row() == {
      "answer": "2", "task": task.spec, "language": "en", "level": 3}


@pytest.mark.skipif(NO_SANDBOX, reason="rl.sandbox does not exist")
def test_any_text_is_an_answer_for_rewards_that_do_not_check_it(jsonl):
  rows = [{"question": "Poem?", "answer": "Roses are red"}, {"question": "Rate?", "style": "haiku"},
          {"question": "List?", "answer": ["a", 1]}, {"question": "Two?", "answer": 2.0},
          {"question": "Write f.", "tests": "assert f(1) == 1"}]
  with pytest.raises(ValueError, match=r"1 with an unparsable.*rewards of your own: add one to "):
    jsonl(rows[0]).problem("all", 0)
  get_task.cache_clear()
  strict = jsonl(*rows, "{broken")
  assert strict.size("all") == 2
  task = get_task(strict.spec, any_answer=True)
  assert task.excluded == {"broken JSON": 1} and task.spec == strict.spec
  problems = [task.problem("all", i) for i in range(5)]
  assert [problem.answer for problem in problems] == [
      "Roses are red", "", '["a", 1]', "2.0", ""]
  assert problems[1].row() == {"answer": "", "task": task.spec, "style": "haiku"}
  assert task.check_all(["Roses are red", "", "2"], [
      problems[i].row() for i in (0, 1, 3)]) == [None, None, True]


def test_rows_with_tests_and_without_an_answer_are_programming_problems(jsonl):
  task = jsonl({"question": "square", "tests": "assert f(3) == 9"},
               {"question": "double", "tests": ["assert f(3) == 6", "assert f(1) == 2"]},
               {"question": "neither"})
  rows = [task.problem("all", i).row() for i in range(2)]
  assert task.size("all") == 2 and task.excluded == {"without an answer": 1}
  programs = ["def f(x): return x * x", "```python\ndef f(x): return 2 * x\n```"]
  assert task.check_all(programs, rows) == [True, True]
  assert task.check_all(programs[::-1], rows) == [False, False]
  reward = rewards.unit_tests()(["?"] * 2, [f"<answer>{text}</answer>" for text in programs],
                                tests=[row["tests"] for row in rows])
  assert reward == [1, 1]


def test_the_seed_decides_the_order_of_a_file_but_not_its_splits(jsonl):
  task = jsonl(*({"question": f"{i}?", "answer": str(i)} for i in range(100)))
  other = get_task(f"{task.spec}:seed=1")
  questions = lambda task, split: [task.problem(split, i).question for i in range(task.size(split))]
  for split in ("train", "heldout"):
    orders = [questions(task, split), questions(other, split)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0], key=lambda text: int(text[:-1]))
  assert questions(task, "all") == questions(other, "all") == [f"{i}?" for i in range(100)]
  problem = other.problem("train", 0)
  assert get_task(problem.task) is other and problem.task.endswith(":seed=1")


def test_bad_rows_are_excluded_and_counted(jsonl):
  good = {"question": "Two?", "answer": "2"}
  task = jsonl(good, "{broken", "[1]", {"question": "Q"}, {"question": "Q", "answer": "so\n####"},
               {"question": "Q", "answer": "#### dunno"}, {"answer": "2"}, "", good)
  assert task.size("all") == 2
  assert task.excluded == {"broken JSON": 1, "not a JSON object": 1, "without a question": 1,
                           "without an answer": 2, "with an unparsable answer": 1}


def test_strange_rows_are_excluded_and_a_byte_order_mark_is_not_part_of_the_first(jsonl):
  good = {"question": "Two?", "answer": "2"}
  task = jsonl("\ufeff" + json.dumps(good), "[" * 200_000, {"question": "\ud800", "answer": "2"},
               {"question": "Q", "answer": "\ud800"})
  assert task.size("all") == 1
  assert task.excluded == {"broken JSON": 1, "invalid UTF-8": 2}


PROGRAM_ROWS = [
    {"question": "Write f(x), the square of x.", "tests": "assert f(3) == 9",
     "answer": "def f(x): return x * x"},
    {"question": "Print the square of each line's number.",
     "tests": [{"input": "3\n4\n", "output": "9\n16\n"}, {"input": "", "output": ""}],
     "answer": "import sys\nfor line in sys.stdin: print(int(line) ** 2)"},
    {"question": "Three squared?", "answer": "9"}]


def test_rows_with_tests_are_problems_of_programming_beside_others(jsonl):
  task = jsonl(*PROGRAM_ROWS, {"question": "Write f.", "tests": "assert f(1) == 1"})
  rows = [task.problem("all", i) for i in range(4)]
  assert [row.columns for row in rows] == [
      {"tests": PROGRAM_ROWS[0]["tests"]}, {"tests": PROGRAM_ROWS[1]["tests"]}, {},
      {"tests": "assert f(1) == 1"}]
  assert [row.answer for row in rows] == [*(row["answer"] for row in PROGRAM_ROWS), ""]
  assert task.excluded == {}


@pytest.mark.skipif(NO_SANDBOX, reason="rl.sandbox does not exist")
def test_programs_of_a_file_are_rewarded_for_passing_their_tests(jsonl):
  task = jsonl(*PROGRAM_ROWS)
  problems = [task.problem("all", i) for i in range(3)]
  correct = [f"```python\n{problem.answer}\n```" if problem.columns else problem.answer
             for problem in problems]
  incorrect = ["def f(x): return x", "print(9)", "8"]
  for answers, reward in ((correct, 1), (incorrect, 0), (["9"] * 3, None)):
    columns = {name: [problem.row().get(name) for problem in problems]
               for name in ("answer", "task", "tests")}
    completions = [f"<think></think><answer>{answer}</answer>" for answer in answers]
    got = rewards.accuracy([""] * 3, completions, **columns)
    assert got == ([reward] * 3 if reward is not None else [0, 0, 1])
  assert task.check(correct[1], problems[1].row()) is True


def test_rows_with_broken_tests_are_excluded(jsonl):
  bad = ["assert f(1) ==", "", [], 3, [{"input": "1"}], [{"input": 1, "output": 1}], {"input": "1"},
         ["assert f(1) =="], ["assert f(1)", 2], "(" * 1000]
  task = jsonl(*({"question": "Q", "answer": "1", "tests": tests} for tests in bad),
               {"question": "Q", "answer": "1", "tests": None})
  assert task.size("all") == 1
  assert task.excluded == {"with broken tests": len(bad)}


def test_a_file_without_usable_rows_is_an_error(jsonl):
  with pytest.raises(ValueError, match=r"no usable row: 1 broken JSON. For example line 1: "):
    jsonl("{broken").problem("train", 0)
  get_task.cache_clear()
  with pytest.raises(ValueError, match=r"line 2: broken tests: SyntaxError: .*\"tests\""):
    jsonl("", {"question": "Q", "tests": "def ("}).problem("train", 0)


def test_a_split_without_problems_says_that_questions_decide_the_split(jsonl):
  task = jsonl(*[{"question": "Q", "answer": "1"}] * 4)
  (empty,) = (split for split in ("train", "heldout") if not task.size(split))
  with pytest.raises(ValueError, match="its question decides; add rows with other questions"):
    task.problem(empty, 0)


def test_files_are_split_by_question_and_indices_wrap_around(jsonl):
  task = jsonl(*({"question": f"{i}?", "answer": str(i)} for i in range(200)))
  train, heldout = task.size("train"), task.size("heldout")
  assert train + heldout == 200 and heldout > 5
  ids = [{task.problem(split, i).id for i in range(task.size(split))}
         for split in ("train", "heldout")]
  assert ids[0].isdisjoint(ids[1])
  assert task.problem("train", train) == task.problem("train", 0)


@pytest.mark.skipif("DEEPSEEK_JAX_GSM8K" not in os.environ,
                    reason="set DEEPSEEK_JAX_GSM8K to the path of GSM8K's test.jsonl")
def test_all_of_gsm8k_can_be_used():
  task = get_task(f"file:{os.environ['DEEPSEEK_JAX_GSM8K']}")
  assert (task.size("all"), task.excluded) == (1319, {})
  for index in range(1319):
    problem = task.problem("all", index)
    assert task.check(problem.answer, problem.row()) is True


def test_only_a_full_score_of_reasoning_gym_counts_as_correct():
  pytest.importorskip("reasoning_gym")
  task = get_task("gym:chain_sum:seed=3")
  problem = task.problem("train", 0)
  assert problem == get_task(problem.task).problem("train", 0)
  assert task.check(problem.answer, problem.row()) is True
  # The data set's own scorer gives the first a small score.
  assert not any(task.check(wrong, problem.row()) for wrong in (f"it is {problem.answer}", "", "x"))
  questions = [{task.problem(split, i).question for i in range(30)} for split in task.splits]
  assert questions[0].isdisjoint(questions[1])


def test_a_scorer_of_reasoning_gym_that_does_not_end_or_fails_is_false(tmp_path, monkeypatch):
  (tmp_path / "reasoning_gym").mkdir()
  (tmp_path / "reasoning_gym" / "__init__.py").write_text("")
  (tmp_path / "reasoning_gym" / "factory.py").write_text("""if True:
    import os
    DATASETS = {"loops": None}
    class Data:
      def __getitem__(self, index):
        return {"question": f"What is {index}?", "answer": index, "metadata": {"pair": (1, 2)}}
      def score_answer(self, answer, entry):
        assert entry["metadata"]["pair"] == (1, 2)
        print("a scorer may print")
        while answer == "loop": pass
        if answer == "exit": os._exit(1)
        return float(int(answer) == int(entry["answer"])) or 0.5
    def create_dataset(name, *, seed, size):
      return Data()
  """)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the process in which scorers run
  for name in [name for name in sys.modules if name.startswith("reasoning_gym")]:
    monkeypatch.delitem(sys.modules, name)
  gym_task._forget()
  task = gym_task.Gym("loops")
  problem = task.problem("train", 0)
  check = lambda answer: task.check(answer, problem.row())
  try:
    began = time.monotonic()
    assert [check(answer) for answer in ("loop", problem.answer, "exit", "word", "-1")] == [
        False, True, False, False, False]
    assert time.monotonic() - began < 60
    assert check(problem.answer) and task.same("07", "7", problem.row())
  finally:
    gym_task._scorer.kill()
    gym_task._forget()
    for name in [name for name in sys.modules if name.startswith("reasoning_gym")]:
      del sys.modules[name]


def test_an_unknown_data_set_of_reasoning_gym_suggests_the_nearest_name():
  pytest.importorskip("reasoning_gym")
  with pytest.raises(ValueError, match="did you mean 'chain_sum'"):
    get_task("gym:chainsum")


def test_every_generated_task_is_tested_here():
  assert {spec.split(":")[0] for spec in SPECS} == set(GENERATED)
