"""Prompt templates: the prompt for a question, and the format of a completion."""

import dataclasses
import difflib

from rl.extraction import opens_thinking


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

  def render(self, question: str) -> str:
    """Returns the prompt for a question."""
    return self.text.replace("{question}", question)

  def complete(self, thinking: str, answer: str) -> str:
    """Returns the well-formed completion with the given reasoning and answer."""
    opening = "" if self.opens_thinking else "<think>"
    return f"{opening}{thinking}</think>\n<answer>{answer}</answer>"


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
    Template("short_think", "Q: {question}\n<think>"),
    # ChatML's turns, for models tuned on conversations.
    Template("chat", "<|im_start|>user\nWhat is {question}? Answer with a number only.<|im_end|>\n"
             "<|im_start|>assistant\n"),
)}


def get_template(name: str) -> Template:
  """Returns a template by its name.

  Args:
    name: "r1", the paper's; "short" or "short_think", for tiny models; or "chat".

  Raises:
    ValueError: for an unknown name; the message suggests the nearest one.
  """
  if name not in TEMPLATES:
    near = difflib.get_close_matches(name, TEMPLATES, 1, cutoff=0)
    raise ValueError(f"there is no template {name!r}; did you mean {near[0]!r}? The templates are: "
                     + ", ".join(TEMPLATES))
  return TEMPLATES[name]
