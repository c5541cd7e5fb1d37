"""Which code a verdict depends on, as hashes of its syntax.

A hash changes with what code does, but not with comments, docstrings, layout or the Python version.
"""

import ast
import contextlib
import hashlib
import inspect
import pathlib
import textwrap
from collections.abc import Callable, Iterable
from types import ModuleType

# Fields of syntax trees that other versions of Python lack, or fill in otherwise.
_LEFT_OUT = {"ctx", "kind", "type_comment", "type_ignores", "type_params"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def syntax_hash(code: Iterable[ModuleType | Callable]) -> str:
  """Returns a hash of modules and functions: 16 hexadecimal digits."""
  digest = hashlib.sha256()
  for each in code:
    digest.update(_dump(ast.parse(textwrap.dedent(inspect.getsource(each)))).encode())
  return digest.hexdigest()[:16]


def files_hash(root: pathlib.Path, paths: Iterable[pathlib.Path]) -> str:
  """Returns a hash of the syntax of Python files, and of tables in JSON files as they are.

  Args:
    root: the folder relative to which files are named.
    paths: the files; those of other kinds are left out.
  """
  digest = hashlib.sha256()
  for path in paths:
    if path.suffix not in (".py", ".json") or path.name.startswith("."):
      continue
    content = path.read_bytes()
    if path.suffix == ".py":
      with contextlib.suppress(SyntaxError):  # such a file cannot be imported
        content = _dump(ast.parse(content)).encode()
    digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + content + b"\0")
  return digest.hexdigest()[:16]


def _dump(node: object) -> str:
  """Returns a node of a syntax tree as text, without docstrings."""
  if isinstance(node, list):
    return f"[{','.join(map(_dump, node))}]"
  if not isinstance(node, ast.AST):
    return repr(node)
  fields = {name: value for name, value in ast.iter_fields(node)
            if name not in _LEFT_OUT and value not in (None, [])}
  if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
    fields["body"] = node.body[1:]
  return f"{type(node).__name__}({','.join(f'{k}={_dump(v)}' for k, v in sorted(fields.items()))})"
