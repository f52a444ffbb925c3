"""Which command is meant, and what one gets without what a command needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from bn_det.cli.main import COMMANDS, TOOLS

ROOT = Path(__file__).parents[2]


def run(*args, code=""):
    """``bn-det`` in a process that first runs some code."""
    start = f"import sys; sys.argv[:] = {['bn-det', *args]!r}\n"
    end = "from bn_det.cli.main import main; main()\n"
    return subprocess.run(
        [sys.executable, "-c", f"{start}{code}\n{end}"], capture_output=True, text=True, timeout=120
    )


def blocked(*modules):
    """Code after which modules are not installed."""
    return f"sys.modules.update(dict.fromkeys({modules!r}))"


def test_help_imports_no_torch():
    for args in ((), ("-h",), ("--help",), ("--version",)):
        done = run(*args, code=blocked("torch", *TOOLS))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("bn_det " if args == ("--version",) else "usage: bn-det ")


@pytest.mark.parametrize(
    "name, words",
    [
        ("docter", "'docter' is no command of bn-det; nearest names: ['doctor']"),
        ("zzz", "known names: ['average', 'doctor',"),
        ("--verison", "'--verison' is no command of bn-det; "),
    ],
)
def test_an_unknown_command(name, words):
    done = run(name, "--help", code=blocked("torch"))
    assert done.returncode == 1 and done.stderr.startswith("error: ") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("missing", [tuple(TOOLS), ("torchvision", "yaml")])
@pytest.mark.parametrize("name", ["train", "doctor", "prepare-blood-cells"])
def test_only_some_of_it_is_installed(name, missing):
    """One line names all that is missing, before anything of it would be imported."""
    done = run(name, "--help", code=blocked("torch", *missing))
    needed = ", ".join(TOOLS[module] for module in missing)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: bn-det {name} needs {needed}, not installed here; use "
        "pip install 'bn_det[tools]'\n",
    )


def test_the_extra_is_what_the_command_asks_for():
    tree = ast.parse((ROOT / "setup.py").read_text())
    (extra,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "TOOLS"
    )
    assert sorted(name.partition(">")[0] for name in extra) == sorted(TOOLS.values())


def test_every_command_has_a_file_and_a_script():
    files = {path.stem for path in (ROOT / "bn_det" / "cli").glob("*.py")}
    assert {name.replace("-", "_") for name in COMMANDS} == files - {"__init__", "main", "ctrl_c"}
    scripts = [path.read_text() for path in (ROOT / "tools").glob("*.py")]
    for name in COMMANDS:
        assert sum(f'script("{name}")' in text for text in scripts) == 1, name
