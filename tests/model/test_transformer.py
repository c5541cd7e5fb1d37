"""The whole network: causality, separation of packed documents, and no unused computation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import model

NO_MTP = dataclasses.replace(tiny.V3, mtp=None)
DENSE = dataclasses.replace(tiny.MHA, num_layers=1, tie_embeddings=False)  # compiles quickly
FLOAT32 = 1e-5  # relative: about a hundred operations deep, with sums of tens of terms


def close(a, b, tolerance=FLOAT32):
  np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * float(jnp.abs(b).max()))


@pytest.mark.parametrize("name", tiny.ALL)
def test_logits_depend_on_no_later_token(name):
  cfg = tiny.ALL[name]
  tokens_BT = tiny.tokens(cfg)
  changed_BT = tokens_BT.at[:, 7].add(1) % cfg.vocab_size
  before, after = (tiny.apply(cfg)(tiny.variables(cfg), t).logits_BTV
                   for t in (tokens_BT, changed_BT))
  close(after[:, :7], before[:, :7])
  assert float(jnp.abs(after[:, 7:] - before[:, 7:]).min(-1).max()) > 0


def test_mtp_depth_k_reads_k_tokens_ahead_and_no_more():
  cfg = tiny.V3
  tokens_BT = tiny.tokens(cfg)
  changed_BT = tokens_BT.at[:, 7].add(1) % cfg.vocab_size
  before, after = (tiny.apply(cfg)(tiny.variables(cfg), t).mtp_logits
                   for t in (tokens_BT, changed_BT))
  for k, (one, other) in enumerate(zip(before, after, strict=True), start=1):
    close(other[:, :7 - k], one[:, :7 - k])
    assert float(jnp.abs(other[:, 7 - k] - one[:, 7 - k]).max()) > 1e-3


def test_parallel_heads_read_the_trunk_alone_and_have_as_many_parameters():
  cfg = dataclasses.replace(tiny.V3, mtp=model.MTPConfig(depth=2, form="parallel"))
  sizes = [sum(x.size for x in jax.tree.leaves(tiny.variables(c)["params"]))
           for c in (cfg, dataclasses.replace(cfg, mtp=model.MTPConfig(depth=2)))]
  assert sizes[0] == sizes[1] == cfg.param_count(mtp=True)
  tokens_BT = tiny.tokens(cfg)
  changed = tokens_BT.at[:, 5].add(1)
  before, after = (tiny.apply(cfg)(tiny.variables(cfg), t).mtp_logits for t in (tokens_BT, changed))
  for k in range(2):
    same = (before[k] == after[k]).all((0, 2))
    assert same[:5].all() and not same[5]
  # Each head is the first module of a network that has no other.
  one = dataclasses.replace(cfg, mtp=model.MTPConfig(form="parallel"))
  alone = {kind: {name: tree.get("mtp_2") if name == "mtp_1" else x
                  for name, x in tree.items() if name != "mtp_2"}
           for kind, tree in tiny.variables(cfg).items()}
  close(tiny.apply(one)(alone, tokens_BT).mtp_logits[0], before[1])


def test_mtp_shares_the_trunks_embedding_and_head():
  cfg = dataclasses.replace(DENSE, mtp=model.MTPConfig(depth=1))
  v = tiny.variables(cfg)

  def loss(params, trunk, mtp):
    out = model.Transformer(cfg).apply(v | {"params": params}, tiny.tokens(cfg))
    return trunk * (out.logits_BTV**2).sum() + mtp * (out.mtp_logits[0]**2).sum()

  grad = jax.jit(jax.grad(loss))
  both, trunk, mtp = (grad(v["params"], *w)["embedding"] for w in ((1., 1.), (1., 0.), (0., 1.)))
  for name in ("embedding", "head"):
    assert float(jnp.abs(mtp[name]).max()) > 0
    close(both[name], trunk[name] + mtp[name])


def test_concat_orders_differ_only_by_swapping_the_halves_of_the_projection():
  cfg = dataclasses.replace(DENSE, mtp=model.MTPConfig(concat="hidden_first"))
  swapped = dataclasses.replace(cfg, mtp=model.MTPConfig(concat="embedding_first"))
  v = tiny.variables(cfg)
  w_proj = v["params"]["mtp_1"]["w_proj"]
  reordered = jnp.concatenate(jnp.split(w_proj, 2)[::-1])
  other = v | {"params": v["params"] | {"mtp_1": v["params"]["mtp_1"] | {"w_proj": reordered}}}
  close(tiny.apply(swapped)(other, tiny.tokens(cfg)).mtp_logits[0],
        tiny.apply(cfg)(v, tiny.tokens(cfg)).mtp_logits[0])


@pytest.mark.parametrize("name", ["v3", "gqa"])
def test_segments_isolate_packed_documents(name):
  cfg = dataclasses.replace(tiny.ALL[name], mtp=None)
  v, documents_BT = tiny.variables(cfg), tiny.tokens(cfg, 2, 6)
  run = tiny.apply(cfg)
  separate = run(v, documents_BT).logits_BTV.reshape(1, 12, -1)
  two, one = (run(v, documents_BT.reshape(1, 12), segment_ids_BT=jnp.array([ids])).logits_BTV
              for ids in ([1] * 6 + [2] * 6, [1] * 12))
  # Rotary positions are relative: the second document need not start at 0.
  close(two, separate)
  assert float(jnp.abs(one - separate)[:, 6:].max()) > 0.1


def test_padding_is_excluded_from_every_router_statistic():
  cfg = tiny.V3
  v, tokens_BT = tiny.variables(cfg), tiny.tokens(cfg)
  segments = jnp.ones_like(tokens_BT).at[0, 9:].set(0)
  out = tiny.apply(cfg)(v, tokens_BT, segment_ids_BT=segments)
  assert (out.expert_load_LE.sum(-1) == (24 - 3) * cfg.moe.experts_per_token).all()
  np.testing.assert_array_equal(out.router["moe_layers"].tokens_B, [[9, 12]] * 2)
  # MTP depth k has no token to read at the last k positions, so these do not count either.
  np.testing.assert_array_equal(out.router["mtp_2"].tokens_B, [7, 10])
  alone = tiny.apply(cfg)(v, tokens_BT[:1, :9], logits=False, mtp=False)
  np.testing.assert_array_equal(out.router["moe_layers"].load_BE[:, 0],
                                alone.router["moe_layers"].load_BE[:, 0])


def test_the_router_bias_changes_the_choice_of_experts_but_never_the_gates():
  cfg = tiny.V3
  v = tiny.variables(cfg)
  pushed = v | {"router": jax.tree.map(lambda b: b.at[..., 0].add(10.0), v["router"])}
  run, tokens_BT = tiny.apply(cfg), tiny.tokens(cfg)
  assert (run(pushed, tokens_BT).expert_load_LE[:, 0] == tokens_BT.size).all()
  # A constant added to every expert's bias chooses the same experts, hence the same output.
  shifted = v | {"router": jax.tree.map(lambda b: b - 3.0, v["router"])}
  np.testing.assert_array_equal(run(shifted, tokens_BT).logits_BTV, run(v, tokens_BT).logits_BTV)
  grads = jax.jit(jax.grad(lambda router: (model.Transformer(cfg).apply(
      v | {"router": router}, tokens_BT).logits_BTV**2).sum()))(v["router"])
  assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads))


@functools.cache
def _gradients(remat: str, unroll: int = 1):
  v, tokens_BT = tiny.variables(NO_MTP), tiny.tokens(NO_MTP, batch=4, length=64)

  def loss(params):
    out = model.Transformer(NO_MTP, remat=remat, unroll=unroll).apply(
        v | {"params": params}, tokens_BT)
    return (out.logits_BTV**2).mean(), out

  compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(v["params"]).compile()
  return compiled.memory_analysis().temp_size_in_bytes, compiled(v["params"])


@pytest.mark.cpu
@pytest.mark.parametrize("remat", sorted(set(model.REMAT) - {"none"}))
def test_remat_gives_the_same_gradients_with_less_memory(remat):
  (plain_bytes, ((value, _), plain)), (fewer_bytes, ((remat_value, _), grads)) = (
      _gradients("none"), _gradients(remat))
  close(remat_value, value)
  jax.tree.map(close, grads, plain)
  assert fewer_bytes < 0.8 * plain_bytes


@pytest.mark.parametrize("remat", [
    pytest.param("none", marks=pytest.mark.long("compiles another unrolled gradient")), "full"])
def test_unrolled_layers_give_the_same_outputs_and_gradients(remat):
  (_, unrolled), (_, looped) = _gradients(remat, unroll=99), _gradients("none")
  for a, b in zip(*map(jax.tree.leaves, (unrolled, looped)), strict=True):
    close(a, b)


def _rematerialised(jaxpr, looped=False) -> set:
  """Returns, for all remat blocks of a jaxpr, whether they are in a loop and prevent CSE."""
  found = set()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "remat2" and eqn.params["policy"]:
      found.add((looped, eqn.params["prevent_cse"]))
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
      if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
        found |= _rematerialised(inner, looped or eqn.primitive.name == "scan")
  return found


@pytest.mark.cpu
@pytest.mark.parametrize("unroll", [1, 99])
def test_unstacked_layers_give_the_same_logits_as_stacked_ones(unroll):
  v, net = tiny.variables(tiny.V3), model.Transformer(tiny.V3, unroll=unroll)
  unstacked, restack = jax.vjp(net.by_layer, v["params"])
  assert (jax.tree.structure(unstacked) == jax.tree.structure(v["params"])) == (unroll == 1)
  jax.tree.map(np.testing.assert_array_equal, restack(unstacked)[0], v["params"])
  logits = jax.jit(lambda p: net.apply(v | {"params": p}, tiny.tokens(tiny.V3)).logits_BTV)
  np.testing.assert_array_equal(logits(unstacked), logits(v["params"]))


@pytest.mark.parametrize(("unroll", "want"), [(1, {(True, False), (False, True)}),
                                              (2, {(False, True)})])
def test_remat_outside_a_loop_prevents_common_subexpression_elimination(unroll, want):
  # The model has a single dense layer, two MoE layers, and MTP modules.
  net = model.Transformer(tiny.V3, remat="full", unroll=unroll)
  run = lambda tokens_BT: net.apply(tiny.variables(tiny.V3), tokens_BT).mtp_hidden
  assert _rematerialised(jax.make_jaxpr(run)(tiny.tokens(tiny.V3)).jaxpr) == want


@pytest.mark.cpu
def test_unused_outputs_are_not_computed():
  cfg = dataclasses.replace(tiny.V3, vocab_size=4096, mtp=model.MTPConfig(depth=1))
  shapes = (model.abstract_variables(cfg), jax.ShapeDtypeStruct((2, 32), jnp.int32))
  transformer = model.Transformer(cfg)

  def cost(pick, **kwargs):
    lowered = jax.jit(lambda v, t: pick(transformer.apply(v, t, **kwargs))).lower(*shapes)
    return lowered.compile().cost_analysis()["flops"]

  head = 2 * 2 * 32 * cfg.d_model * cfg.vocab_size
  hidden = cost(lambda out: out.hidden_BTD)
  assert hidden == pytest.approx(cost(lambda out: out.hidden_BTD, logits=False, mtp=False), 0.01)
  assert hidden < head / 4
  logits = cost(lambda out: out.logits_BTV)
  assert head < logits < 1.2 * (head + hidden)
  assert cost(lambda out: out.mtp_logits) > head + hidden
  if jax.default_backend() != "cpu":  # other backends have no single name for top-k
    return
  # The balance statistics need a second top-k, which the hidden states do not.
  text = jax.jit(lambda v, t: transformer.apply(v, t).hidden_BTD).lower(*shapes).compile().as_text()
  with_stats = jax.jit(lambda v, t: transformer.apply(v, t).router).lower(*shapes).compile()
  assert text.count("TopK") < with_stats.as_text().count("TopK")


@pytest.mark.parametrize("init", [
    lambda cfg: model.init(cfg, jax.random.key(3)), lambda cfg: model.init_on_host(cfg, 3)])
def test_initialisation_has_a_single_std_with_norms_one_and_biases_zero(init):
  cfg = dataclasses.replace(
      NO_MTP, attention=tiny.MQA.attention, d_model=64, num_layers=2, num_dense_layers=0,
      tie_embeddings=True, init_std=0.006)
  variables = init(cfg)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
      lambda x: x.shape, model.abstract_variables(cfg))
  for path, leaf in jax.tree_util.tree_flatten_with_path(variables["params"])[0]:
    if path[-1].key == "scale":
      assert (leaf == 1).all()
    else:
      # Within five standard errors of a normal sample's standard deviation and mean.
      assert abs(leaf.std() / 0.006 - 1) < 5 / np.sqrt(2 * leaf.size)
      assert abs(leaf.mean()) < 5 * 0.006 / np.sqrt(leaf.size)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(variables["router"]))


def test_mtp_with_a_cache_and_a_cache_without_slots_are_refused():
  cfg = tiny.V3
  cache = model.init_cache(cfg, 2, 12)
  with pytest.raises(ValueError, match="neither MTP modules nor segment"):
    model.Transformer(cfg).apply(tiny.variables(cfg), tiny.tokens(cfg), cache=cache, mtp=True)
  with pytest.raises(ValueError, match="num_slots >= 1"):
    model.init_cache(cfg, 2, 0)
