"""The sizes of caches, and the differences between the forms that read them."""

import dataclasses
import json

import pytest

import model
from experiments.benchmarks.numerics import mla_cache
from experiments.options import Options

SMOKE = mla_cache.SCALES["smoke"]


@pytest.mark.parametrize(("name", "elements", "every"), [
    ("deepseek_v3", 61 * 576, 2 * 61 * 128 * 320),
    ("deepseek_v2_lite", 27 * 576, 2 * 27 * 16 * 320),
    ("llama3_8b", 32 * 2 * 8 * 128, 2 * 32 * 32 * 256)])
def test_bytes_are_those_of_the_papers(name, elements, every):
  assert mla_cache.cache_bytes(model.get_config(name)) == (2 * elements, every)


def test_rotated_content_breaks_the_absorbed_form_and_nothing_else_does(tmp_path, capsys):
  mla_cache.main(Options("mla_cache", scale="smoke", out=tmp_path))
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert [claim["verdict"] for claim in summary["claims"]] == ["met"] * 5
  assert "content rotated: absorbed against expanded" in capsys.readouterr().out


def test_settings_that_make_no_sense_are_refused():
  gqa = dataclasses.replace(model.get_config("llama3_8b"))
  for changes, message in (({"model": gqa}, "must be MLA"), ({"written": 0}, "written"),
                           ({"architectures": ("v9",)}, "no architecture is called")):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(SMOKE, **changes)
