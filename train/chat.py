"""Chat models: how they are prompted, and which tokens end their text.

Chat templates are programs in the language of Jinja that come with a model. They are rendered as
transformers does, in Jinja's sandbox.
"""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Mapping

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from train.run_folder import read_json_object
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
  source: str = "the folder"

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
    if self.chat_template is None:
      raise ValueError(f"{self.source} has no chat template, neither {_TEMPLATE} nor in "
                       f"{_TOKENIZER_CONFIG}: its model can only continue text")
    guard = _unused_character(self.chat_template + user + system)
    messages = [{"role": role, "content": _guarded(text, tokenizer.special_tokens, guard)}
                for role, text in (("system", system), ("user", user)) if text or role == "user"]
    return tokenizer.encode_rendered(self._render(messages), guard)

  def _render(self, messages: list[dict[str, str]]) -> str:
    try:
      template = _environment().from_string(self.chat_template)
      return template.render(messages=messages, tools=None, documents=None,
                             add_generation_prompt=True, **self.names)
    except Exception as error:  # a template may raise anything
      raise ValueError(f"the chat template of {self.source} cannot be rendered: {error}") from error


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
  first, last = ({name[at] for name in special_tokens} for at in (0, -1))
  return "".join((guard if char in last else "") + char + (guard if char in first else "")
                 for char in text)


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
