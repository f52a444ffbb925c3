"""Check the import rule: python .ci/import_rule.py [PACKAGE]

The core (everything but d2/ and tv/) imports neither detectron2 nor torchvision nor a host, and
the two hosts never import each other.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FORBIDDEN = {
    "core": ("detectron2", "torchvision", "bn_det.d2", "bn_det.tv"),
    "d2": ("bn_det.tv",),
    "tv": ("detectron2", "bn_det.d2"),
}


def imported(tree: ast.AST, module: list[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, at any depth, relative or by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else []
            names = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*names, alias.name])
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            argument = node.args[0]
            if called in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def violations(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package.parent)
        part = relative.parts[1] if relative.parts[1] in ("d2", "tv") else "core"
        module = list(relative.with_suffix("").parts)
        for line, name in imported(ast.parse(path.read_text()), module):
            for forbidden in FORBIDDEN[part]:
                if name == forbidden or name.startswith(forbidden + "."):
                    yield f"{relative}:{line}: {part} may not import {forbidden} ({name})"


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "bn_det"
    found = list(violations(package))
    print("\n".join(found) or "import rule: kept")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
