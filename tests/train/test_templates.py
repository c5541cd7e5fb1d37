"""A template's completions satisfy the format reward, and its prompts contain the question."""

import pytest

from rl.extraction import is_well_formed, reasoning, strict_answer
from train.templates import TEMPLATES, Template, get_template


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


@pytest.mark.parametrize(("name", "completion"), [
    ("short", " 5"), ("r1", " 5"), ("plain", "5"), ("short_think", "5"), ("chatml_number", "5")])
def test_an_answer_is_separated_from_its_prompt(name, completion):
  assert get_template(name).answer("5") == completion
  assert get_template(name).answer("\n5") == "\n5"


def test_a_conversation_is_the_prompt_of_its_last_turn():
  turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"},
           {"role": "assistant", "content": "2"}, {"role": "user", "content": "2+2?"},
           {"role": "assistant", "content": "4"}]
  assert get_template("short").conversation(turns) == (
      "Q: Be brief.\n\n1+1?\nA: 2\nQ: 2+2?\nA:", " 4")
  assert get_template("short").conversation(turns[1:3]) == ("Q: 1+1?\nA:", " 2")


@pytest.mark.parametrize(("messages", "message"), [
    ([], "roles are none"), ([{"role": "user", "content": "a"}], "turns of user and assistant"),
    ([{"role": "assistant", "content": "a"}], "turns of user and assistant"),
    (["a"], "not an object"), ([{"role": "user"}], "not an object"),
    ([{"role": "user", "content": None}, {"role": "assistant", "content": "a"}], "not a string"),
    ([{"role": "tool", "content": "a"}, {"role": "assistant", "content": "a"}], "tool, assistant")])
def test_conversations_that_cannot_be_written_are_refused(messages, message):
  with pytest.raises(ValueError, match=message):
    get_template("short").conversation(messages)
