"""The source files of this package that inference needs, to be copied into a submission under a name of its own.

A submission has to be installed where aum-compress is not. It carries the very files that trained and exported the
model, not a second definition of it: those that `submission.inference` imports, and what these import.
"""

import ast
import re
from pathlib import Path

import aum_compress

_ROOT = "aum_compress"
_PACKAGE = Path(aum_compress.__file__).parent
_START = "aum_compress.submission.inference"
_IMPORT = re.compile(rf"^(\s*(?:from|import)) {_ROOT}\b", flags=re.MULTILINE)
_OPERATOR = re.compile(rf'(?<=")\b{_ROOT}(?=::)|(?<=\btorch\.ops\.){_ROOT}\b')
_DATA_SUFFIXES = (".c", ".h")


def vendored_sources(package: str) -> dict[str, bytes]:
    """Path below `<package>/aum_compress/` -> content of each file.

    Imports of aum_compress become imports of `<package>.aum_compress`, and torch operators get a namespace of their
    own, so that it can be imported beside aum-compress or another submission.
    """
    found: dict[str, bytes] = {}
    waiting = [_START]
    while waiting:
        path = _file_of(waiting.pop())
        name = path.relative_to(_PACKAGE).as_posix()
        if name in found:
            continue
        text = path.read_text(encoding="utf-8")
        waiting += _own_imports(text)
        found[name] = _renamed(text, package).encode()
        for beside in path.parent.iterdir():
            if beside.suffix in _DATA_SUFFIXES:  # what is compiled at first use
                found[beside.relative_to(_PACKAGE).as_posix()] = beside.read_bytes()
        for folder in path.relative_to(_PACKAGE).parents:
            initial = _PACKAGE / folder / "__init__.py"
            found.setdefault(initial.relative_to(_PACKAGE).as_posix(), initial.read_bytes())
    return dict(sorted(found.items()))


def _own_imports(text: str) -> list[str]:
    """Modules of aum_compress that a source file imports, at its top or inside functions."""
    modules = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == _ROOT:
            wholes = [f"{node.module}.{alias.name}" for alias in node.names]
            modules += [module for module in wholes if _is_module(module)] or [node.module]
    return modules


def _is_module(name: str) -> bool:
    return _PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py").is_file()


def _file_of(module: str) -> Path:
    place = _PACKAGE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _renamed(text: str, package: str) -> str:
    return _OPERATOR.sub(f"{package}_{_ROOT}", _IMPORT.sub(rf"\1 {package}.{_ROOT}", text))
