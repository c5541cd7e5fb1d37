"""README and docs: links, names, paths and commands exist; snippets and the tutorial run."""

import ast
import difflib
import os
import pathlib
import pkgutil
import re
import shlex
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver

import model
from experiments import catalogue, run, settings
from model.hf.config import render

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")))}
PACKAGES = "pallas_kernels|model|train|rl|experiments"
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
EXAMPLES = "docs/how_to_add.md"  # whose files and names do not exist yet; it has tests of its own


def code_of(text: str) -> set[str]:
  return set(re.findall(r"`([^`\n]+)`", FENCED.sub("", text)))


NAMES = sorted({(page, code) for page, text in PAGES.items() for code in code_of(text)
                if re.fullmatch(rf"({PACKAGES})(\.\w+)+", code)})
PATHS = sorted({(page, code) for page, text in PAGES.items() for code in code_of(text)
                if re.fullmatch(rf"({PACKAGES}|tests|docs)(/[\w.]+)+/?", code)
                and not re.search(r"results/v3/.*NAME|<", code) and page != EXAMPLES})
LINKS = sorted({(page, target) for page, text in PAGES.items()
                for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text))
                if not target.startswith(("http", "#"))})


def test_there_is_something_to_check():
  assert len(PAGES) >= 14 and len(NAMES) >= 40 and len(PATHS) >= 20 and len(LINKS) >= 40
  assert len(COMMANDS) >= 25 and len(SNIPPETS) >= 5


def test_the_readme_is_short_and_leads_to_every_page():
  assert PAGES["README.md"].count("\n") <= 200
  linked = {target for page, target in LINKS if page == "README.md"}
  assert {page for page in PAGES if page.startswith("docs/")} <= linked


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_every_link_leads_to_a_file(page, target):
  path, _, anchor = target.partition("#")
  place = ROOT / path.lstrip("/") if path.startswith("/") else (ROOT / page).parent / path
  assert place.exists()
  assert not anchor or f"#{anchor}" in headings(place.read_text())


def headings(text: str) -> set[str]:
  return {"#" + re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))
          for title in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize(("page", "name"), NAMES)
def test_every_dotted_name_exists(page, name):
  pkgutil.resolve_name(name)


@pytest.mark.parametrize(("page", "path"), PATHS)
def test_every_path_exists(page, path):
  assert (ROOT / path).exists()


# Commands.


def commands_of(text: str) -> list[str]:
  """Flags of commands: in fenced or indented blocks, where lines are continued, or in a line."""
  text = re.sub(r"<!-- results:.*?<!-- end of results -->", "", text, flags=re.S)
  joined = re.sub(r"\\\n\s*", "", text)
  blocks = "\n".join(re.findall(r"^(?:    |\.venv|python).*$", joined, re.M))
  inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCED.sub("", joined))]
  found = re.findall(r"experiments\.run( --\S.*)$", blocks, re.M)
  found += [code.partition("experiments.run")[2] or code for code in inline
            if "experiments.run --" in code or code.startswith("--experiment=")]
  return [command.strip() for command in found if "--experiment=" in command]


COMMANDS = [(page, command) for page, text in PAGES.items() if page != EXAMPLES
            for command in commands_of(text) if "experiment=NAME" not in command]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_names_flags_scales_and_settings_that_exist(page, command):
  with flagsaver.flagsaver():
    flags.FLAGS.mark_as_parsed()
    rest = flags.FLAGS(["run.py", *shlex.split(command.replace("$TEXT", "x.jsonl"))])
    assert rest == ["run.py"]
    options = run._options()
  experiment = catalogue.find(options.experiment)
  configs = experiment.configs()
  named = {"model": model.get_config, "base.model": model.get_config}
  if configs:
    scale = options.scale or ("smoke" if "smoke" in configs else next(iter(configs)))
    settings.apply(configs[scale], options.settings, named={
        name: make for name, make in named.items() if hasattr(configs[scale], name.split(".")[0])})
  for arm in options.arms:
    assert arm in {known.name for known in experiment.load().STUDY.arms}
  if experiment.name == "ab":
    pretrain = catalogue.find("pretrain").configs()[options.scale or "smoke"]
    for arm in (options.a, options.b):
      settings.apply(pretrain, (*options.settings, *arm), named={"model": model.get_config})


# The paper's equations.

MAP = PAGES["docs/paper_map.md"]
EQUATIONS = [(range(int(first), int(last or first) + 1), cell) for first, last, cell in
             re.findall(r"^\| (\d+)(?:-(\d+))? \|[^|]+\| ([^|]+) \|$", MAP, re.M)]


def test_the_map_has_equations_1_to_25_once_each_in_order():
  assert [n for numbers, _ in EQUATIONS for n in numbers] == list(range(1, 26))


@pytest.mark.parametrize("cell", [cell for _, cell in EQUATIONS])
def test_every_equation_is_computed_by_code_that_exists(cell):
  names = re.findall(r"`(\w+(?:\.\w+)+)`", cell)
  assert names
  for name in names:
    assert callable(pkgutil.resolve_name(name)), name


# Names in config.json.

KEYS = re.findall(r"^\| `([\w.]+)` \| `(\w+)` \| (.+?) \|$", PAGES["docs/library.md"], re.M)
ELSEWHERE = {  # differ in more than the name, or are another architecture's
    "init_std", "attention.num_kv_heads", "moe.group_score", "rope.scaling", "max_seq_len"}


def test_the_table_of_names_is_what_the_converter_does():
  cfg = model.get_config("deepseek_v3")
  config = render(cfg, "bfloat16")
  assert len(KEYS) >= 25
  for path, key, shown in KEYS:
    value = cfg
    for name in path.split("."):
      if name != "num_kv_heads":
        value = getattr(value, name)
    if path in ELSEWHERE:
      assert path == "attention.num_kv_heads" or key in config or path == "init_std"
      continue
    assert config[key] == value, path
    text = shown.replace(",", "")
    assert (str(value).lower() == text) or float(text) == value, path


# Snippets.

SNIPPETS = [(page, block) for page in ("README.md", "docs/library.md")
            for block in re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.M | re.S)]


def names_used(source: str, page: str) -> set[str]:
  """Names that a snippet imports, or reaches through modules that its page imports."""
  whole = "".join(block for other, block in SNIPPETS if other == page)
  modules, used = {}, set()
  for node in ast.walk(ast.parse(whole)):
    if isinstance(node, ast.Import):
      modules |= {alias.asname or alias.name: alias.name for alias in node.names}
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ImportFrom):
      used |= {f"{node.module}.{alias.name}" for alias in node.names}
    elif isinstance(node, ast.Attribute):
      root, *rest = ast.unparse(node).split(".")
      if root in modules and all(part.isidentifier() for part in rest):
        used.add(".".join([modules[root], *rest]))
  return used


@pytest.mark.parametrize(("page", "source"), SNIPPETS)
def test_snippets_parse_and_use_names_that_exist(page, source):
  for name in names_used(source, page):
    pkgutil.resolve_name(name)


@pytest.mark.long("compiles what the snippets compute")
@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_snippets_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  source = "".join(block for other, block in SNIPPETS if other == page)
  exec(compile(source, page, "exec"), {})


# The tutorial.

TUTORIAL = re.findall(r"^```bash\n(.*?)^```$", PAGES["docs/tutorial.md"], re.M | re.S)
SMALLER = {"--scale=cpu": "--scale=smoke", "train.steps=200": "train.steps=10",
           "train.steps=40": "train.steps=4", "train.steps=100": "train.steps=4",
           "problems=20": "problems=4", "--out=runs/rl": "--out=runs/rl --set rl.loop.steps=2",
           "--seeds=4": "--seeds=2", "--seeds=3": "--seeds=2"}


def test_the_tutorial_installs_chooses_a_text_and_runs_five_experiments():
  install, text, *experiments = TUTORIAL
  assert "git clone" in install and "pip install --editable ." in install
  assert text.startswith("TEXT=") and len(experiments) == 5
  assert all("experiments.run" in block for block in experiments)


@pytest.mark.long("runs every command of the tutorial at smoke size")
def test_every_command_of_the_tutorial_runs(tmp_path):
  script = "set -e\n" + "".join(TUTORIAL[1:])
  for old, new in SMALLER.items():
    assert old in script, old
    script = script.replace(old, new)
  script = script.replace(".venv/bin/python", sys.executable).replace("runs/", f"{tmp_path}/")
  done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True,
                        env=os.environ | {"JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stderr[-2000:]
  for name in ("mine", "ab", "balancing", "sft", "rl"):
    assert (tmp_path / name / "report.md").exists()
  assert (tmp_path / "exported" / "model.safetensors").exists()
  verdicts = re.findall(r"^(reproduced|contradicted|unresolved) +(.+?):", done.stdout, re.M)
  assert len(verdicts) >= 4, done.stdout
  for shown in re.findall(r"^    (?:un)?re\w+ +(.+?): \.\.\.$", PAGES["docs/tutorial.md"], re.M):
    assert shown in {claim for _, claim in verdicts}, difflib.get_close_matches(
        shown, [claim for _, claim in verdicts])
