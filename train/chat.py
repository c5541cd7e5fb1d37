"""Chat models: how they are prompted, and which tokens end their text.

Chat templates are programs in the language of Jinja that come with a model. They are rendered as
transformers does, in Jinja's sandbox.
"""

import dataclasses
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from train.run_folder import read_json_object
from train.templates import CHAT, checked_messages
from train.tokenizer import Tokenizer

STOP = "<|im_end|>"
_TEMPLATE, _TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"
_GENERATION, _CONFIG = "generation_config.json", "config.json"


class ChatTokenizer(Tokenizer):
  """A tokenizer that encodes ChatML markers as special tokens, and whose eos ends a turn.

  A plain `Tokenizer` encodes text that spells a special token as ordinary text. This one encodes it
  as the special token, so use it only for prompts that the program itself has composed, never for
  untrusted text.

  Attributes:
    eos: id of `<|im_end|>`, which ends a turn. The eos of a plain `Tokenizer` ends a document.
  """

  def __init__(self, definition: str):
    """Builds the tokenizer from the text of a `tokenizer.json`, as `Tokenizer` does.

    Raises:
      ValueError: as `Tokenizer` raises it, and if the vocabulary has no `<|im_end|>`.
    """
    super().__init__(definition)
    self._tokenizer.encode_special_tokens = False
    self.eos = self._tokenizer.token_to_id(STOP)
    if self.eos is None:
      raise ValueError(f"this tokenizer has no {STOP}: use a model fine-tuned on ChatML")


@dataclasses.dataclass(frozen=True)
class PromptFormat:
  """What a Hugging Face folder says about prompts and the end of a text.

  Attributes:
    chat_template: a Jinja template that renders messages as a prompt; None if there is none.
    names: names of special tokens by their role, such as "bos_token", which templates may use.
    stop_tokens: ids of the tokens that end a text; () if the folder names none.
    source: the folder, for messages.
  """

  chat_template: str | None = None
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stop_tokens: tuple[int, ...] = ()
  source: str = "the model's folder"

  @classmethod
  def load(cls, folder: str) -> "PromptFormat":
    """Reads the format from a folder's files, each of which may be missing.

    A `chat_template.jinja` goes before the template in `tokenizer_config.json`, and the
    `eos_token_id` of `generation_config.json`, an id or a list of them, before that of
    `config.json`.

    Raises:
      ValueError: if a file cannot be read; the message names it.
    """
    path = pathlib.Path(folder)
    tokenizer_config = _read(path / _TOKENIZER_CONFIG)
    names = _names(_read(path / "special_tokens_map.json")) | _names(tokenizer_config)
    return cls(_chat_template(path, tokenizer_config), names,
               _stop_tokens(path / _GENERATION) or _stop_tokens(path / _CONFIG), str(folder))

  def encode_chat(self, tokenizer: Tokenizer, user: str, system: str = "") -> np.ndarray:
    """Returns the prompt for a chat model's answer to one message.

    The template's special tokens are encoded as such. Text of the messages never is, whatever it
    spells.

    Args:
      tokenizer: the model's tokenizer.
      user: the user's message.
      system: the system's message; empty for none, or for the template's own.

    Returns:
      int32, token ids.

    Raises:
      ValueError: if there is no template, or if it cannot be rendered.
    """
    self.require_template()
    messages = with_system([{"role": "user", "content": user}], system)
    (rendered, *_), guard = self.render(tokenizer, messages, ends=(len(messages),))
    return tokenizer.encode_rendered(rendered, guard)

  def require_template(self) -> None:
    """Raises ValueError if there is no chat template, or an empty one."""
    if self.chat_template is not None and not self.chat_template.strip():
      raise ValueError(f"the chat template of {self.source} is empty")
    if self.chat_template is None:
      raise ValueError(f"{self.source} has no chat template, neither {_TEMPLATE} nor in "
                       f"{_TOKENIZER_CONFIG}: the model can only continue text")

  def render(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]],
             ends: Sequence[int]) -> tuple[list[str], str]:
    """Renders the beginnings of a conversation, for `Tokenizer.encode_rendered`.

    A beginning that ends with the user's turn is followed by what the template writes before an
    answer.

    Args:
      tokenizer: the model's tokenizer.
      messages: dicts with "role" and "content".
      ends: number of messages of each beginning.

    Returns:
      The rendered beginnings; and the guard, a character that is in none of the messages and splits
      what spells a special token in them.

    Raises:
      ValueError: if the template cannot be rendered, or a message cannot be encoded as UTF-8.
    """
    text = "".join([self.chat_template, *(message["content"] for message in messages)])
    text.encode()  # JSON can express a lone surrogate
    guard = _unused_character(text)
    safe = [{"role": message["role"],
             "content": _guarded(message["content"], tokenizer.special_tokens, guard)}
            for message in messages]
    try:
      template = _compiled(self.chat_template)
      return [template.render(
          messages=safe[:end], tools=None, documents=None,
          add_generation_prompt=safe[end - 1]["role"] == "user", **self.names)
          for end in ends], guard
    except Exception as error:  # a template may raise anything
      raise ValueError(f"the chat template of {self.source} cannot be rendered: {error}") from error


def with_system(messages: list[dict[str, str]], system: str) -> list[dict[str, str]]:
  """Returns the messages after one of the system, unless it is empty or they have their own."""
  if not system or messages[0]["role"] == "system":
    return messages
  return [{"role": "system", "content": system}, *messages]


class Turn(NamedTuple):
  """The last turn of a conversation, the assistant's, and its prompt.

  Attributes:
    prompt: everything that the template writes before the turn.
    text: the turn and what the template writes after it, such as the token that ends a turn.
    prompt_T, text_T: their token ids, int32.
  """

  prompt: str
  text: str
  prompt_T: np.ndarray
  text_T: np.ndarray


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """The chat template of a model's folder, as the prompt template of SFT, RL and evaluation.

  Creating one renders a conversation, so that a template that does not work is noticed early.

  Attributes:
    form: the folder's format.
    tokenizer: the model's tokenizer.
    system: the system's message in conversations without one; empty for none, or for the template's
      own.
    stop_tokens: ids of the tokens that end the model's text: the end of a document, those that the
      folder names, and the special token that the template writes after an answer.

  Raises:
    ValueError: if the folder has no chat template, or one that cannot be rendered.
  """

  form: PromptFormat
  tokenizer: Tokenizer
  system: str = ""

  def __post_init__(self):
    require_chat(self.form)
    self._end_of_turn()

  @property
  def key(self) -> list:
    """What determines the rendered text, as JSON data."""
    return [self.form.chat_template, dict(self.form.names), self.system]

  def prompt(self, question: str) -> tuple[str, np.ndarray]:
    """Returns the prompt for the answer to a question, as text and as token ids.

    Raises:
      ValueError: if the template cannot be rendered.
    """
    return self.next_prompt([{"role": "user", "content": question}])

  def next_prompt(self, messages: list[dict[str, str]]) -> tuple[str, np.ndarray]:
    """Returns the prompt for the answer to the last message of a conversation, as `prompt` does."""
    messages = with_system(messages, self.system)
    (rendered,), guard = self.form.render(self.tokenizer, messages, ends=(len(messages),))
    return rendered.replace(guard, ""), self.tokenizer.encode_rendered(rendered, guard)

  def conversation(self, messages: Sequence[Any]) -> Turn:
    """Returns the last turn of a conversation.

    If the template ends with the token that ends a document, it is left out of `text_T`, as it
    follows every document in training.

    Args:
      messages: see `train.templates.checked_messages`.

    Raises:
      ValueError: for messages in another form or order, or if the template cannot be rendered or
        changes the answer.
    """
    messages = with_system(checked_messages(messages), self.system)
    if not messages[-1]["content"].strip():
      raise ValueError("the last message, the answer, is empty")
    (before, whole), guard = self.form.render(
        self.tokenizer, messages, ends=(len(messages) - 1, len(messages)))
    rest = whole[len(before):]
    if not whole.startswith(before):
      raise ValueError(f"the chat template of {self.form.source} does not write the same before "
                       "an answer in a conversation as it does to ask for one, so that a model "
                       "cannot be fine-tuned with it: choose another template")
    if messages[-1]["content"].strip() not in rest.replace(guard, ""):
      raise ValueError(f"the chat template of {self.form.source} leaves out a part of the answer")
    prompt_T, text_T = (self.tokenizer.encode_rendered(part, guard) for part in (before, rest))
    ended = text_T.size > 0 and text_T[-1] == self.tokenizer.eos
    return Turn(before.replace(guard, ""), rest.replace(guard, ""), prompt_T,
                text_T[:-1] if ended else text_T)

  @functools.cached_property
  def stop_tokens(self) -> tuple[int, ...]:
    return tuple(dict.fromkeys(
        [*stop_tokens(self.tokenizer, self.form), *self._end_of_turn()]))

  def _end_of_turn(self) -> list[int]:
    """Returns the first special token that the template writes after an answer, if it does."""
    answer = _unused_character(self.form.chat_template + self.system)
    messages = with_system([{"role": "user", "content": "1+1"},
                            {"role": "assistant", "content": answer}], self.system)
    (rendered,), guard = self.form.render(self.tokenizer, messages, ends=(len(messages),))
    after_T = self.tokenizer.encode_rendered(rendered.rpartition(answer)[2], guard).tolist()
    return [i for i in after_T if self.tokenizer.decode([i]) in self.tokenizer.special_tokens][:1]


def stop_tokens(tokenizer: Tokenizer, form: PromptFormat | None) -> tuple[int, ...]:
  """Returns the ids that end a document or, as a model's folder says, its text."""
  return tuple(dict.fromkeys([tokenizer.eos, *(form.stop_tokens if form else ())]))


def require_chat(form: PromptFormat | None) -> None:
  """Raises ValueError if a model has no chat template, which the template `CHAT` needs.

  Args:
    form: how the model is prompted; None if training begins from random weights.
  """
  which = f"template={CHAT} is the chat template of the model's own folder"
  advice = "or choose another template, such as short"
  if form is None:
    raise ValueError(f"{which}, and there is no model to start from: set init to one that has a "
                     f"chat template, {advice}")
  try:
    form.require_template()
  except ValueError as error:
    raise ValueError(f"{which}, and {error}. Use a model that has one, add {_TEMPLATE} to its "
                     f"Hugging Face folder, {advice}") from error


def _read(path: pathlib.Path) -> dict:
  return read_json_object(path) if path.exists() else {}


def _names(config: dict) -> dict[str, str]:
  """Returns the special tokens of a JSON object, which are strings or objects with a content."""
  contents = {role: value.get("content") if isinstance(value, dict) else value
              for role, value in config.items() if role.endswith("_token")}
  return {role: content for role, content in contents.items() if isinstance(content, str)}


def _chat_template(folder: pathlib.Path, tokenizer_config: dict) -> str | None:
  path = folder / _TEMPLATE
  if path.exists():
    try:
      return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f"{path} cannot be read: {error}") from error
  found = tokenizer_config.get("chat_template")
  if isinstance(found, list):  # several, by name
    found = next((one.get("template") for one in found
                  if isinstance(one, dict) and one.get("name") == "default"), None)
  if not isinstance(found, str | None):
    raise ValueError(f"{folder / _TOKENIZER_CONFIG}: chat_template should be a string, and is a "
                     f"{type(found).__name__}")
  return found


def _stop_tokens(path: pathlib.Path) -> tuple[int, ...]:
  given = _read(path).get("eos_token_id")
  ids = [] if given is None else given if isinstance(given, list) else [given]
  if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
    raise ValueError(f"{path}: eos_token_id={given!r} should be the id of a token or a list of ids")
  return tuple(ids)


def _unused_character(text: str) -> str:
  """Returns a character that is not in the text: one of those that Unicode will never assign."""
  unused = next((chr(code) for code in range(0xFDD0, 0xFDF0) if chr(code) not in text), None)
  if unused is None:
    raise ValueError("the prompt has all of U+FDD0 to U+FDEF, which are not characters: remove one")
  return unused


def _guarded(text: str, special_tokens: tuple[str, ...], guard: str) -> str:
  """Splits everything in a text that spells a special token, or could complete one at an end.

  Guards follow the characters with which special tokens begin, and precede those with which they
  end.
  """
  before, after = _guard_places(special_tokens)
  return after.sub(rf"\g<0>{guard}", before.sub(rf"{guard}\g<0>", text))


@functools.lru_cache(maxsize=8)
def _guard_places(special_tokens: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
  """Returns patterns of the characters that guards precede, and of those that they follow."""
  first, last = ({name[at] for name in special_tokens} for at in (0, -1))
  one_of = lambda chars: re.compile("|".join(map(re.escape, sorted(chars))) or "(?!)")
  return one_of(last), one_of(first)


class _Generation(jinja2.ext.Extension):
  """The tag `generation`, with which templates mark what the model writes. It changes nothing."""

  tags = frozenset({"generation"})

  def parse(self, parser):
    line = next(parser.stream).lineno
    return jinja2.nodes.Scope(
        parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
  """A namespace that refuses names like those of Python's internals, as in transformers.

  Looking up an attribute of a namespace gives what a template stored, so that methods are called by
  the class.
  """

  def __init__(self, /, *args, **fields):
    fields = dict(*args, **fields)
    for name in fields:
      _require_public(name)
    jinja2.utils.Namespace.__init__(self, fields)

  def __setitem__(self, name, value):
    _require_public(name)
    jinja2.utils.Namespace.__setitem__(self, name, value)


def _require_public(name) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


@functools.lru_cache(maxsize=8)
def _compiled(chat_template: str) -> jinja2.Template:
  return _environment().from_string(chat_template)


def _environment() -> jinja2.Environment:
  """Returns what chat templates may use: the functions and filters that transformers offers."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])

  def raise_exception(message):
    raise jinja2.TemplateError(message)

  def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)

  # Jinja's own filter escapes characters for HTML.
  environment.filters["tojson"] = to_json
  environment.globals["namespace"] = _Namespace
  environment.globals["raise_exception"] = raise_exception
  environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
  return environment
