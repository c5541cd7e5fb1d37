"""The format is judged strictly; answers are extracted strictly or leniently."""

import pytest

from rl.extraction import (
  is_well_formed,
  lenient_answer,
  reasoning,
  reflects,
  strict_answer,
  unfenced,
)

GOOD = "<think>1+1=2</think>\n<answer>2</answer>"
ILL_FORMED = [
    "", "2", GOOD + "!", "So " + GOOD, GOOD + GOOD, GOOD + "<answer>3</answer>",
    "<answer>2</answer><think></think>", "<answer>2</answer>", "<think>1</think>",
    "<think>a<think>b</think></think><answer>2</answer>",
    "<think>a</think>b<answer>2</answer>", "<think>a<answer>2</answer></think>",
    "<think>a<answer>1</answer></think><answer>2</answer>",
    "<think>a</think><answer><answer>2</answer></answer>",
    "<think>a</think><answer>2", "<think>a<answer>2</answer>", "a</think><answer>2</answer>",
]


@pytest.mark.parametrize("completion", [GOOD, f" \n{GOOD}\n ", "<think></think><answer></answer>",
                                        "<think>\na < b\n</think><answer>\n2\n</answer>"])
def test_one_think_block_and_one_answer_block_are_well_formed(completion):
  assert is_well_formed(completion, thinking_opened=False)
  assert not is_well_formed(completion, thinking_opened=True)


@pytest.mark.parametrize("completion", ILL_FORMED)
def test_anything_more_or_less_is_ill_formed(completion):
  assert not is_well_formed(completion, thinking_opened=False)


def test_a_prompt_that_opens_the_think_block_stands_for_the_opening_tag():
  rest = GOOD.removeprefix("<think>")
  assert is_well_formed(rest, thinking_opened=True)
  assert not is_well_formed(rest, thinking_opened=False)
  assert reasoning(rest, thinking_opened=True) == "1+1=2"
  assert reasoning(rest, thinking_opened=False) is None


def test_reasoning_is_the_content_of_the_first_think_block_if_it_is_closed():
  assert reasoning(GOOD, thinking_opened=False) == "1+1=2"
  assert reasoning("<think>on and on", thinking_opened=False) is None
  assert reasoning("<think>a<answer>b</answer></think>", thinking_opened=False) is None


@pytest.mark.parametrize(("completion", "answer"), [
    (GOOD, "2"), ("<answer> x = 3 </answer>\n", "x = 3"), ("<answer>2</answer> or 3", None),
    ("<answer>2</answer><answer>3</answer>", None), ("<answer>2</answer></answer>", None),
    ("<answer><answer>2</answer>", None), ("<answer>2", None), ("2", None),
    ("<answer> </answer>", None), ("</answer>2<answer>", None)])
def test_the_strict_answer_is_the_only_answer_block_at_the_end(completion, answer):
  assert strict_answer(completion) == answer


@pytest.mark.parametrize(("completion", "answer"), [
    (GOOD, "2"), ("<answer>2</answer><answer>3</answer> bye", "3"), ("<answer>7+5*3", "7+5*3"),
    ("<answer>\\boxed{4}</answer>", "4"), ("so \\boxed{\\frac{1}{2}} it is, 7", "\\frac{1}{2}"),
    ("The answer is 42 apples, not 3.", "42"), ("Answer: (3+4)*2.", "(3+4)*2"),
    ("answer: 5\n**Answer**: yes", "yes"), ("答案是 12", "12"), ("答案：十二", "十二"),
    ("1+1=2 and then 1,234.", "1,234"), ("-7", "-7"), ("nothing", None), ("", None),
    ("\\boxed{4", "4"), ("<answer></answer> 5", "5"),
    ("The answer is **5**.", "5"), ("**Answer:** 5", "5"), ("**The answer is 5.**", "5"),
    ("**Final Answer**\n\n5", "5"), ("### Answer\n12", "12"), ("The answer is `5`.", "5"),
    ("<answer>The answer is 5</answer>", "5"), ("<answer>So the final answer is: 7.</answer>", "7"),
    ("<answer>**5**</answer>", "5"), ("<answer>−5</answer>", "-5"), ("Answer: −5", "-5"),
    ("so −5", "-5"), ("The answer is \\frac{1}{2}.", "\\frac{1}{2}"),
    ("The answer is -\\frac{3}{4} of it.", "-\\frac{3}{4}"),
    ("The answer is \\(x^2\\), so", "x^2"), ("The answer is \\[5\\]", "5"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}"),
    ("The answer to the question is \\frac{1}{2}.", "\\frac{1}{2}"), ("Answer: (2, 3)", "(2, 3)"),
    ("The answer is x = 5.", "x = 5"), ("Answer: 2x+1", "2x+1"), ("The answer is (B).", "(B)"),
    ("The answer is 5 m.", "5"), ("The answer is $5.", "5"), ("Answer: 3e-4", "3e-4"),
    ("The answer is 5. Check: 3+2=5", "5"), ("The answer is about 5 or so", "5"),
    ("答案是 **12**。", "12"), ("答案：\\frac{1}{2}。", "\\frac{1}{2}"),
    ("<answer>def f(xs):\n  answer = 0\n  return answer</answer>",
     "def f(xs):\n  answer = 0\n  return answer")])
def test_the_lenient_answer_is_found_wherever_it_occurs(completion, answer):
  assert lenient_answer(completion) == answer


def test_code_is_extracted_from_its_markdown_fence():
  assert unfenced("```python\ndef f():\n  pass\n```\n") == "def f():\n  pass"
  assert unfenced("x = '```'") == "x = '```'"


@pytest.mark.parametrize(("completion", "expected"), [
    ("9-5=3\nwait 9-5=4", True), ("Wait, no", True), ("等等 9-5=4", True), ("9-5=4", False),
    ("await the waiter", False)])
def test_reflections_are_detected(completion, expected):
  assert reflects(completion) is expected
