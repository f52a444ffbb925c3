"""Check the import rule: python .ci/import_rule.py [PACKAGE]

Rooms stand on floors: a file imports from its own room and from lower floors, never from a higher
one. No files import each other in a circle. Nothing but a host imports detectron2 or torchvision,
and the hosts, which share a floor, never import each other. Imports inside functions count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

FLOORS = (
    ("errors", "version"),
    ("files",),
    ("layers",),
    ("population",),
    ("doctor",),
    ("training",),
    ("config",),
    ("data",),
    ("commands",),
    ("measure",),
    ("reproduce",),
    ("d2", "tv"),
    ("cli",),
    ("__init__", "__main__"),  # the package's own face, and ``python -m``
)
"""Rooms and single files from the ground up; those of one floor do not import each other."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

HOSTS = {"detectron2": "d2", "torchvision": "tv"}
"""The room that alone may import each library."""


class Import(NamedTuple):
    """An import of one file: where it stands, and the full name of what it imports."""

    path: Path
    line: int
    name: str


IMPORTERS = ("import_module", "__import__")
"""Functions that import what a text names."""


def imported(tree: ast.AST, module: list[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, at any depth, relative or by name.

    But for what a text names that is made when it runs.
    """
    aliases = {
        alias.asname: alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else []
            names = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*names, alias.name])
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            name = named(node, module) if aliases.get(called, called) in IMPORTERS else None
            if name is not None:
                yield node.lineno, name


def named(call: ast.Call, module: list[str]) -> str | None:
    """The full name that a call of IMPORTERS imports; None where it is made when it runs."""
    given = dict(zip(("name", "package", "", "fromlist", "level"), call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords}
    constants = {k: v.value for k, v in given.items() if isinstance(v, ast.Constant)}
    name = constants.get("name")
    if not isinstance(name, str):
        return None
    level = constants.get("level", len(name) - len(name.lstrip(".")))
    package = constants.get("package")
    base = package.split(".") if isinstance(package, str) else module[:-1]
    above = base[: len(base) - level + 1] if level else []
    return ".".join([*above, *filter(None, name.lstrip(".").split("."))])


def imports_of(package: Path) -> list[Import]:
    found = []
    for path in sorted(package.rglob("*.py")):
        module = list(path.relative_to(package.parent).with_suffix("").parts)
        try:
            tree = ast.parse(path.read_text())
        except SyntaxError as e:
            sys.exit(f"{path.relative_to(package.parent)}:{e.lineno}: cannot be read: {e.msg}")
        for line, name in imported(tree, module):
            found.append(Import(path, line, name))
    return found


def room_of(package: Path, path: Path) -> str:
    """The folder of a file below the package, or its own name where it is in none."""
    return path.relative_to(package).with_suffix("").parts[0]


def file_of(package: Path, name: str) -> Path | None:
    """The file of the package that an imported name is in; None for other packages."""
    top, *parts = name.split(".")
    if top != package.name:
        return None
    for length in range(len(parts), -1, -1):
        path = package.joinpath(*parts[:length])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def in_no_room(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        room = room_of(package, path)
        if room not in FLOOR_OF:
            where = path.relative_to(package.parent)
            yield f"{where}: {room} is no room; they are {list(FLOOR_OF)}"


def against_floors(package: Path, imports: list[Import]) -> Iterator[str]:
    for found in imports:
        room = room_of(package, found.path)
        where = f"{found.path.relative_to(package.parent)}:{found.line}"
        if room not in FLOOR_OF:
            continue
        library = found.name.split(".")[0]
        if library in HOSTS and room != HOSTS[library]:
            yield f"{where}: {room} may not import {library} ({found.name})"
        target = file_of(package, found.name)
        if target is None:
            continue
        other = room_of(package, target)
        if other != room and FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[room]:
            yield f"{where}: {room} may not import {other}, which is no lower ({found.name})"


def circles(package: Path, imports: list[Import]) -> Iterator[str]:
    """Each circle once, as the imports that close it."""
    edges: dict[Path, dict[Path, Import]] = {}
    for found in imports:
        target = file_of(package, found.name)
        if target is not None and target != found.path:
            edges.setdefault(found.path, {}).setdefault(target, found)
    done: set[Path] = set()

    def visit(path: Path, way: list[Path]) -> Iterator[str]:
        if path in way:
            circle = [*way[way.index(path) :], path]
            steps = (edges[a][b] for a, b in pairwise(circle))
            lines = (f"{s.path.relative_to(package.parent)}:{s.line} ({s.name})" for s in steps)
            yield f"circle: {' -> '.join(lines)}"
        elif path not in done:
            for target in edges.get(path, {}):
                yield from visit(target, [*way, path])
            done.add(path)

    for path in sorted(edges):
        yield from visit(path, [])


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "bn_det"
    package = package.resolve()  # "." has no name
    if not (package / "__init__.py").is_file():
        sys.exit(f"{package}: is no package; use a folder with an __init__.py")
    imports = imports_of(package)
    found = [*in_no_room(package), *against_floors(package, imports), *circles(package, imports)]
    print("\n".join(found) or "import rule: kept")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
