"""A mutation tester: changes one thing at a time in a source file, and looks whether a test fails.

``make mutants`` runs it, or ``python -m tests.mutants [part of a file's name ...]``. ``[tool.mutants]`` in
pyproject.toml names the source files, their tests, and the survivors that are explained.

The libraries do not fit. mutmut leaves out every property and every function under ``@torch.no_grad()``,
where bits are frozen, and deletes no statement. cosmic-ray deletes none either, and starts a process per
mutant: importing torch and Lightning takes longer than the tests. Here one process imports and collects
everything, and forks once per mutant. The fork puts the changed code into the functions that exist already,
and runs the tests that reach the function, the fastest first.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

import pytest
from hypothesis import settings

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same library
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]

# Slower tests, in seconds of the processor, are left out.
SLOWEST = 0.5

SWAPS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,), ast.Mod: (ast.Mult,), ast.Pow: (ast.Mult,), ast.MatMult: (),
    ast.LShift: (ast.RShift,), ast.RShift: (ast.LShift,), ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,),
}  # fmt: skip

settings.register_profile("mutants", deadline=None, derandomize=True, max_examples=10, database=None)


class Mutant(NamedTuple):
    """One change: its place, what it replaces, and the changed code of the whole file."""

    line: int
    function: int  # the first line of the outermost function; 0 outside of functions
    change: str
    code: CodeType


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file, in the order of its lines."""
    tree = ast.parse(path.read_text())
    for parent, field, index, node, function in places(tree, 0):
        for new in alternatives(node):
            ast.fix_missing_locations(ast.copy_location(new, node))
            put(parent, field, index, new)
            try:
                code = compile(tree, str(path), "exec", dont_inherit=True)
            except SyntaxError:
                continue
            finally:
                put(parent, field, index, node)
            yield Mutant(node.lineno, function, f"{ast.unparse(node)}  ->  {ast.unparse(new)}", code)  # type: ignore[attr-defined]


def places(node: ast.AST, function: int) -> Iterator[tuple[ast.AST, str, int | None, ast.AST, int]]:
    """Yield every node that may change, by its place; no annotations, decorators, docstrings, messages."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(
            node, ast.Raise | ast.JoinedStr
        ):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or is_text(child):
                continue
            inside = function
            if isinstance(child, ast.FunctionDef) and not function:
                inside = min([child.lineno, *(one.lineno for one in child.decorator_list)])
            yield node, field, index, child, inside
            yield from places(child, inside)


def is_text(node: ast.AST) -> bool:
    """Return whether a node is a docstring, or code for type checkers only."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    """Put a node into its place."""
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def alternatives(node: ast.AST) -> list[ast.AST]:
    """Return what may stand in the place of a node."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return [ast.Compare(node.left, [new()], node.comparators) for new in SWAPS[type(node.ops[0])]]
    if isinstance(node, ast.Compare):
        return [
            ast.Compare(node.left, [*node.ops[:place], new(), *node.ops[place + 1 :]], node.comparators)
            for place, old in enumerate(node.ops)
            for new in SWAPS[type(old)]
        ]
    if isinstance(node, ast.BinOp):
        return [ast.BinOp(node.left, new(), node.right) for new in SWAPS[type(node.op)]]
    if isinstance(node, ast.BoolOp):
        return [ast.BoolOp(new(), node.values) for new in SWAPS[type(node.op)]]
    if isinstance(node, ast.UnaryOp):
        return [node.operand]
    if isinstance(node, ast.IfExp):
        return [node.body, node.orelse]
    if isinstance(node, ast.If):
        return [ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return [ast.Constant(not node.value)]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return [ast.Constant(node.value + 1)]
    if isinstance(node, ast.Return) and node.value and ast.unparse(node.value) != "None":
        return [ast.Return(ast.Constant(None))]
    is_store = isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple)
    if is_store or isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Delete):
        return [ast.Pass()]
    return []


def transplant(old: ModuleType, code: CodeType) -> bool:
    """Change the functions, defaults and constants of a module that is in use into those of a mutant.

    Returns:
        Whether anything was changed.
    """
    new = ModuleType(old.__name__)
    new.__file__ = old.__file__
    sys.modules[old.__name__] = new
    try:
        exec(code, vars(new))
    finally:
        sys.modules[old.__name__] = old
    changed = False
    for name, value in vars(new).items():
        before = vars(old).get(name)
        if isinstance(value, type) and value.__module__ == old.__name__:
            for attribute, member in vars(value).items():
                changed |= replace(vars(before).get(attribute), member)
                if isinstance(member, int | float) and vars(before).get(attribute) != member:
                    setattr(before, attribute, member)
                    changed = True
        elif callable(value) and getattr(value, "__module__", "") == old.__name__:
            changed |= replace(before, value)
        elif isinstance(value, dict) and not name.startswith("__") and value != before:
            before.update(value)
            changed = True
        elif isinstance(value, int | float | list) and value != before:
            for module in list(sys.modules.values()):
                if vars(module).get(name) is before:
                    setattr(module, name, value)
            changed = True
    return changed


def replace(old: Any, new: Any) -> bool:
    """Replace the code and the defaults of a function, under all its decorators."""
    changed = False
    if hasattr(old, "cache_clear"):
        old.cache_clear()
    for part in ("fget", "fset", "__func__", "__wrapped__"):
        if getattr(new, part, None) is not None:
            changed |= replace(getattr(old, part), getattr(new, part))
    for part in ("__code__", "__defaults__", "__kwdefaults__"):
        if hasattr(new, part) and getattr(old, part) != getattr(new, part):
            setattr(old, part, getattr(new, part))
            changed = True
    return changed


def fork(work: Callable[[], Any], seconds: float) -> Any:
    """Return what a function returns in a process of its own; None if it takes too long or crashes."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(int(20 * seconds) + 60)
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        try:
            os.write(writing, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def passes(items: list[pytest.Item]) -> bool:
    """Return whether all tests pass; stop at the first that does not."""
    from _pytest.runner import runtestprotocol

    for item, following in zip(items, [*items[1:], None], strict=True):
        if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
            return False
    return True


def reached(item: pytest.Item, files: set[str]) -> tuple[bool, float, list[tuple[str, int]]]:
    """Return whether a test passes, its seconds, and the functions that it calls."""
    calls: set[tuple[str, int]] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename in files:
            calls.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    start = time.process_time()
    passed = passes([item])
    seconds = time.process_time() - start
    sys.setprofile(note)
    passes([item])
    sys.setprofile(None)
    return passed, seconds, sorted(calls)


class Tester:
    """The pytest plugin that runs the mutants in place of the tests."""

    def __init__(self, sources: dict[str, list[str]]) -> None:
        self.sources = {str(ROOT / source): tests for source, tests in sources.items()}
        self.survivors: list[str] = []
        self.counts: dict[str, Counter[str]] = {source: Counter() for source in sources}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run every mutant, print the survivors and a table of counts."""
        files = set(self.sources)
        known = {item: fork(lambda one=item: reached(one, files), 60) for item in session.items}
        for item, found in known.items():
            if not (found and found[0]):
                print(f"left out, because it fails without a mutant: {item.nodeid}")
        usable = {item: found for item, found in known.items() if found and found[0] and found[1] <= SLOWEST}
        for source, tests in self.sources.items():
            module = importlib.import_module(".".join(Path(source).relative_to(ROOT).with_suffix("").parts))
            own = {
                one: found
                for one, found in usable.items()
                if one.nodeid.startswith((*tests, own_name(source)))
            }
            self._run(source, module, own)
        for source, counts in self.counts.items():
            print(f"{source}: {sum(counts.values())} mutants, {dict(sorted(counts.items()))}")
        return True

    def _run(self, source: str, module: ModuleType, tests: dict[pytest.Item, Any]) -> None:
        name, lines = own_name(source), Path(source).read_text().splitlines()
        for mutant in mutants(Path(source)):
            hit = [
                (found[1], one.nodeid, one)
                for one, found in tests.items()
                if any(file == source and mutant.function in (0, first) for file, first in found[2])
            ]
            items = [item for _, _, item in sorted(hit, key=lambda one: one[:2])]
            seconds = 5.0 + 5.0 * sum(one for one, *_ in hit)

            def outcome(code: CodeType = mutant.code, items: list[pytest.Item] = items) -> str:
                try:
                    changed = transplant(module, code)
                except ValueError:  # a nested function that needs other variables
                    changed = False
                if not changed:
                    return "not run"
                return "survived" if passes(items) else "killed"

            result = (fork(outcome, seconds) or "killed") if items else "survived"
            if result == "survived" and is_explained(name, lines[mutant.line - 1]):
                result = "explained"
            if result != "killed":
                print(f"{result}: {name}:{mutant.line}: {mutant.change}", f"({len(items)} tests)", flush=True)
            self.counts[name][result] += 1


def own_name(source: str) -> str:
    """Return the name of a file, as pytest begins the names of its doctests."""
    return str(Path(source).relative_to(ROOT))


def is_explained(source: str, line: str) -> bool:
    """Return whether pyproject.toml says why mutants of a line may survive."""
    return any(
        source == one["file"] and any(part in line for part in one["lines"])
        for one in CONFIG.get("explained", [])
    )


def main(parts: list[str]) -> int:
    """Run the mutants of the files whose names contain one of some parts, all by default."""
    sources = {
        one: tests for one, tests in CONFIG["tests"].items() if any(part in one for part in parts or [""])
    }
    tester = Tester(sources)
    arguments = sorted({test for tests in sources.values() for test in tests} | set(sources))
    with tempfile.TemporaryDirectory() as folder:
        pytest.main(
            [*arguments, "-q", "-s", "-p", "no:cacheprovider", "-p", "no:cov", "-p", "no:xdist",
             "--hypothesis-profile=mutants", f"--rootdir={ROOT}", f"--basetemp={folder}/tests"],
            [tester],
        )  # fmt: skip
    return sum(counts["survived"] for counts in tester.counts.values()) > 0


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main(sys.argv[1:]))
