"""Prompt templates: the prompt for a question, and the format of a completion.

SFT, evaluation and RL use the same templates, so that a model is asked as it was taught. The
templates here are plain text. `CHAT` names the chat template of a model's own folder, see
`train.chat`.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from model.checks import did_you_mean


@dataclasses.dataclass(frozen=True)
class Template:
  """A prompt with a placeholder for the question.

  Attributes:
    name: the template's name in `TEMPLATES`.
    text: the prompt, in which `{question}` is replaced by the question.
  """

  name: str
  text: str

  def __post_init__(self):
    if self.text.count("{question}") != 1:
      raise ValueError(f"template {self.name!r} must contain {{question}} exactly once, and is "
                       f"{self.text!r}")

  @property
  def opens_thinking(self) -> bool:
    """Whether the prompt already ends with `<think>`, so that completions begin inside it."""
    return opens_thinking(self.text)

  def answer(self, text: str) -> str:
    """Returns the completion for an answer of an SFT row: a space between it and the prompt.

    There is none where the prompt ends with whitespace, or with nothing of its own.
    """
    end = self.text[self.text.index("{question}") + len("{question}"):]
    apart = bool(end) and not end[-1].isspace() and not self.opens_thinking
    return f" {text}" if apart and not text[:1].isspace() else text

  def jinja(self) -> str:
    """Returns a chat template, for transformers, that writes what `conversation` does."""
    before, after = self.text.split("{question}")
    space = " " if self.answer("x") != "x" else ""
    return (
        "{%- set ns = namespace(system='') -%}{%- for message in messages -%}"
        "{%- if message.role == 'system' -%}{%- set ns.system = message.content + '\\n\\n' -%}"
        "{%- elif message.role == 'user' -%}"
        f"{{{{- {json.dumps(before)} + ns.system + message.content + {json.dumps(after)} -}}}}"
        "{%- set ns.system = '' -%}{%- else -%}"
        f"{{{{- ({json.dumps(space)} if message.content[:1].strip() else '') }}}}"
        "{{- message.content -}}"
        "{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}{%- endif -%}{%- endfor -%}")

  def conversation(self, messages: Sequence[Any]) -> tuple[str, str]:
    """Returns the prompt for the last turn of a conversation, and that turn as its completion.

    Earlier turns are written as prompts with their completions, one on each line. A system message
    precedes the first question.

    Args:
      messages: see `checked_messages`, which also says what is refused.
    """
    turns = checked_messages(messages)
    system = f"{turns.pop(0)['content']}\n\n" if turns[0]["role"] == "system" else ""
    contents = [turn["content"] for turn in turns]
    contents[0] = system + contents[0]
    parts = [(self.render(question), self.answer(answer))
             for question, answer in zip(contents[::2], contents[1::2], strict=True)]
    before = "".join(f"{prompt}{answer}\n" for prompt, answer in parts[:-1])
    return before + parts[-1][0], parts[-1][1]

  def render(self, question: str) -> str:
    """Returns the prompt for a question."""
    return self.text.replace("{question}", question)

  def complete(self, thinking: str, answer: str) -> str:
    """Returns the well-formed completion with the given reasoning and answer."""
    opening = "" if self.opens_thinking else "<think>"
    return f"{opening}{thinking}</think>\n<answer>{answer}</answer>"


def checked_messages(messages: Sequence[Any]) -> list[dict[str, str]]:
  """Returns the messages of a conversation that ends with an answer, without other fields.

  Args:
    messages: dicts with "role" and "content": optionally one of the system, then turns of the
      user and the assistant, the last of which is the assistant's.

  Raises:
    ValueError: for messages in another form or order.
  """
  try:
    found = [{"role": str(one["role"]), "content": one["content"]} for one in messages]
  except (TypeError, KeyError) as error:
    raise ValueError("a message is not an object with 'role' and 'content'") from error
  if not all(isinstance(one["content"], str) for one in found):
    raise ValueError("the content of a message is not a string")
  roles = [one["role"] for one in found]
  turns = roles[1:] if roles[:1] == ["system"] else roles
  if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
    raise ValueError("messages must be turns of user and assistant, after at most one of the "
                     f"system, and their roles are {', '.join(turns) or 'none'}")
  return found


def opens_thinking(prompt: str) -> bool:
  """Whether the prompt ends with `<think>`, so that completions begin inside the think block."""
  return prompt.rstrip().endswith("<think>")


# R1 (arXiv:2501.12948v1), Table 1; the full stop after the question is the paper's.
_R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>. User: {question}. Assistant:")

CHAT = "chat"  # the chat template of the model's own folder

TEMPLATES = {template.name: template for template in (
    Template("r1", _R1),
    Template("short", "Q: {question}\nA:"),
    Template("plain", "{question}"),
    Template("short_think", "Q: {question}\n<think>"),
    # ChatML's turns around a question for sums, whatever the model's own chat template is.
    Template("chatml_number", "<|im_start|>user\nWhat is {question}? Answer with a number "
             "only.<|im_end|>\n<|im_start|>assistant\n"),
)}


def get_template(name: str) -> Template:
  """Returns a template by its name.

  Args:
    name: "r1", the paper's; "short" or "short_think", for tiny models; "plain", the question
      itself; or "chatml_number", a sum in ChatML.

  Raises:
    ValueError: for `CHAT`, which is not plain text, or an unknown name; the message suggests the
      nearest one.
  """
  check_template(name)
  if name == CHAT:
    raise ValueError(f"the template {CHAT!r} is the chat template of a model's own folder, and "
                     f"there is no model here: choose one of {', '.join(TEMPLATES)}")
  return TEMPLATES[name]


def check_template(name: str, system: str = "") -> None:
  """Checks the name of a template, one of `TEMPLATES` or `CHAT`, and its system message.

  Raises:
    ValueError: for an unknown name, or a system message for a template that has none.
  """
  names = (*TEMPLATES, CHAT)
  if name not in names:
    raise ValueError(f"there is no template {name!r}{did_you_mean(name, names)} The templates "
                     f"are: {', '.join(names)}")
  if system and name != CHAT:
    raise ValueError(f"system={system!r} is for the template {CHAT!r} only, not {name!r}: leave "
                     "out one of them")
