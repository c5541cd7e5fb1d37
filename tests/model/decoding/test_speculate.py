"""Drafts by MTP modules change how many passes a text takes, and not the text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model
from model.decoding import engine
from model.decoding.checks import as_stop_tokens
from model.decoding.sampling import Limits

V3 = dataclasses.replace(tiny.V3, num_layers=2)
ONE = dataclasses.replace(
    tiny.PLAIN_MLA, num_layers=1, mtp=model.MTPConfig(depth=1, hidden="pre_norm"))
GQA = dataclasses.replace(tiny.GQA, mtp=model.MTPConfig(depth=2, concat="embedding_first"))
HEADS = dataclasses.replace(ONE, mtp=model.MTPConfig(depth=2, form="parallel"))
NEW = 9
LENGTHS = np.array([5, 2, 7])
CASES = [(V3, 2), (ONE, 1), (ONE, 2), (GQA, 2), (HEADS, 2)]


def prompts(cfg):
  return tiny.tokens(cfg, 3, 7)


@functools.cache
def plain(cfg, **kwargs):
  return model.generate(model.Transformer(cfg), tiny.variables(cfg), prompts(cfg), LENGTHS,
                        max_new_tokens=NEW, **kwargs)


def speculated(cfg, drafts, variables=None, **kwargs):
  return model.speculate(
      model.Transformer(cfg), variables or tiny.variables(cfg), prompts(cfg), LENGTHS,
      max_new_tokens=NEW, drafts=drafts, **kwargs)


def assert_same(ours, theirs):
  np.testing.assert_array_equal(ours.tokens_BN, theirs.tokens_BN)
  np.testing.assert_array_equal(ours.lengths_B, theirs.lengths_B)
  np.testing.assert_allclose(ours.logprobs_BN, theirs.logprobs_BN, atol=1e-4)


def counting(cfg, wrong=()):
  """Returns variables with which token v is followed by v + 1, and modules that know it.

  Blocks add nothing, the head maps each embedding to the next token, and modules pass the embedding
  that they read on, but for tokens in `wrong`, whose embedding they turn around.
  """
  variables = jax.tree.map(jnp.zeros_like, tiny.variables(cfg))
  params = variables["params"]
  embedding = np.random.default_rng(0).standard_normal((cfg.vocab_size, cfg.d_model))
  embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
  params["embedding"]["embedding"] = jnp.asarray(embedding, jnp.float32)
  params["embedding"]["head"] = jnp.asarray(np.roll(embedding, 1, axis=0).T, jnp.float32)
  ones = lambda path, x: jnp.ones_like(x) if path[-1].key == "scale" else x
  params = jax.tree_util.tree_map_with_path(ones, params)
  for name in (name for name in params if name.startswith("mtp_")):
    read = np.eye(cfg.d_model)
    for token in wrong:
      read -= 2 * np.outer(embedding[token], embedding[token])
    halves = [np.zeros_like(read), read]  # of the hidden state and of the embedding
    params[name]["w_proj"] = jnp.asarray(np.concatenate(halves), jnp.float32)
  return variables | {"params": params}


@pytest.mark.parametrize(("cfg", "drafts"), CASES)
def test_greedy_texts_are_those_of_plain_decoding(cfg, drafts):
  found = speculated(cfg, drafts, temperature=0)
  assert_same(found.generated, plain(cfg, temperature=0))
  assert (np.asarray(found.passes_B) <= NEW - 1).all()


@pytest.mark.parametrize(("cfg", "drafts"), [(ONE, 2)])
def test_sampled_texts_are_those_of_plain_decoding_with_the_same_key(cfg, drafts):
  how = {"temperature": 0.7, "top_p": 0.9}
  found = model.speculate(model.Transformer(cfg), tiny.variables(cfg), prompts(cfg), LENGTHS,
                          max_new_tokens=NEW, drafts=drafts, key=jax.random.key(5), **how)
  want = model.generate(model.Transformer(cfg), tiny.variables(cfg), prompts(cfg), LENGTHS,
                        max_new_tokens=NEW, key=jax.random.key(5), **how)
  assert_same(found.generated, want)


@pytest.mark.parametrize(("cfg", "drafts"), [(V3, 2), (ONE, 3)])
def test_drafts_that_are_right_save_passes(cfg, drafts):
  variables = counting(cfg)
  lengths = np.array([5, 3, 7])
  found = model.speculate(model.Transformer(cfg), variables, prompts(cfg), lengths,
                          max_new_tokens=NEW, drafts=drafts, temperature=0)
  last = np.take_along_axis(np.asarray(prompts(cfg)), lengths[:, None] - 1, axis=1)
  np.testing.assert_array_equal(
      found.generated.tokens_BN, (last + 1 + np.arange(NEW)) % cfg.vocab_size)
  assert (found.passes_B == -(-(NEW - 1) // (drafts + 1))).all()
  assert (found.accepted_BD == found.passes_B[:, None]).all()


def test_a_stream_with_drafts_yields_the_tokens_of_one_without():
  net, variables = model.Transformer(ONE), tiny.variables(ONE)
  ask = lambda **how: list(model.stream(
      net, variables, prompts(ONE)[0, :5], max_new_tokens=NEW, key=jax.random.key(1), **how))
  want = ask()
  assert ask(drafts=1) == want == ask(drafts=2)
  assert ask(drafts=2, stop_token=want[4]) == want[:want.index(want[4]) + 1]
  with pytest.raises(ValueError, match="no MTP modules"):
    model.stream(model.Transformer(tiny.GQA), variables, prompts(ONE)[0], max_new_tokens=2,
                 temperature=0, drafts=1)


def test_drafts_after_one_that_is_wrong_are_not_counted():
  variables, wrong = counting(ONE, wrong=(20,)), 20
  prompt = np.array([[wrong - 4, wrong - 3]])
  found = model.speculate(model.Transformer(ONE), variables, prompt, np.array([2]),
                          max_new_tokens=NEW, drafts=2, temperature=0)
  np.testing.assert_array_equal(found.generated.tokens_BN[0], wrong - 2 + np.arange(NEW))
  # Known 18, drafts 19 and 20; known 21, drafts 22 and 23; known 24, drafts 25 and 26.
  assert found.passes_B.tolist() == [3] and found.accepted_BD.tolist() == [[3, 3]]
  found = model.speculate(model.Transformer(ONE), variables, prompt[:, 1:] + 1, np.array([1]),
                          max_new_tokens=NEW, drafts=1, temperature=0)
  # Known 19, draft 20; known 21, ... : the draft after 20 is never asked for.
  assert found.accepted_BD.tolist() == [[4]] and found.passes_B.tolist() == [4]
  found = model.speculate(model.Transformer(ONE), variables, prompt[:, 1:] + 2, np.array([1]),
                          max_new_tokens=NEW, drafts=1, temperature=0)
  # Known 20, a wrong draft; then known 21, draft 22, ...
  assert found.accepted_BD[0, 0] == found.passes_B[0] - 1 == 4


@pytest.mark.parametrize(("cfg", "drafts"), CASES)
def test_drafts_are_what_the_modules_predict_from_the_verified_text(cfg, drafts):
  """The modules' cache holds nothing that a rejected draft has left there."""
  net, variables = model.Transformer(cfg), tiny.variables(cfg)
  sampling = engine.Sampling(1.0, Limits(), as_stop_tokens(None), NEW, greedy=True, drafts=drafts)
  tokens, keys_B = jnp.asarray(prompts(cfg)), engine.row_keys(jax.random.key(0), 3)
  rows, new = jax.jit(lambda tokens: engine.begin(
      net, variables, sampling, tokens, jnp.asarray(LENGTHS), keys_B))(tokens)
  texts = [np.asarray(tokens[row, :length]).tolist() for row, length in enumerate(LENGTHS)]
  step = jax.jit(lambda rows: engine.step(net, variables, sampling, rows))
  full = tiny.apply(cfg)
  modules = cfg.mtp.depth
  for _ in range(4):
    for row, text in enumerate(texts):
      text += np.asarray(new.tokens_BP[row, :new.count_B[row]]).tolist()
      known, pending = len(text), np.asarray(rows.pending_BP[row]).tolist()
      assert pending[0] == text[-1]
      padded = np.zeros((1, 28), np.int32)
      padded[0, :known + drafts] = text + pending[1:]
      found = full(variables, jnp.asarray(padded))
      for k in range(1, min(drafts, modules) + 1):
        expected = int(found.mtp_logits[k - 1][0, known - 2].argmax())
        assert pending[k] == expected, (row, k)
    rows, new = step(rows)


def test_a_folder_in_the_released_layout_of_v3_drafts_with_its_mtp_layer(tmp_path):
  v3 = model.get_config("deepseek_v3")
  parts = ("vocab_size", "d_model", "num_layers", "ffn_dim", "num_dense_layers")
  small = dataclasses.replace(
      v3, **{part: getattr(V3, part) for part in parts}, numerics=V3.numerics,
      attention=V3.attention, moe=dataclasses.replace(
          v3.moe, num_experts=8, experts_per_token=2, expert_dim=8, num_groups=4,
          groups_per_token=2))
  model.hf.save(tmp_path / "v3", small, tiny.variables(small))
  cfg, variables = model.hf.load(tmp_path / "v3")
  assert cfg.mtp == model.MTPConfig(depth=1, concat="embedding_first")
  how = {"max_new_tokens": NEW, "temperature": 0}
  found = model.speculate(model.Transformer(cfg), variables, prompts(cfg), LENGTHS, drafts=1, **how)
  assert_same(found.generated, model.generate(
      model.Transformer(dataclasses.replace(cfg, mtp=None)), variables, prompts(cfg), LENGTHS,
      **how))


def test_stop_tokens_and_the_most_new_tokens_end_rows_within_a_pass():
  variables = counting(ONE)
  ask = lambda new, **how: model.speculate(
      model.Transformer(ONE), variables, np.array([[3, 4], [9, 10]]), np.array([2, 2]),
      max_new_tokens=new, drafts=2, temperature=0, **how).generated
  found = ask(8, stop_token=(6, 15))
  assert found.lengths_B.tolist() == [2, 5]
  assert found.tokens_BN.tolist() == [[5, 6] + 6 * [6], [11, 12, 13, 14, 15] + 3 * [15]]
  assert (found.logprobs_BN[0, 2:] == 0).all() and (found.logprobs_BN[0, :2] < 0).all()
  for new in (1, 3):
    assert ask(new).tokens_BN.tolist() == [list(range(5, 5 + new)), list(range(11, 11 + new))]
    assert ask(new).lengths_B.tolist() == [new, new]
  assert ask(8, stop_token=5).lengths_B.tolist() == [1, 8]


@pytest.mark.parametrize(("cfg", "drafts", "message"), [
    (tiny.GQA, 1, "no MTP modules"), (V3, 3, "at most 2, the model's MTP modules"),
    (V3, 0, "at least 1"), (ONE, 3, "prompts of at least 3 tokens"),
    (HEADS, 3, "at most 2, the model's MTP modules"),
    (dataclasses.replace(HEADS, mtp=model.MTPConfig(form="parallel")), 2, "at most 1,")])
def test_drafts_that_a_model_or_prompt_does_not_allow_are_refused(cfg, drafts, message):
  with pytest.raises(ValueError, match=message):
    speculated(cfg, drafts, temperature=0)
