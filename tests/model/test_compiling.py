import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import compiling, get_config
from model.compiling import jit
from pallas_kernels.targets import Target, compiled_for

# An option that compilers for CPUs accept as well, so that it can be told apart there.
_OPTIONS = {"xla_llvm_disable_expensive_passes": True}


@pytest.fixture
def with_options(monkeypatch):
  """Makes programs of this process's backend take options."""
  monkeypatch.setattr(compiling, "compiler_options", lambda **_: dict(_OPTIONS))


def test_a_jitted_function_takes_static_and_donated_arguments(with_options):
  power = jit(lambda x, n: x**n, static_argnames="n", donate_argnums=0)
  x = jnp.full(3, 2.0)
  np.testing.assert_array_equal(power(x, n=3), np.full(3, 8.0))
  assert x.is_deleted()


def test_options_reach_the_compiler(with_options, monkeypatch):
  assert jit(lambda x: x + 1).lower(1.0).compile()(1.0) == 2
  monkeypatch.setattr(compiling, "compiler_options", lambda **_: {"xla_no_such_option": True})
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
    jit(lambda x: x + 1)(1.0)


def test_within_transformations_a_jitted_function_has_no_options(with_options):
  """JAX refuses options of a function that is part of another program."""
  square = jit(lambda x: x * x)
  assert jax.jit(lambda x: square(x) + 1)(3.0) == 10
  assert jax.jit(lambda: square(np.float32(3)))() == 9
  assert jax.grad(square)(3.0) == 6
  np.testing.assert_array_equal(jax.vmap(square)(jnp.arange(3.0)), [0, 1, 4])
  mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec("x")
  np.testing.assert_array_equal(
      jax.shard_map(square, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.arange(3.0)), [0, 1, 4])


def test_gpu_programs_are_not_tuned_unless_the_environment_says_so(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  assert compiling.compiler_options() == {}
  with compiled_for(Target("gpu", "NVIDIA H200", 9.0)):
    assert compiling.compiler_options() == {"xla_gpu_enable_triton_gemm": False}
    assert compiling.compiler_options(tuned=True) == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert compiling.compiler_options() == {}


@pytest.mark.parametrize(("name", "unroll", "expected"), [
    ("nano", 1, False), ("small", 1, True), ("small", 6, True), ("small", 7, False),
    ("base", 12, False), ("base", 1, True)])
def test_large_networks_with_a_loop_over_layers_are_tuned(name, unroll, expected):
  assert compiling.is_tuned(get_config(name), unroll) == expected
