"""The network as pure functions of its parameters, without data, training or optimizers."""

from model import balance, hf, moe
from model.config import (
  GQAConfig,
  LinearScaling,
  Llama3Scaling,
  MLAConfig,
  ModelConfig,
  MoEConfig,
  MTPConfig,
  RopeConfig,
  YarnScaling,
)
from model.decoding.cache import Cache, init_cache
from model.decoding.engine import Status
from model.decoding.generate import Generated, generate
from model.decoding.speculate import Speculated, speculate
from model.decoding.streaming import stream
from model.logprobs import logprob_sum, logprobs_and_entropy, token_logprobs
from model.numerics import NUMERICS, Numerics
from model.quantized_weights import quantize_weights
from model.registry import CONFIGS, get_config
from model.transformer import REMAT, Output, Transformer
from model.variables import abstract_variables, init, init_on_host, logical_axes, shardings
from model.weights import cast_weights
