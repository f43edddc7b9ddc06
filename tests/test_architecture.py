"""The structure of the package: sizes that a reader can take in, and no private attribute of Lightning."""

import ast
import re
from pathlib import Path

import pytest

import lightning_blip

PACKAGE = Path(lightning_blip.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
LARGEST = {ast.ClassDef: 300, ast.FunctionDef: 60, ast.AsyncFunctionDef: 60, ast.Module: 400}
# Attributes of Lightning's objects; those of the package's own objects begin with "self.", "cls." or a name.
PRIVATE = re.compile(
    r"\b(?:trainer|loop|fit_loop|epoch_loop|val_loop|strategy|logger|scheduler|connector|lightning_module)"
    r"(?:\.\w+)*\._[a-z]\w*"
)


def lines_of(node: ast.AST, text: str) -> int:
    if isinstance(node, ast.Module):
        return len(text.splitlines())
    # What a function does, not what it says about itself.
    is_documented = not isinstance(node, ast.ClassDef) and ast.get_docstring(node) is not None
    described = node.body[0].end_lineno - node.body[0].lineno + 1 if is_documented else 0
    return node.end_lineno - node.lineno + 1 - described


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_classes_and_functions_are_short_and_say_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        largest = LARGEST.get(type(node))
        if largest is not None:
            assert lines_of(node, text) <= largest, f"{getattr(node, 'name', path.name)} is too long"


def test_private_attributes_of_lightning_are_used_in_one_file_alone():
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if PRIVATE.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"trainer/internals.py"}
