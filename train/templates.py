"""Prompt templates: the prompt for a question, and the format of a completion.

SFT, evaluation and RL use the same templates, so that a model is asked as it was taught.
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
      messages: dicts with "role" and "content": optionally one of the system, then turns of the
        user and the assistant, the last of which is the assistant's.

    Raises:
      ValueError: for messages in another form or order.
    """
    try:
      turns = [(str(message["role"]), message["content"]) for message in messages]
    except (TypeError, KeyError) as error:
      raise ValueError("a message is not an object with 'role' and 'content'") from error
    if not all(isinstance(content, str) for _, content in turns):
      raise ValueError("the content of a message is not a string")
    system = f"{turns.pop(0)[1]}\n\n" if turns and turns[0][0] == "system" else ""
    roles = [role for role, _ in turns]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
      raise ValueError("messages must be turns of user and assistant, after at most one of the "
                       f"system, and their roles are {', '.join(roles) or 'none'}")
    contents = [content for _, content in turns]
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

TEMPLATES = {template.name: template for template in (
    Template("r1", _R1),
    Template("short", "Q: {question}\nA:"),
    Template("plain", "{question}"),
    Template("short_think", "Q: {question}\n<think>"),
    # ChatML's turns, for models tuned on conversations.
    Template("chat", "<|im_start|>user\nWhat is {question}? Answer with a number only.<|im_end|>\n"
             "<|im_start|>assistant\n"),
)}


def get_template(name: str) -> Template:
  """Returns a template by its name.

  Args:
    name: "r1", the paper's; "short" or "short_think", for tiny models; "plain", the question
      itself; or "chat".

  Raises:
    ValueError: for an unknown name; the message suggests the nearest one.
  """
  if name not in TEMPLATES:
    raise ValueError(f"there is no template {name!r}{did_you_mean(name, TEMPLATES)} The templates "
                     f"are: {', '.join(TEMPLATES)}")
  return TEMPLATES[name]
