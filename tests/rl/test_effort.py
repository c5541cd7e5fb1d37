"""Thought and answer are divided as they are sampled, and the end of a thought can be forced."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokenizers

import model
from rl import effort as module
from rl.effort import Effort, Part, Reply, divide, reply, vote
from tests.train import chat_model
from train.tokenizer import Tokenizer


def thinking_tokenizer() -> Tokenizer:
  plain = tokenizers.Tokenizer.from_str(Tokenizer.bytes()._json)
  plain.add_special_tokens(["<think>", "</think>", "<stop>"])
  return Tokenizer(plain.to_str())


TOKENIZER = thinking_tokenizer()
OPEN, CLOSE, STOP = (TOKENIZER._tokenizer.token_to_id(name)
                     for name in ("<think>", "</think>", "<stop>"))
CFG = dataclasses.replace(chat_model.CFG, vocab_size=TOKENIZER.vocab_size)
NETWORK = model.Transformer(CFG)


def follows(successors: dict[int, int]) -> dict:
  """Returns variables with which each of these tokens is followed by the one that it maps to."""
  values = jax.tree.map(jnp.zeros_like, tiny.variables(CFG))
  values["params"]["norm"]["scale"] = jnp.ones(24)
  table = np.zeros((CFG.vocab_size, 24), np.float32)
  head = np.zeros((24, CFG.vocab_size), np.float32)
  for i, (now, then) in enumerate(successors.items()):
    table[now, i], head[i, then] = 1, 1
  values["params"]["embedding"] = {"embedding": jnp.asarray(table), "head": jnp.asarray(head)}
  return values


# "Q" -> <think> ab </think> cd <stop>; after the forced texts, "t" of Wait -> a, "\n" -> c.
TEXT = [ord("Q"), OPEN, ord("a"), ord("b"), CLOSE, ord("c"), ord("d"), STOP]
SUCCESSORS = dict(itertools.pairwise(TEXT)) | {ord("t"): ord("a"), ord("\n"): ord("c")}


def ask(prompt="Q", successors=None, max_new_tokens=40, **how):
  shown = []
  said = reply(
      NETWORK, follows(successors or SUCCESSORS), TOKENIZER, TOKENIZER.encode(prompt),
      stop_tokens=(STOP,), max_new_tokens=max_new_tokens, temperature=0,
      show=lambda text, thinking: shown.append((text, thinking)), **how)
  for thinking, part in ((True, said.thought), (False, said.answer)):
    assert "".join(text for text, of_thought in shown if of_thought is thinking) == part.text
  return said


def summary(said):
  return said.thought.text, said.thought.tokens, said.answer.text, said.answer.tokens, said.status


def test_thought_and_answer_are_told_apart_and_counted():
  assert summary(ask()) == ("ab", 3, "cd", 2, model.Status.STOP)
  said = ask(successors=SUCCESSORS | {ord("Q"): ord("a")}, opens_thinking=True)
  assert summary(said) == ("ab", 3, "cd", 2, model.Status.STOP)
  said = ask(successors={ord("Q"): ord("c"), ord("c"): ord("d"), ord("d"): STOP})
  assert summary(said) == ("", 0, "cd", 2, model.Status.STOP)
  said = ask(max_new_tokens=3)
  assert summary(said) == ("ab", 2, "", 0, model.Status.LENGTH)
  assert said.thought.seconds > 0


def test_the_end_of_a_thought_is_forced_after_the_most_tokens():
  endless = SUCCESSORS | {ord("b"): ord("a")}
  assert ask(successors=endless).answer.tokens == 0
  said = ask(successors=endless, effort=Effort(most=6))
  assert summary(said) == ("ababab", 6, "cd", 2, model.Status.STOP)
  # The budget of a thought that ends earlier changes nothing.
  assert summary(ask(effort=Effort(most=6))) == summary(ask())


def test_an_end_before_the_least_tokens_is_replaced_by_a_wait():
  said = ask(effort=Effort(least=8))
  # a b </think>, a b </think>, a b </think>: the third end comes after more than 8 tokens.
  assert summary(said) == ("ab\nWaitab\nWaitab", 9, "cd", 2, model.Status.STOP)
  said = ask(effort=Effort(least=6, most=6))
  assert summary(said) == ("ab\nWaitab", 6, "cd", 2, model.Status.STOP)


def test_a_stop_string_ends_the_answer_before_it():
  for most in (40, 6):  # of which the last token would be the end
    said = ask(stop=("d",), max_new_tokens=most)
    assert said.answer.text == "c" and said.status == model.Status.RUNNING


def test_forced_text_is_no_answer_and_ends_none():
  endless = SUCCESSORS | {ord("b"): ord("a")}
  said = ask(successors=endless, effort=Effort(most=4), stop=("\n",))
  assert summary(said) == ("abab", 4, "cd", 2, model.Status.STOP)
  said = ask(successors=endless, effort=Effort(most=4), stop=("d",))
  assert summary(said) == ("abab", 4, "c", 2, model.Status.RUNNING)


def test_without_any_effort_a_prompt_that_opens_a_thought_is_answered_at_once():
  said = ask(successors=SUCCESSORS | {ord("Q"): ord("a")}, effort=Effort(most=0),
             opens_thinking=True)
  assert summary(said) == ("", 0, "cd", 2, model.Status.STOP)


def test_logits_that_are_nan_are_told_from_an_end():
  variables = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), follows(SUCCESSORS))
  said = reply(NETWORK, variables, TOKENIZER, TOKENIZER.encode("Q"), stop_tokens=(STOP,),
               max_new_tokens=4, temperature=0)
  assert summary(said) == ("", 0, "", 0, model.Status.INVALID)


def test_tags_and_characters_of_several_tokens_are_put_together():
  """The tags are text to this tokenizer, and what is sampled is scripted."""
  plain = Tokenizer.bytes()

  def scripted(text, **how):
    shown, contexts = [], []

    def stream(network, variables, prompt, **kwargs):
      contexts.append(bytes(np.asarray(prompt).tolist()).decode())
      yield from text.pop(0).encode()
      return model.Status.STOP

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(model, "stream", stream)
      said = reply(NETWORK, {}, plain, plain.encode("Q"), stop_tokens=(256,), max_new_tokens=99,
                   show=lambda piece, thinking: shown.append((piece, thinking)), **how)
    for thinking, part in ((True, said.thought), (False, said.answer)):
      assert "".join(piece for piece, of in shown if of is thinking) == part.text
    return summary(said), contexts

  (found, _) = scripted([" <think>ab</think>cd"])
  assert found == ("ab", 10, "cd", 2, model.Status.STOP)
  found, contexts = scripted(["<think>\u00e9\u00e9", "cd"], effort=Effort(most=1))
  assert found == ("\u00e9", 2, "cd", 2, model.Status.STOP)
  assert contexts == ["Q", "Q<think>\u00e9\n</think>\n\n"]
  found, contexts = scripted(["<think>ab</think>no", "c</think>d"], effort=Effort(least=11))
  assert found == ("ab\nWaitc", 19, "d", 1, model.Status.STOP)
  assert contexts == ["Q", "Q<think>ab\nWait"]


def test_an_interrupted_reply_is_returned_as_far_as_it_has_come(monkeypatch):
  stream = model.stream

  def interrupted(*args, **kwargs):
    for i, token in enumerate(stream(*args, **kwargs)):
      if i == 5:
        raise KeyboardInterrupt
      yield token

  monkeypatch.setattr(model, "stream", interrupted)
  assert summary(ask()) == ("ab", 3, "c", 1, model.Status.RUNNING)


@pytest.mark.parametrize(("text", "opens", "thought", "answer"), [
    ("", False, None, None), (" <thi", False, None, None), ("<think>x", False, "x", None),
    ("<than", False, None, "<than"), ("a</think>b", False, None, "a</think>b"),
    ("a</thi", True, "a</thi", None), ("a</think>b</think>", True, "a", "b</think>")])
def test_a_beginning_of_a_completion_is_divided(text, opens, thought, answer):
  assert divide(text, opens_thinking=opens) == (thought, answer)


def test_tokens_of_a_text_are_kept_as_far_as_they_are_its_own():
  tokens = [*"né".encode(), ord("<"), ord("/")]
  assert module._tokens_of(TOKENIZER, tokens, "né") == tokens[:3]
  assert module._tokens_of(TOKENIZER, tokens, "né<") == tokens[:4]
  assert module._tokens_of(TOKENIZER, [OPEN, ord("a"), CLOSE], "<think>a") == [OPEN, ord("a")]


@pytest.mark.parametrize("wrong", [{"least": -1}, {"least": 5, "most": 4}, {"most": -1}])
def test_impossible_efforts_are_refused(wrong):
  with pytest.raises(ValueError, match="impossible"):
    Effort(**wrong)


def test_the_answer_that_most_replies_give_is_chosen():
  said = lambda text: Reply(Part("thought"), Part(text), model.Status.STOP)
  texts = ("<answer>12</answer>", "<answer>7</answer>", "nothing", "the answer is 7.0", "",
           "<answer>12</answer> ", "<answer>14/2</answer>")
  replies = [said(text) for text in texts]
  assert vote(replies) == (replies[1], 3)
  assert vote(replies[:2]) == (replies[0], 1)  # of equally many, the first
  assert vote([replies[4], replies[2]]) == (replies[4], 0)
