"""The model computes the papers' equations: a float64 reference, and invariants that follow.

The reference is written from the text alone (arXiv:2412.19437 section 2, arXiv:2405.04434 section
2.2, arXiv:2408.15664), with matrices as the papers write them, W in R^{out x in}, one token at
a time. Only `paper_weights` and the functions below it know the library's parameters.

Shape letters:  B sequences  T tokens  D model width  V vocabulary  E routed experts  N tokens
                K experts per token  M expert groups
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
from model import balance, mla, moe, rope

# The reference.


def rms_norm(x, gain, eps=1e-6):
  return x / np.sqrt(np.mean(x * x) + eps) * gain


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def swiglu(w, x):
  gate = w["W1"] @ x
  return w["W2"] @ (gate / (1 + np.exp(-gate)) * (w["W3"] @ x))


def yarn_frequencies(dim, base, s=1.0, length=4096, beta_fast=32, beta_slow=1):
  pair = lambda turns: dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base))
  low, high = math.floor(pair(beta_fast)), math.ceil(pair(beta_slow))
  freq = np.array([base ** (-2 * i / dim) for i in range(dim // 2)])
  ramp = np.array([min(max((i - low) / (high - low), 0), 1) for i in range(dim // 2)])
  return freq / s * ramp + freq * (1 - ramp)


def rotated(x, angles):
  """Rotates adjacent pairs of the last axis, as complex numbers, by the given angles."""
  z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
  return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def attention(w, x_TD, a, freqs, m):
  """Attention by eq. 1-11; `m` is YaRN's temperature, whose square multiplies the softmax scale."""
  heads, queries, keys, values, out = a.num_heads, [], [], [], []
  scale = m**2 / math.sqrt(a.qk_nope_head_dim + a.qk_rope_head_dim)
  for t, x in enumerate(x_TD):
    c_kv = rms_norm(w["DKV"] @ x, w["kv_norm"])
    c_q = rms_norm(w["DQ"] @ x, w["q_norm"]) if "DQ" in w else x
    k_R = rotated(w["KR"] @ x, t * freqs)
    q_R = rotated((w["QR"] @ c_q).reshape(heads, -1), t * freqs)
    q_C, k_C = (w["UQ"] @ c_q).reshape(heads, -1), (w["UK"] @ c_kv).reshape(heads, -1)
    queries.append([np.concatenate([q_C[i], q_R[i]]) for i in range(heads)])
    keys.append([np.concatenate([k_C[i], k_R]) for i in range(heads)])
    values.append((w["UV"] @ c_kv).reshape(heads, -1))
    o = []
    for i in range(heads):
      p = softmax(np.array([queries[t][i] @ keys[j][i] * scale for j in range(t + 1)]))
      o.append(sum(p[j] * values[j][i] for j in range(t + 1)))
    out.append(w["O"] @ np.concatenate(o))
  return np.array(out)


def top(x, k):
  """Returns the indices of the k largest, which float32 error must not change; ties go by index."""
  order = np.argsort(-x, kind="stable")
  gap = x[order[k - 1]] - x[order[k]] if k < len(x) else 1.0
  assert gap == 0 or gap > 1e-5, "a near tie: choose another seed"
  return order[:k].tolist()


def kept_groups(biased, c):
  best = {"top2": 2, "max": 1}[c.group_score]
  scores = [sum(sorted(group)[-best:]) for group in np.split(biased, c.num_groups)]
  return top(np.array(scores), c.groups_per_token)


def gates(s, bias, c):
  """Returns {expert: gate} by eq. 13-16, times the route scale; V2 does not renormalise."""
  kept, size = kept_groups(s + bias, c), c.num_experts // c.num_groups
  masked = [s_b if i // size in kept else -np.inf for i, s_b in enumerate(s + bias)]
  chosen = top(np.array(masked), c.experts_per_token)
  total = sum(s[i] for i in chosen) if c.normalize_gates else 1.0
  return {i: s[i] / total * c.route_scale for i in chosen}


def moe_ffn(w, u, c):
  """Returns eq. 12 without its residual, the scores, and whether each expert was chosen."""
  logits = w["e"] @ u
  s = softmax(logits) if c.score == "softmax" else 1 / (1 + np.exp(-logits))
  g = gates(s, w["b"], c)
  y = sum(swiglu(expert, u) for expert in w["shared"])
  y = y + sum(gate * swiglu(w["routed"][i], u) for i, gate in g.items())
  return y, s, [i in g for i in range(len(s))]


def block(w, x_TD, cfg, seen):
  """Applies pre-norm attention and FFN; appends a router's scores and choices [T, E] to `seen`."""
  scaling = cfg.rope.scaling
  freqs, m = yarn_frequencies(cfg.attention.qk_rope_head_dim, cfg.rope.theta), 1.0
  if scaling:
    freqs = yarn_frequencies(
        cfg.attention.qk_rope_head_dim, cfg.rope.theta, scaling.factor, scaling.original_seq_len,
        scaling.beta_fast, scaling.beta_slow)
    m = 0.1 * scaling.mscale * math.log(scaling.factor) + 1
  h_TD = np.array([rms_norm(x, w["attention_norm"]) for x in x_TD])
  x_TD = x_TD + attention(w["attention"], h_TD, cfg.attention, freqs, m)
  u_TD = [rms_norm(x, w["ffn_norm"]) for x in x_TD]
  if "e" not in w["ffn"]:
    return x_TD + np.array([swiglu(w["ffn"], u) for u in u_TD])
  y, s, chosen = zip(*[moe_ffn(w["ffn"], u, cfg.moe) for u in u_TD], strict=True)
  seen.append((np.array(s), np.array(chosen)))
  return x_TD + np.array(y)


def paper_forward(w, tokens, cfg):
  """Returns a sequence's final hidden states by depth (0: trunk), and what each router computed."""
  x_TD, seen, result = w["embedding"][tokens], [], []
  for layer in w["layers"]:
    x_TD = block(layer, x_TD, cfg, seen)
  result.append(np.array([rms_norm(x, w["norm"]) for x in x_TD]))
  for k, module in enumerate(w["mtp"], start=1):
    previous_TD = result[-1] if cfg.mtp.hidden == "post_norm" else x_TD
    pairs = []
    for i in range(len(tokens) - k):
      h = rms_norm(previous_TD[i], module["hidden_norm"])
      e = rms_norm(w["embedding"][tokens[i + k]], module["embedding_norm"])
      pairs.append(module["M"] @ np.concatenate(
          [h, e] if cfg.mtp.concat == "hidden_first" else [e, h]))
    x_TD = block(module["block"], np.array(pairs), cfg, seen)
    result.append(np.array([rms_norm(x, module["norm"]) for x in x_TD]))
  return result, seen


def among_top(s_TE, k):
  return np.array([[i in top(s, k) for i in range(len(s))] for s in s_TE])


def balance_loss(s_TE, counted_TE, k, devices=None):
  """Returns eq. 17-20 with alpha = 1; V2's f' is a device's mean f, and its P' a device's sum of P.

  f counts the assignments in `counted_TE`; every expert is a device of its own without `devices`.
  """
  num_tokens, num_experts = s_TE.shape
  f_E = num_experts / (k * num_tokens) * counted_TE.sum(0)
  P_E = sum(s / s.sum() for s in s_TE) / num_tokens
  f_M, P_M = (np.split(x, devices or num_experts) for x in (f_E, P_E))
  return sum(f.mean() * P.sum() for f, P in zip(f_M, P_M, strict=True))


# The library, compared with the reference.

BATCH, TOKENS = 2, 13
V3_LIKE = model.ModelConfig(
    vocab_size=67, d_model=40, num_layers=3, num_dense_layers=1, ffn_dim=56,
    attention=model.MLAConfig(num_heads=5, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=16,
                              qk_rope_head_dim=8, v_head_dim=11),
    moe=model.MoEConfig(num_experts=18, experts_per_token=4, expert_dim=14, num_shared_experts=2,
                        num_groups=6, groups_per_token=3),
    mtp=model.MTPConfig(depth=2), init_std=0.25,
    rope=model.RopeConfig(theta=1000.0, scaling=model.YarnScaling(
        original_seq_len=128, beta_fast=8.0)))
V2_LIKE = dataclasses.replace(
    V3_LIKE, attention=dataclasses.replace(V3_LIKE.attention, q_lora_rank=None),
    moe=dataclasses.replace(
        V3_LIKE.moe, group_score="max", score="softmax", normalize_gates=False, route_scale=16.0,
        balancing_bias=False),
    mtp=model.MTPConfig(depth=2, concat="embedding_first", hidden="pre_norm"),
    rope=model.RopeConfig())
NETWORKS = {
    "v3": model.Transformer(V3_LIKE, mla_form="expanded", experts="slots"),
    "v2": model.Transformer(V2_LIKE, mla_form="absorbed", experts="grouped"),
}
# One unit in the last place for every term of the widest projection (2D) in every block and head.
TOLERANCE = float(jnp.finfo(jnp.float32).eps) * 2 * V3_LIKE.d_model * (
    V3_LIKE.num_layers + V3_LIKE.mtp.depth + 1)


def random_variables(cfg, rng):
  """Draws norms away from 1, biases away from 0, and two matrices so small that eps matters."""
  def draw(path, leaf):
    name, noise = path[-1].key, rng.standard_normal(leaf.shape)
    spread = {"bias": 0.2, "embedding": 0.02, "w_dq": 0.003}.get(name, cfg.init_std)
    return np.float32(1 + 0.3 * noise if name == "scale" else spread * noise)
  return jax.tree_util.tree_map_with_path(draw, model.abstract_variables(cfg))


def paper_weights(variables, cfg):
  """Returns the library's parameters as the papers' matrices, in float64."""
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
  params, router = wide["params"], wide.get("router", {})
  a, c = cfg.attention, cfg.moe
  flat = lambda w: w.reshape(len(w), -1).T
  gain = lambda p, *names: {name: p[name]["scale"] for name in names if name in p}
  ffn = lambda gate_up, down: {"W1": gate_up[:, 0].T, "W3": gate_up[:, 1].T, "W2": down.T}

  def experts(p, bias):
    up, down = p["shared"]["w_gate_up"], p["shared"]["w_down"]
    parts = [slice(n * c.expert_dim, (n + 1) * c.expert_dim) for n in range(c.num_shared_experts)]
    return {"e": p["router"]["centroids"].T, "b": bias,
            "shared": [ffn(up[..., part], down[part]) for part in parts],
            "routed": list(map(ffn, p["w_gate_up"], p["w_down"]))}

  def layer(p, state):
    p_a, p_f = p["attention"], p["ffn"]
    w_q, w_dkv = p_a.get("w_q", p_a.get("w_uq")), p_a["w_dkv"]
    w = {"DKV": w_dkv[:, :a.kv_lora_rank].T, "KR": w_dkv[:, a.kv_lora_rank:].T,
         "UQ": flat(w_q[..., :a.qk_nope_head_dim]), "QR": flat(w_q[..., a.qk_nope_head_dim:]),
         "UK": flat(p_a["w_uk"]), "UV": flat(p_a["w_uv"]), "O": np.concatenate(p_a["w_o"]).T,
         **gain(p_a, "kv_norm", "q_norm")}
    if "w_dq" in p_a:
      w["DQ"] = p_a["w_dq"].T
    bias = state["ffn"]["router"]["bias"] if state else 0.0
    return {"attention": w, **gain(p, "attention_norm", "ffn_norm"),
            "ffn": experts(p_f, bias) if "router" in p_f else ffn(p_f["w_gate_up"], p_f["w_down"])}

  def module(name):
    p = params[name]
    return {"M": p["w_proj"].T, **gain(p, "hidden_norm", "embedding_norm", "norm"),
            "block": layer(p["block"], router.get(name, {}).get("block"))}

  take = lambda name, i: [jax.tree.map(lambda x: x[i], tree.get(name)) for tree in (params, router)]
  return {
      "embedding": params["embedding"]["embedding"], "head": params["embedding"]["head"].T,
      **gain(params, "norm"),
      "layers": [layer(*take(name, i)) for name, n, _ in cfg.layer_stacks() for i in range(n)],
      "mtp": [module(f"mtp_{k + 1}") for k in range(cfg.mtp.depth)]}


def router_views(output):
  """Returns the RouterStats of every MoE layer in order, then those of the MTP modules."""
  layers = [jax.tree.map(lambda x, n=n: x[n], output.router["moe_layers"]) for n in (0, 1)]
  return [*layers, output.router["mtp_1"], output.router["mtp_2"]]


@functools.cache
class Both:
  """One random model, run by the library and by the reference."""

  def __init__(self, name):
    rng = np.random.default_rng(8)
    self.network = NETWORKS[name]
    self.cfg = self.network.cfg
    self.variables = random_variables(self.cfg, rng)
    self.tokens_BT = rng.integers(0, self.cfg.vocab_size, (BATCH, TOKENS)).astype(np.int32)
    self.run = jax.jit(self.network.apply)
    self.output = jax.device_get(self.run(self.variables, self.tokens_BT))
    self.weights = paper_weights(self.variables, self.cfg)
    hidden, seen = zip(
        *[paper_forward(self.weights, tokens, self.cfg) for tokens in self.tokens_BT], strict=True)
    self.hidden = list(map(np.stack, zip(*hidden, strict=True)))  # by depth
    self.seen = list(zip(*seen, strict=True))  # by router, then by sequence


def assert_near(ours, papers):
  papers = np.asarray(papers)
  assert ours.shape == papers.shape
  np.testing.assert_allclose(ours, papers, rtol=0, atol=TOLERANCE * np.abs(papers).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_states_and_logits_of_every_depth_equal_the_papers(name):
  both = Both(name)
  hidden = (both.output.hidden_BTD, *both.output.mtp_hidden)
  logits = (both.output.logits_BTV, *both.output.mtp_logits)
  assert len(hidden) == len(both.hidden) == 3
  for k, papers_BTD in enumerate(both.hidden):
    papers_BTV = papers_BTD @ both.weights["head"].T
    assert np.abs(papers_BTV).max() > 3
    assert_near(hidden[k][:, :TOKENS - k], papers_BTD)
    assert_near(logits[k][:, :TOKENS - k], papers_BTV)


@pytest.mark.parametrize("name", NETWORKS)
def test_router_statistics_are_counts_and_sums_over_the_papers_routing(name):
  both = Both(name)
  views, top_k, differ = router_views(both.output), both.cfg.moe.experts_per_token, 0
  for n, (stats, sequences) in enumerate(zip(views, both.seen, strict=True)):
    tops = [among_top(s, top_k).sum(0) for s, _ in sequences]
    np.testing.assert_array_equal(stats.load_BE, [chosen.sum(0) for _, chosen in sequences])
    np.testing.assert_array_equal(stats.top_BE, tops)
    assert_near(stats.affinity_BE, [sum(s / s.sum() for s in s_TE) for s_TE, _ in sequences])
    np.testing.assert_array_equal(stats.tokens_B, BATCH * [TOKENS - max(0, n - 1)])
    differ += (stats.load_BE != stats.top_BE).sum()
  assert differ > 20, "the bias and the groups should change the choice of experts"
  np.testing.assert_array_equal(
      both.output.expert_load_LE, [stats.load_BE.sum(0) for stats in views[:2]])


@pytest.mark.parametrize("name", NETWORKS)
def test_balance_losses_equal_the_papers_in_every_scope(name):
  both = Both(name)
  top_k, groups = both.cfg.moe.experts_per_token, both.cfg.moe.num_groups
  for stats, sequences in zip(router_views(both.output), both.seen, strict=True):
    s_NE, used_NE = (np.concatenate(part) for part in zip(*sequences, strict=True))
    assert_near(balance.sequence_balance_loss(stats, top_k),
                [balance_loss(s, among_top(s, top_k), top_k) for s, _ in sequences])
    assert_near(balance.batch_balance_loss(stats, top_k),
                balance_loss(s_NE, among_top(s_NE, top_k), top_k))
    assert_near(balance.expert_balance_loss(stats, top_k), balance_loss(s_NE, used_NE, top_k))
    assert_near(balance.device_balance_loss(stats, top_k, groups),
                balance_loss(s_NE, used_NE, top_k, devices=groups))
    load_E = used_NE.sum(0)
    assert_near(balance.max_violation(stats.load_BE.sum(0)),
                (load_E.max() - load_E.mean()) / load_E.mean())


def test_gradient_of_router_biases_is_zero():
  both = Both("v3")

  @jax.jit
  @jax.grad
  def gradient(router):
    output = both.network.apply({**both.variables, "router": router}, both.tokens_BT)
    losses = [balance.sequence_balance_loss(stats, 4).sum() for stats in router_views(output)]
    return sum(x.sum() for x in (output.logits_BTV, *output.mtp_logits, *losses))

  assert not any(leaf.any() for leaf in jax.tree.leaves(gradient(both.variables["router"])))


def test_mtp_logits_of_position_i_depend_on_tokens_up_to_i_plus_k_only():
  both = Both("v3")
  before = (both.output.logits_BTV, *both.output.mtp_logits)
  for j in range(TOKENS):
    tokens_BT = both.tokens_BT.copy()
    tokens_BT[:, j] = (tokens_BT[:, j] + 1) % both.cfg.vocab_size
    output = both.run(both.variables, tokens_BT)
    for k, logits_BTV in enumerate((output.logits_BTV, *output.mtp_logits)):
      change_BT = np.abs(logits_BTV - before[k]).max(-1) / np.abs(before[k]).max()
      assert (change_BT[:, :max(0, j - k)] < TOLERANCE).all()
      assert j < k or (change_BT[:, j - k] > 100 * TOLERANCE).all()


# Invariants of the equations.

V3, V2, LITE = (model.get_config(f"deepseek_{name}") for name in ("v3", "v2", "v2_lite"))


@pytest.mark.parametrize(("cfg", "offset"), [(V3.moe, 0.0), (V3.moe, -4.0), (V2.moe, 0.0)],
                         ids=["v3", "v3 with negative s + b", "v2"])
def test_routing_at_full_width_equals_the_papers_choice_and_gates(cfg, offset):
  rng, shape = np.random.default_rng(3), (64, cfg.num_experts)
  s_NE = rng.integers(1, 2**12, shape) / 2**12  # multiples of 2^-12, so that s + b is exact
  bias_E = rng.integers(-2**9, 2**9, shape[1]) / 2**12 + offset
  gates_NK, experts_NK = map(np.asarray, moe.route(jnp.float32(s_NE), jnp.float32(bias_E), cfg))
  for s, g, experts in zip(s_NE, gates_NK, experts_NK, strict=True):
    papers = gates(s, bias_E, cfg)
    assert set(papers) == set(experts.tolist())
    np.testing.assert_allclose(g, [papers[i] for i in experts], rtol=1e-6)
    groups = set((experts * cfg.num_groups // cfg.num_experts).tolist())
    assert groups <= set(kept_groups(s + bias_E, cfg))
  if cfg.normalize_gates:
    np.testing.assert_allclose(gates_NK.sum(-1), 2.5, rtol=1e-6)


def test_gates_are_the_same_under_every_bias_that_chooses_the_same_experts():
  rng, chosen = np.random.default_rng(4), np.arange(3, 128, 16)
  s_NE = np.float32(rng.uniform(0.01, 1, (32, V3.moe.num_experts)))
  for push in (10.0, 100.0, rng.uniform(10, 50, len(chosen))):
    bias_E = np.zeros(V3.moe.num_experts, np.float32)
    bias_E[chosen] = push
    routing = moe.route(jnp.array(s_NE), bias_E, V3.moe)
    order_NK = np.argsort(routing.experts_NK)
    assert (np.sort(routing.experts_NK) == chosen).all()
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(routing.gates_NK), order_NK, -1),
        2.5 * s_NE[:, chosen] / s_NE[:, chosen].sum(-1, keepdims=True), rtol=1e-6)


def test_bias_steps_by_gamma_towards_the_mean_load():
  rng, gamma = np.random.default_rng(5), 0.125
  load_LE = np.array([[7] * 18, [6, 7, 8] * 6, *rng.integers(0, 9, (4, 18))])
  bias_LE = np.float32(rng.integers(-8, 8, load_LE.shape))
  updated_LE = balance.update_bias(bias_LE, jnp.int32(load_LE), gamma)
  for load, old, new in zip(load_LE, bias_LE, updated_LE, strict=True):
    np.testing.assert_array_equal(new, [
        b + gamma * np.sign(load.sum() - 18 * c) for c, b in zip(load, old, strict=True)])
  assert set(np.unique(np.abs(updated_LE - bias_LE))) == {0, gamma}


def test_bias_is_unchanged_by_equal_loads_of_a_batch_of_v3s_size():
  load_E = jnp.full(V3.moe.num_experts, 15360 * 4096 * 8 // 256 + 1)
  updated_E = balance.update_bias(jnp.zeros(len(load_E)), load_E, 1e-3)
  np.testing.assert_array_equal(updated_E, np.zeros(len(load_E)))


def test_every_balance_loss_is_alpha_at_uniform_routing():
  num_experts, top_k, devices = 18, 4, 6
  s_TE = [np.roll(np.linspace(0.9, 0.1, num_experts), t) for t in range(num_experts)]
  s_BTE = jnp.float32([s_TE, s_TE])
  stats = moe.router_stats(s_BTE, jax.lax.top_k(s_BTE, top_k)[1], None)
  for loss in (balance.sequence_balance_loss, balance.batch_balance_loss,
               balance.expert_balance_loss,
               functools.partial(balance.device_balance_loss, num_groups=devices)):
    np.testing.assert_allclose(loss(stats, top_k), 1, rtol=1e-6)
  assert balance.max_violation(stats.load_BE.sum(0)) == 0


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_is_monotonic_in_between():
  dim = V3.attention.qk_rope_head_dim
  plain_r = rope.frequencies(model.RopeConfig(), dim)
  scaled_r = rope.frequencies(V3.rope, dim)
  np.testing.assert_allclose(plain_r, yarn_frequencies(dim, 1e4), rtol=1e-7)
  np.testing.assert_allclose(scaled_r, yarn_frequencies(dim, 1e4, s=40), rtol=1e-7)
  np.testing.assert_array_equal(scaled_r[:11], plain_r[:11])
  np.testing.assert_array_equal(scaled_r[23:], np.float32(yarn_frequencies(dim, 1e4)[23:] / 40))
  assert (np.diff(plain_r / scaled_r)[10:23] > 0).all()


def test_yarn_multiplies_the_softmax_scale_by_its_squared_temperature():
  assert V3.rope.scaling.softmax_scale == pytest.approx(1.873854, abs=5e-7)
  assert mla.softmax_scale(V3) == pytest.approx(0.135234, abs=5e-7)
  assert mla.softmax_scale(dataclasses.replace(V3, rope=model.RopeConfig())) == pytest.approx(
      0.0721688, abs=5e-8)
  for cfg in (V2, LITE):
    assert cfg.rope.scaling.softmax_scale == pytest.approx(1.58963, abs=5e-6)
  assert {cfg.rope.scaling.rotation_scale for cfg in (V3, V2, LITE)} == {1.0}


def test_cache_keeps_the_latent_and_one_rotated_key_per_layer():
  for cfg, elements in ((V3, 35_136), (V2, 34_560), (LITE, 15_552)):
    assert cfg.kv_cache_elements_per_token() == elements
    held = jax.eval_shape(functools.partial(model.init_cache, cfg, batch=1, num_slots=1))
    assert sum(entry.size for entry in held.entries.values()) == elements


def paper_counts(d, layers, dense, width, vocab, n_h, d_q, d_c, d_h, d_R, d_v, N_s, N_r, K_r, F):
  """Returns billions: total, active (with head, without input embedding), MTP's own, its active."""
  queries = d * d_q + d_q + d_q * n_h * (d_h + d_R) if d_q else d * n_h * (d_h + d_R)
  attention = queries + d * (d_c + d_R) + d_c + d_c * n_h * (d_h + d_v) + n_h * d_v * d + 2 * d
  experts = lambda n: attention + d * N_r + 3 * d * F * (N_s + n)
  trunk = lambda n: dense * (attention + 3 * d * width) + (layers - dense) * experts(n) + d
  mtp = lambda n: experts(n) + 2 * d * d + 3 * d
  return [n / 1e9 for n in (trunk(N_r) + 2 * vocab * d, trunk(K_r) + vocab * d, mtp(N_r), mtp(K_r))]


DIMS = {  # config: the arguments of paper_counts
    "v3": (7168, 61, 3, 18432, 129280, 128, 1536, 512, 128, 64, 128, 1, 256, 8, 2048),
    "v2": (5120, 60, 1, 12288, 102400, 128, 1536, 512, 128, 64, 128, 2, 160, 6, 1536),
    "v2_lite": (2048, 27, 1, 10944, 102400, 16, None, 512, 128, 64, 128, 2, 64, 6, 1408),
}


def test_parameter_counts_equal_the_papers_to_a_million():
  counts = {name: paper_counts(*dims) for name, dims in DIMS.items()}
  for name, (total, active, _, _) in counts.items():
    cfg = model.get_config(f"deepseek_{name}")
    assert cfg.param_count() / 1e9 == pytest.approx(total, abs=1e-3)
    assert cfg.active_param_count() / 1e9 == pytest.approx(active, abs=1e-3)
  assert V3.mtp_param_count() / 1e9 == pytest.approx(counts["v3"][2], abs=1e-3)
  assert [round(n, 3) for n in (counts["v3"][0], counts["v3"][2])] == [671.026, 11.610]
  assert [round(counts["v3"][n], 2) for n in (1, 3)] == [36.63, 0.69]
  assert (round(counts["v2"][0], 2), round(counts["v2"][1])) == (235.74, 21)
  assert (round(counts["v2_lite"][0], 3), round(counts["v2_lite"][1], 2)) == (15.706, 2.45)
