"""A template's completions satisfy the format reward, and its prompts contain the question."""

import pytest

from rl.extraction import is_well_formed, reasoning, strict_answer
from rl.templates import TEMPLATES, Template, get_template


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_completions_of_a_template_are_well_formed(template):
  completion = template.complete("1+1=2", "2")
  opened = {"thinking_opened": template.opens_thinking}
  assert is_well_formed(completion, **opened)
  assert (reasoning(completion, **opened), strict_answer(completion)) == ("1+1=2", "2")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_questions_are_inserted_unchanged(template):
  question = "what is {x} + {question} % \\frac{1}{2}"
  assert question in template.render(question)
  assert template.render("a") != template.render("b")


def test_r1s_prompt_begins_and_ends_as_in_the_paper():
  prompt = get_template("r1").render("What is 1+1?")
  assert prompt.startswith("A conversation between User and Assistant. The user asks a question")
  assert prompt.endswith("<answer> answer here </answer>. User: What is 1+1?. Assistant:")
  assert not get_template("r1").opens_thinking


def test_short_templates_add_at_most_14_characters():
  assert all(len(TEMPLATES[name].render("")) <= 14 for name in ("short", "short_think"))


def test_an_unknown_template_suggests_the_nearest_name():
  with pytest.raises(ValueError, match="did you mean 'short'"):
    get_template("shrot")


def test_a_template_must_contain_the_question_exactly_once():
  with pytest.raises(ValueError, match="exactly once"):
    Template("mine", "Answer:")
