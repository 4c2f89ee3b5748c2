"""Which names a cell takes from the notebook."""

from __future__ import annotations

import ast
import builtins
import dis
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from nbddp._names import Uses, globals_of

transform = TransformerManager().transform_cell


def uses(cell: str) -> Uses:
    return Uses(ast.parse(transform(cell)).body, transform)


def taken(cell: str) -> set[str]:
    return set(uses(cell).taken) - set(dir(builtins)) - {"get_ipython"}


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("print(x)", "x"),
        ("x = 1\nprint(x)", ""),
        ("print(x)\nx = 1", "x"),
        ("x += 1", "x"),
        ("x: int = y", "y"),
        ("if a:\n    x = 1\nprint(x)", "a x"),
        ("if a:\n    x = 1\nelse:\n    x = 2\nprint(x)", "a"),
        ("for i in data:\n    print(i)\nprint(i)", "data i"),
        ("while n:\n    if a: break\n    else: continue", "a n"),
        ("with suppress(OSError):\n    m = load()\nm.train()", "load m suppress"),
        ("with open(p) as f:\n    f.read()\nprint(f)", "p"),
        ("def f(a: A = b) -> C:\n    d: D = a\n    return d", "A b C"),
        ("with torch.no_grad():\n    y = model(x)\nprint(y)", "model torch x"),
        ("try:\n    x = f()\nexcept E as e:\n    x = g(e)\nprint(x)", "E f g"),
        ("try:\n    x = 1\nfinally:\n    y = 2\nprint(x, y)", ""),
        ("import os\nos.getcwd()", ""),
        ("import a.b\na.c", ""),
        ("from m import f as g\ng(f)", "f"),
        ("def f(a, b=c):\n    return a + d + local if (local := 1) else e", "c d e"),
        ("class A(B):\n    x = y\n    z = x\n    def f(self): return x", "B x y"),
        ("[i * k for i in r]", "k r"),
        ("lambda a: a + b", "b"),
        ("f'{x} {y!r:>{w}}'", "w x y"),
        ("model = Net()\nmodel.train()\nmodel.eval", "Net"),
        ("del x", "x"),
        ("x = 1\ndel x\nprint(x)", "x"),
        ("a.b = 1\nc[d] = 2", "a c d"),
        ("(a, b), *c = x\nprint(a, b, c)", "x"),
        ("for x.attr, y[k] in z: pass", "k x y z"),
        ("global g\ng = 1\nprint(g)", ""),
        ("def f():\n    global n\n    n += 1", "n"),
        ("match p:\n    case [a, b]: print(a, c)\n    case _: pass", "c p"),
        ("for q in r:\n    match q:\n        case 1: break", "r"),
        ("await task", "task"),
        ("async with s as t:\n    async for u in v: pass", "s v"),
        ("print((y := 1) + y)", ""),
        ("@deco\ndef f(): pass", "deco"),
        ("!echo $word {expr + 1}", "expr word"),
        ("%time f(x)", "f x"),
        ("%cd {folder}", "folder"),
        ("%matplotlib inline", ""),
        ("!ls data", ""),
        ("%%time\ny = f(x)\nprint(y)", "f x"),
        ("files = !ls $d\nfiles", "d"),
    ],
)
def test_taken(cell: str, names: str) -> None:
    assert taken(cell) == set(names.split())


def test_lines_are_those_of_the_cell() -> None:
    assert uses("a = 1\nb = x\n\nprint(x,\n      y)").taken["x"] == [2, 4]
    assert uses("a = 1\nb = x\n\nprint(x,\n      y)").taken["y"] == [5]


@pytest.mark.parametrize(
    ("cell", "names"),
    [
        ("x = 1\nfor i in r: j = i", "x i j"),
        ("import os.path, sys as s", "os s"),
        ("def f():\n    global g\n    g = 1\n    h = 2", "f g"),
        ("with a as (b, c): pass", "b c"),
        ("try: pass\nexcept E as e: pass", "e"),
        ("class C: x = 1", "C"),
        ("(y := 1)", "y"),
        ("match p:\n    case {'k': v, **rest}: pass", "v rest"),
    ],
)
def test_bound(cell: str, names: str) -> None:
    assert set(names.split()) <= uses(cell).bound
    assert "h" not in uses(cell).bound


@pytest.mark.parametrize(
    ("cell", "dynamic"),
    [
        ("x = 1", False),
        ("exec('x = 1')", True),
        ("from os import *", True),
        ("%run a.py", True),
        ("globals()['a'] = 1", True),
    ],
)
def test_dynamic(cell: str, dynamic: bool) -> None:
    assert uses(cell).dynamic is dynamic


def globals_by_dis(code: types.CodeType, depth: int = 0) -> Iterator[tuple[int, str, bool, int]]:
    own: set[str] = set()
    in_class = depth > 0 and not code.co_flags & 0x02
    for one in dis.get_instructions(code):
        line = (one.positions.lineno if one.positions else None) or code.co_firstlineno
        match one.opname:
            case "STORE_NAME" if in_class:
                own.add(one.argval)
            case "STORE_NAME" | "STORE_GLOBAL":
                yield depth, one.argval, True, line
            case "LOAD_NAME" | "LOAD_GLOBAL" | "LOAD_FROM_DICT_OR_GLOBALS" | "DELETE_NAME" | "DELETE_GLOBAL":
                if one.argval not in own:
                    yield depth, one.argval, False, line
            case _ if isinstance(one.argval, types.CodeType):
                yield from globals_by_dis(one.argval, depth + 1)


@pytest.mark.parametrize("module", ["argparse", "typing", "enum", "dataclasses", "inspect", "turtle"])
def test_byte_code_is_read_as_dis_reads_it(module: str) -> None:
    path = Path(dis.__file__).with_name(f"{module}.py")
    code = compile(path.read_bytes(), str(path), "exec")
    found = list(globals_of(code))
    assert len(found) > 300
    assert found == list(globals_by_dis(code))
