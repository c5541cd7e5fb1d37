"""Settings: parsing of every type, joint application, and error messages with what is allowed."""

import dataclasses
import itertools
import json
import re
from typing import Literal

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

import model
from experiments import settings
from experiments.studies.r1 import r1_zero
from model import GQAConfig, LinearScaling, MTPConfig, YarnScaling
from pallas_kernels import RECIPES
from pallas_kernels.recipe import Operand
from train.config import DataConfig, RunConfig, Source
from train.config_io import flatten, from_dict, to_dict

NANO = RunConfig(model=model.get_config("nano"))
NAMED = {"model": model.get_config}


@dataclasses.dataclass(frozen=True)
class Scalars:
  flag: bool = False
  count: int = 0
  rate: float = 0.0
  word: str = "a"
  choice: Literal["a", "b"] = "a"
  limit: int | None = None
  counts: tuple[int, ...] = ()
  words: tuple[str, ...] | None = None
  level: Literal[1, 2] | float = 1


def apply(*assignments, config=NANO):
  return settings.apply(config, assignments, named=NAMED)


def errors(*assignments, config=NANO) -> list[str]:
  with pytest.raises(ValueError) as caught:
    apply(*assignments, config=config)
  return str(caught.value).split("\n")


@pytest.mark.parametrize(("field", "text", "value"), [
    *(("flag", text, True) for text in ("true", "True", "1", "yes")),
    *(("flag", text, False) for text in ("false", "FALSE", "0", "no")),
    ("count", "12", 12), ("count", "-3", -3), ("count", "1_000", 1000), ("count", "1e6", 10**6),
    ("count", "9007199254740993", 2**53 + 1), ("count", "2.0", 2),
    ("rate", "3e-4", 3e-4), ("rate", "1", 1.0), ("rate", " -.5 ", -0.5),
    ("word", "none", "none"), ("word", "a=b", "a=b"), ("word", "1", "1"),
    ("word", "'quoted, '", "quoted, "), ("word", "o'brien", "o'brien"), ("word", "f(x)", "f(x)"),
    ("choice", "b", "b"), ("level", "2", 2), ("level", "2.5", 2.5),
    ("limit", "none", None), ("limit", "None", None), ("limit", "7", 7),
    ("counts", "", ()), ("counts", "1", (1,)), ("counts", "1, 2,3e0", (1, 2, 3)),
    ("counts", "(1, 2)", (1, 2)), ("counts", "(1,)", (1,)), ("counts", "()", ()),
    ("words", "none", None), ("words", "", ()), ("words", "'a,b',c", ("a,b", "c")),
    ("words", "f[0,1].txt,(x,y)", ("f[0,1].txt", "(x,y)")), ("words", "it's,b", ("it's", "b")),
])
def test_values_of_every_type_are_parsed(field, text, value):
  parsed = getattr(apply(f"{field}={text}", config=Scalars()), field)
  assert parsed == value and type(parsed) is type(value)


@hypothesis.settings(deadline=None)
@given(st.builds(Scalars, flag=st.booleans(), count=st.integers(), limit=st.none() | st.integers(),
                 rate=st.floats(allow_nan=False, allow_infinity=False),
                 counts=st.lists(st.integers()).map(tuple)))
def test_values_survive_a_round_trip_through_text_and_through_json(config):
  parsed = apply(*(f"{name}={value}" for name, _, value in settings.fields(config)),
                 config=Scalars())
  assert parsed == config
  assert from_dict(Scalars, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(("assignment", "message"), [
    ("flag=maybe", "flag='maybe' must be bool: true or false"),
    ("count=32a", "count='32a' must be int: a whole number such as 12, 1_000 or 1e6"),
    ("count=1.5", "count='1.5' must be int: a whole number such as 12, 1_000 or 1e6"),
    ("count=1e23", "count='1e23' must be int: a whole number such as 12, 1_000 or 1e6"),
    ("count=", "count='' must be int: a whole number such as 12, 1_000 or 1e6"),
    ("rate=nan", "rate='nan' must be float: a finite number such as 0.1 or 3e-4"),
    ("rate=-inf", "rate='-inf' must be float: a finite number such as 0.1 or 3e-4"),
    ("rate=1e999", "rate='1e999' must be float: a finite number such as 0.1 or 3e-4"),
    ("rate=none", "rate='none' must be float: a finite number such as 0.1 or 3e-4"),
    ("choice=c", "choice='c' must be a | b"),
    ("limit=x", "limit='x' must be int | none: a whole number such as 12, 1_000 or 1e6"),
    ("counts=1,x", "counts[1]='x' must be int: a whole number such as 12, 1_000 or 1e6"),
    ("counts=1,,2", "counts[1]='' must be int: a whole number such as 12, 1_000 or 1e6"),
])
def test_an_invalid_value_is_reported_with_what_is_expected(assignment, message):
  assert errors(assignment, config=Scalars()) == [message]


def test_empty_text_is_refused_unless_it_has_a_meaning():
  empty = "is empty, perhaps from a variable that is not set: give a value"
  assert errors("init=", "data.cache_dir=' '", "data.tokenizer=''",
                "data.sources=Source(path=x, domain=)") == [
      f"data.sources[0].domain {empty}, or none", f"data.tokenizer {empty}",
      f"data.cache_dir {empty}, or none", f"init {empty}, or none"]
  assert apply("data.template=chat", "data.system=").data.system == ""


def test_settings_that_are_valid_only_jointly_are_accepted_in_any_order():
  joint = ("model=micro", "model.moe.num_experts=6", "model.moe.num_groups=3",
           "model.moe.experts_per_token=3")
  assert errors(*joint[:2]) == [
      "model.moe: MoEConfig.num_experts=6 does not divide into num_groups=4"]
  outcomes = {apply(*order) for order in itertools.permutations(joint)}
  micro = model.get_config("micro")
  moe = dataclasses.replace(micro.moe, num_experts=6, num_groups=3, experts_per_token=3)
  assert outcomes == {dataclasses.replace(NANO, model=dataclasses.replace(micro, moe=moe))}


def test_a_union_field_switches_its_class_and_further_fields_apply_to_the_new_class():
  switch = "model.attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=32)"
  assert apply(switch).model.attention == GQAConfig(4, 2, 32)
  assert apply("model.attention.qkv_bias=yes", switch).model.attention == GQAConfig(4, 2, 32, True)
  assert apply("model.rope.scaling.factor=2", "model.rope.scaling=LinearScaling()"
               ).model.rope.scaling == LinearScaling(2.0)
  nested = "model.rope=RopeConfig(layout=half, scaling=YarnScaling(factor=1e1))"
  assert apply(nested).model.rope.scaling == YarnScaling(10.0)


def test_required_fields_can_be_set_separately_and_fields_of_defaults_can_be_set():
  assert apply("model.attention=GQAConfig(head_dim=32)", "model.attention.num_heads=4",
               "model.attention.num_kv_heads=2").model.attention == GQAConfig(4, 2, 32)
  small = "ModelConfig(vocab_size=512, d_model=64, num_layers=1, ffn_dim=64," \
          " attention=GQAConfig(num_heads=4, num_kv_heads=2, head_dim=32))"
  assert apply(f"model={small}", "model.rope.theta=2").model.rope.theta == 2.0
  assert errors(f"model={small}".replace("d_model=64, ", "")) == [
      "model.d_model is missing: ModelConfig needs ModelConfig(vocab_size=int, d_model=int, "
      "num_layers=int, attention=MLAConfig | GQAConfig, ffn_dim=int)"]


def test_none_removes_a_section_and_a_call_restores_it():
  assert apply("model.mtp=none").model.mtp is None
  base = apply("model=base")
  assert base.model.mtp is None
  assert apply("model.mtp.concat=embedding_first", "model.mtp=MTPConfig()", config=base
               ).model.mtp == MTPConfig(concat="embedding_first")
  assert errors("model.mtp.depth=2", config=base) == [
      "model.mtp.depth cannot be set while model.mtp is none; "
      "add --set 'model.mtp=MTPConfig()', which is applied first"]
  assert "add --set 'model.rope.scaling=YarnScaling()' or --set 'model.rope.scaling=Llama3Scaling" \
         in errors("model.rope.scaling.factor=2")[0]


def test_sources_are_parsed_from_paths_and_from_calls():
  text = "data.sources=/a/*.txt,Source(path='b,(c', weight=2),'d,e',f(1).txt"
  assert apply(text).data.sources == (
      Source("/a/*.txt"), Source("b,(c", weight=2.0), Source("d,e"), Source("f(1).txt"))
  assert apply("data=DataConfig(sources=(x,y), seq_len=8)").data == DataConfig(
      sources=(Source("x"), Source("y")), seq_len=8)
  assert errors("data.sources=") == ["data: DataConfig.sources must not be empty"]
  assert errors("data.sources=a,,b") == ["data.sources[1]: Source.path must not be empty"]


@pytest.mark.parametrize(("assignment", "nearest", "allowed"), [
    ("model.moe.num_expert=4", "model.moe.num_experts",
     "model.moe (MoEConfig) has num_experts (int), experts_per_token (int)"),
    ("learning_rate=1", "optimizer.learning_rate", "RunConfig has model (ModelConfig)"),
    ("model.steps=1", "train.steps", "mtp (MTPConfig | none)"),
    ("optimizer.lr=1", "optimizer.learning_rate", "optimizer (OptimizerConfig) has learning_rate"),
    ("optimiser.beta1=1", "optimizer.beta1", "optimizer (OptimizerConfig)"),
    ("data.source=x", "data.sources", "sources (tuple[Source, ...]), tokenizer (str)"),
    ("train.fim_rates=1", "data.fim_rate", "train (TrainConfig) has steps (int)"),
    ("balance.weight_decay=1", "optimizer.weight_decay", "balance (BalanceConfig) has bias_rate"),
    ("num_experts=4", "model.moe.num_experts", "RunConfig has model"),
    ("model.attention=GQAConfig(num_hads=4, num_heads=4, num_kv_heads=2, head_dim=32)",
     "model.attention.num_heads", "model.attention (GQAConfig) has num_heads (int)"),
])
def test_an_unknown_name_is_reported_with_the_nearest_and_the_allowed_names(
    assignment, nearest, allowed):
  message, = errors(assignment)
  assert re.match(rf"[\w.]+ does not exist; did you mean {nearest}", message)
  assert allowed in message


@pytest.mark.parametrize(("assignment", "allowed"), [
    ("model.attention.type=GQAConfig", "model.attention (MLAConfig) has num_heads (int)"),
    ("type=RunConfig", "RunConfig has model"), ("train.xyzzy=1", "train (TrainConfig) has steps")])
def test_no_name_is_suggested_if_none_is_similar(assignment, allowed):
  message, = errors(assignment)
  assert f" does not exist: {allowed}" in message and "did you mean" not in message


def test_sections_that_were_left_out_are_suggested_completely():
  with pytest.raises(ValueError, match=r"did you mean rl\.mesh\.fsdp or base\.mesh\.fsdp\?"):
    settings.apply(r1_zero.STUDY.scales["smoke"].config, ("mesh.fsdp=2",))


@pytest.mark.parametrize(("assignment", "message"), [
    ("train.steps", "'train.steps' must be name=value, for example train.steps=100"),
    ("=3", "'=3' must be name=value, for example train.steps=100"),
    ("train.steps.x=3", "train.steps.x does not exist: train.steps has no fields, it is int"),
    ("data.sources.weight=3", "data.sources.weight does not exist: data.sources has no fields, "
                              "it is tuple[Source, ...]"),
    ("model.mtp=2", "model.mtp='2' must be MTPConfig | none: written MTPConfig()"),
    ("model.attention=Foo()", "model.attention='Foo()' must be MLAConfig | GQAConfig: written "
     "MLAConfig(num_heads=int, kv_lora_rank=int, qk_nope_head_dim=int, qk_rope_head_dim=int, "
     "v_head_dim=int) or written GQAConfig(num_heads=int, num_kv_heads=int, head_dim=int)"),
    ("model.mtp=MTPConfig(2)", "model.mtp=MTPConfig(2): "
                               "'2' must be name=value, for example train.steps=100"),
    ("model.mtp=MTPConfig(depth=1, depth=2)", "model.mtp=MTPConfig(depth=1, depth=2): "
                                              "depth is set twice, to '1' and to '2': keep one"),
    ("model.mtp=MTPConfig(depth=__import__('os'))", "model.mtp.depth=\"__import__('os')\" must be "
     "int: a whole number such as 12, 1_000 or 1e6"),
    ("optimizer.schedule=cosin", "optimizer.schedule='cosin' must be cosine | v3 | constant | wsd"),
    ("optimizer.max_grad_norm=0",
     "optimizer: OptimizerConfig.max_grad_norm=0.0 must be positive"),
])
def test_an_invalid_assignment_is_reported_with_what_is_expected(assignment, message):
  assert errors(assignment) == [message]


def test_an_unknown_model_is_reported_with_the_nearest_name_if_one_is_similar():
  assert errors("model=xyz")[0].startswith("model: no architecture is called 'xyz'. There are: ")
  message, = errors("model=mikro")
  assert message.startswith("model: no architecture is called 'mikro'; did you mean 'micro'?")


def test_all_errors_are_listed_and_sections_with_an_invalid_value_are_not_validated():
  found = errors("train.steps=5", "train.steps=6", "train.seed=x", "train.batch_size=0",
                 "optimizer.max_grad_norm=0", "data.sq_len=3", "nonsense",
                 "model.mtp=MTPConfig(depth=0)")
  assert [message.split(" ")[0] for message in found] == [
      "train.steps", "'nonsense'", "model.mtp:", "data.sq_len", "optimizer:", "train.seed='x'"]


_WORDS = st.sampled_from([*(name for name, _, _ in settings.fields(NANO)), "model", "type", "none",
                          "MTPConfig", "GQAConfig", "Source", "micro", *"()[]=,'. 1"])


@hypothesis.settings(deadline=None)
@given(st.lists(st.lists(_WORDS, max_size=8).map("".join), max_size=3))
def test_arbitrary_assignments_give_a_configuration_or_a_value_error_with_a_message(assignments):
  try:
    assert isinstance(apply(*assignments), RunConfig)
  except ValueError as error:
    assert str(error)


def test_constraints_between_sections_are_validated():
  assert errors("balance.batch_weight=0.1", "train.micro_batch_size=4")[0].startswith(
      "balance.batch_weight and balance.expert_weight take frequencies from the whole batch")


def test_assigned_returns_the_dotted_names_of_all_assignments():
  assert settings.assigned(["model=micro", " model.vocab_size =3", "data.cache_dir=a=b"]) == {
      "model", "model.vocab_size", "data.cache_dir"}


def test_fields_lists_what_can_be_set_with_its_type_and_value():
  rows = {name: (kind, value) for name, kind, value in settings.fields(NANO)}
  assert rows["train.micro_batch_size"] == ("int | none", None)
  assert rows["optimizer.schedule"] == ("cosine | v3 | constant | wsd", "cosine")
  assert rows["model.attention"] == ("MLAConfig | GQAConfig", NANO.model.attention)
  assert rows["data.sources"] == ("tuple[Source, ...]", NANO.data.sources)
  assert flatten(NANO).keys() == rows.keys() - {"model.attention", "model.moe", "model.mtp"}


@pytest.mark.parametrize("name", model.CONFIGS)
def test_every_architecture_survives_json_and_the_command_line(name):
  sources = (Source("a, b", weight=0.5, domain="x"), Source("c", language="de"))
  config = RunConfig(model=model.get_config(name), data=DataConfig(sources), init="/x")
  assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
  assert apply(*(f"{key}={value}" for key, _, value in settings.fields(config))) == config


def test_dicts_that_do_not_fit_the_configuration_are_refused_with_all_reasons():
  plain = to_dict(NANO)
  plain["train"]["stepz"] = 1
  plain["data"]["seq_len"] = "long"
  del plain["model"]["d_model"], plain["model"]["attention"]["type"]
  with pytest.raises(ValueError) as caught:
    from_dict(RunConfig, plain)
  for message in ("train.stepz does not exist: TrainConfig has steps,", "data.seq_len='long' must",
                  "model.d_model is missing", "must be MLAConfig | GQAConfig"):
    assert message in str(caught.value)
  with pytest.raises(ValueError, match="must be RunConfig"):
    from_dict(RunConfig, [])


def test_absent_fields_take_their_defaults():
  plain = to_dict(NANO)
  del plain["data"], plain["model"]["norm_eps"]
  assert from_dict(RunConfig, plain) == NANO


def test_numerics_and_recipes_can_be_named_and_their_fields_set_on_top():
  fp8 = model.NUMERICS["fp8"]
  config = apply("model.numerics.recipe.input_gradient=none", "model.numerics=fp8",
                 "model.numerics.recipe.weight_gradient.gradient.format=e5m2",
                 "model.numerics.recipe=per_tensor")
  recipe = config.model.numerics.recipe
  assert recipe.forward == RECIPES["per_tensor"].forward and recipe.input_gradient is None
  assert recipe.weight_gradient.gradient == Operand("e5m2", "tensor")
  assert apply("model.numerics=fp8").model.numerics == fp8
  assert apply("model.numerics=fp8", "model.numerics.recipe=none").model.numerics == (
      model.NUMERICS["bf16"])
  assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
  assert apply(*(f"{key}={value}" for key, _, value in settings.fields(config))) == config
  assert errors("model.numerics=fp9") == [
      "model.numerics: there is no numerics policy 'fp9'; there are: fp32, bf16, fp8, "
      "fp8_bf16_gradients"]
  assert "Numerics.compute='float16' cannot be used with a recipe" in errors(
      "model.numerics=fp8", "model.numerics.compute=float16")[0]
