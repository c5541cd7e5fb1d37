"""A conversation with a model in the terminal, or one question and its answer."""

import contextlib
import dataclasses
import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import model
from model.weights import cast_weights
from rl.effort import Effort, Reply, reply, vote
from train.chat import ChatTemplate, PromptFormat, stop_tokens, with_system
from train.loading import LoadedModel
from train.templates import CHAT, Template, get_template, opens_thinking
from train.tokenizer import Tokenizer

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
NOT_A_NUMBER = "ended, as the logits of the next token are NaN: the model's weights are damaged"
_HELP = "an empty line, or the end of the input, ends the conversation; /new starts another one"


@dataclasses.dataclass(frozen=True)
class Chat:
  """A model that is asked, and how.

  Attributes:
    cfg: the settings, a `generate.GenerateConfig`.
    start: the model.
    tokenizer: its tokenizer.
    template: what a conversation is rendered with: the chat template of the model's folder, or the
      template with which it was fine-tuned or trained by RL.
  """

  cfg: Any
  start: LoadedModel
  tokenizer: Tokenizer
  template: ChatTemplate | Template

  @functools.cached_property
  def _variables(self) -> dict:
    return cast_weights(self.start.cfg, self.start.variables)  # once, not for every answer

  @classmethod
  def of(cls, cfg: Any, start: LoadedModel, tokenizer: Tokenizer,
         form: PromptFormat) -> "Chat | None":
    """Returns a chat if the settings ask for one, and None if text is to be continued.

    Raises:
      ValueError: if `chat` is set and the model has no chat template, or one that cannot be
        rendered.
    """
    if not cfg.chat and cfg.prompt is not None:
      return None
    if form.chat_template is not None:
      return cls(cfg, start, tokenizer, ChatTemplate(form, tokenizer, cfg.system))
    if start.template not in (None, CHAT):
      return cls(cfg, start, tokenizer, get_template(start.template))
    if cfg.chat:
      raise ValueError(f"chat=true: {cfg.checkpoint} has no chat template, so that its model can "
                       "only continue text: leave chat out")
    return None

  def run(self) -> None:
    """Answers the prompt of the settings or, without one, converses until the input ends."""
    if self.cfg.prompt is not None:
      self._answer([{"role": "user", "content": self.cfg.prompt}])
      return
    print(_HELP, file=sys.stderr)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends a reply
    messages: list[dict[str, str]] = []
    while (question := _ask()) is not None:
      if question == "/new":
        messages = []
        continue
      messages.append({"role": "user", "content": question})
      said = self._answer(messages)
      answer = said.answer.text.strip()
      if isinstance(self.template, Template) and self.template.opens_thinking:
        answer = f"{said.thought.text}</think>{answer}"  # what follows the question's "<think>"
      messages.append({"role": "assistant", "content": answer})

  def _answer(self, messages: list[dict[str, str]]) -> Reply:
    """Prints the answer to the last message, and what thought and answer cost."""
    prompt, cfg, thinking_before = self._prompt(messages), self.cfg, []
    key = jax.random.fold_in(jax.random.key(cfg.seed), len(messages) // 2)
    dim = sys.stdout.isatty()

    def show(piece: str, thinking: bool) -> None:
      if dim and piece and thinking_before[-1:] != [thinking]:
        print(_DIM if thinking else _PLAIN, end="")
        thinking_before.append(thinking)
      print(piece, end="", flush=True)

    if cfg.votes == 1:
      said = self._reply(prompt, key, show)
      spent = [said]
    else:
      spent = []
      for i in range(cfg.votes):
        spent.append(self._reply(
            prompt, jax.random.fold_in(key, i), lambda piece, thinking: None))
        if spent[-1].status == model.Status.RUNNING and not cfg.stop:
          break  # it was interrupted
      said, votes = vote(spent)
      for part, thinking in ((said.thought, True), (said.answer, False)):
        show(part.text, thinking)
    print(_PLAIN if dim and thinking_before[-1:] == [True] else "")
    if cfg.votes > 1:
      print(f"{votes} of {len(spent)} samples give this answer" if votes else
            "no sample has an answer: this is the first of them", file=sys.stderr)
    for name, parts in (("thought", [each.thought for each in spent]),
                        ("answer", [each.answer for each in spent])):
      if tokens := sum(part.tokens for part in parts):
        print(f"{name}: {tokens} tokens in {sum(part.seconds for part in parts):.1f} s",
              file=sys.stderr)
    if said.status == model.Status.LENGTH:
      print(f"cut off after max_new_tokens={cfg.max_new_tokens}", file=sys.stderr)
    if said.status == model.Status.INVALID:
      print(NOT_A_NUMBER, file=sys.stderr)
    return said

  def _reply(self, prompt: tuple[str, np.ndarray], key: jax.Array,
             show: Callable[[str, bool], None]) -> Reply:
    (text, prompt_T), cfg = prompt, self.cfg
    network = model.Transformer(
        self.start.cfg if cfg.drafts else dataclasses.replace(self.start.cfg, mtp=None))
    return reply(
        network, self._variables, self.tokenizer, prompt_T, stop_tokens=self._stop_tokens,
        max_new_tokens=cfg.max_new_tokens, opens_thinking=opens_thinking(text),
        effort=Effort(cfg.least_effort, cfg.effort), stop=cfg.stop, show=show, key=key,
        temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k, min_p=cfg.min_p,
        drafts=cfg.drafts, cache_dtype=cfg.cache_dtype)

  def _prompt(self, messages: list[dict[str, str]]) -> tuple[str, np.ndarray]:
    """Returns the prompt for the answer to the last message, as text and as token ids."""
    if isinstance(self.template, ChatTemplate):
      return self.template.next_prompt(messages)
    messages = with_system(messages, self.cfg.system)
    unknown = {"role": "assistant", "content": "?"}  # the answer, which is not part of the prompt
    text, _ = self.template.conversation([*messages, unknown])
    return text, self.tokenizer.encode(text)

  @functools.cached_property
  def _stop_tokens(self) -> tuple[int, ...]:
    if isinstance(self.template, ChatTemplate):
      return self.template.stop_tokens
    return stop_tokens(self.tokenizer, None)


def _ask() -> str | None:
  """Returns the next line that is typed; None at the end of the input, or for an empty line."""
  with contextlib.suppress(EOFError, KeyboardInterrupt):
    return input("> " if sys.stdin.isatty() else "").strip() or None
  return None
