"""The evaluate program: errors that are detected before the model is loaded."""

import re

import pytest

from experiments.options import Options
from experiments.programs import evaluate


def test_an_output_path_that_is_a_file_is_refused_before_the_model_is_loaded(tmp_path):
  path = tmp_path / "out"
  path.write_text("")
  with pytest.raises(FileExistsError, match=re.escape(str(path))):
    evaluate.main(Options("evaluate", out=path, settings=("checkpoint=missing",)))
