"""The imports of an exported script: those that it needs, once each, above all else where that changes nothing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

# Longer ones are broken into lines, as ruff breaks them by default.
_WIDTH = 88


@dataclass(frozen=True)
class _Import:
    """One import of one module.

    Attributes:
        module: The module, with the dots of a relative import.
        plain: Whether it is ``import module``, not ``from module import``.
        text: The statement.
        bound: What each name that it binds stands for, dotted.
    """

    module: str
    plain: bool
    text: str
    bound: dict[str, str]


class Imports:
    """Imports that stand at the top.

    Args:
        taken: Names that the script binds otherwise.
        is_local: Tells whether a module is a file of the user's own.
    """

    def __init__(self, taken: Collection[str], is_local: Callable[[str], bool]) -> None:
        self._taken = set(taken)
        self._is_local = is_local
        self._all: list[_Import] = []

    def take(self, node: ast.stmt, text: str) -> bool:
        """Take over a statement; tell whether that was possible without changing what its names stand for."""
        if not isinstance(node, ast.Import | ast.ImportFrom):
            return False
        ones = list(_split(node, text))
        bound = self._bound
        for one in ones:
            for name, meaning in one.bound.items():
                if name in self._taken or bound.get(name, meaning) != meaning:
                    return False
        for one in ones:
            if not any(one.module == other.module and one.bound == other.bound for other in self._all):
                self._all.append(one)
        return True

    @property
    def _bound(self) -> dict[str, str]:
        return {name: meaning for one in self._all for name, meaning in one.bound.items()}

    def spell(self, module: str, alias: str = "") -> str:
        """Return the name by which the script knows a module; import it if it is not imported yet."""
        return self._known(module) or self._insert(
            module,
            alias or module,
            lambda name: f"import {module}" if name == module else f"import {module} as {name}",
            plain=True,
            meaning=module,
        )

    def member(self, module: str, member: str) -> str:
        """Return the name by which the script knows a part of a module; import it if it is not imported yet."""
        return self._known(f"{module}.{member}") or self._insert(
            module,
            member,
            lambda name: f"from {module} import {member}" + (f" as {name}" if name != member else ""),
            plain=False,
            meaning=f"{module}.{member}",
        )

    def _known(self, meaning: str) -> str:
        return next((name for name, known in self._bound.items() if known == meaning), "")

    def _insert(self, module: str, name: str, text: Callable[[str], str], *, plain: bool, meaning: str) -> str:
        while name in self._taken or name in self._bound:
            name += "_"
        new = _Import(module, plain, text(name), {name: meaning})
        # Before the first that comes after it in the alphabet: right if the others are sorted, harmless if not.
        key = self._key(new)
        for i, one in enumerate(self._all):
            if self._key(one)[0] == key[0] and self._key(one) > key:
                self._all.insert(i, new)
                return name
        self._all.append(new)
        return name

    def _key(self, one: _Import) -> tuple[int, bool, str]:
        return self._section(one), not one.plain, one.module.lower()

    def _section(self, one: _Import) -> int:
        top = one.module.partition(".")[0]
        if one.module == "__future__":
            return 0
        if top in sys.stdlib_module_names:
            return 1
        return 3 if not top or self._is_local(top) else 2

    def are_python(self, names: Collection[str]) -> bool:
        """Tell whether names stand for modules that come with Python."""
        return all(
            any(name in one.bound and one.plain and self._section(one) == 1 for one in self._all) for name in names
        )

    def of(self, names: Collection[str]) -> str:
        """Return the imports of some names."""
        ones = sorted((one for one in self._all if set(names) & set(one.bound)), key=self._key)
        return "\n".join(one.text for one in ones)

    def text(self, without: Collection[str] = ()) -> str:
        """Return the imports in the usual sections, but for those of some names."""
        sections: list[str] = []
        for number in range(4):
            ones = [one for one in self._all if self._section(one) == number and not set(without) & set(one.bound)]
            # What order other libraries want to be loaded in is theirs to know, and the notebook's.
            ordered = sorted(ones, key=self._key) if number == 1 else ones
            if ones:
                sections.append("\n".join(one.text for one in ordered))
        return "\n\n".join(sections)

    def local(self) -> list[str]:
        """Return the modules of the user's own that are imported."""
        return sorted({one.module.lstrip(".") for one in self._all if self._section(one) == 3})


def _split(node: ast.Import | ast.ImportFrom, text: str) -> Iterator[_Import]:
    if isinstance(node, ast.ImportFrom):
        module = f"{'.' * node.level}{node.module or ''}"
        bound = {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
        yield _Import(module, False, _broken(node, text), bound)
        return
    for alias in node.names:
        single = text if len(node.names) == 1 else ast.unparse(ast.Import([alias]))
        top = alias.name.partition(".")[0]
        yield _Import(alias.name, True, single, {alias.asname: alias.name} if alias.asname else {top: top})


def _broken(node: ast.ImportFrom, text: str) -> str:
    """Return an import that is not longer than a line."""
    if "\n" in text or len(text) <= _WIDTH or "#" in text:
        return text
    start = f"from {'.' * node.level}{node.module or ''} import ("
    return "\n".join([start, *(f"    {ast.unparse(alias)}," for alias in node.names), ")"])
