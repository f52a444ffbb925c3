"""Config files and their bases, against fvcore's loading."""

import io
import os

import pytest
from fvcore.common.config import CfgNode

from bn_det.config import yaml_file
from bn_det.config.yaml_file import load_yaml
from bn_det.errors import InputError

EVAL = "!!python/object/apply:eval"


@pytest.fixture
def write(tmp_path):
    """Writes files by name, the last of which is loaded; None for what is a base's key."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return str(path)

    return write


def refused(path):
    """The message for a file, which begins with a path; without the folder."""
    with pytest.raises(InputError) as e:
        load_yaml(path)
    message = str(e.value)
    assert "\n" not in message
    folder = os.path.dirname(path)
    assert message.startswith(folder)
    return message.replace(folder + "/", "")


def test_bases(write, tmp_path, monkeypatch):
    """In folders, below ~, by an absolute path, and several in a list."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write(
        root="A: {X: 1, Y: [1, 2], Z: {P: 1}}\nB: 3\nC: {Q: 1}",
        home__of_home="_BASE_: ../root.yaml\nA: {X: 2, Z: {R: 4}}",
        other="A: {X: 5, W: 6}\nD: (1, 2)",
        sub__list=f"_BASE_: [~/of_home.yaml, {tmp_path}/other.yaml, ../other.yaml]\nC: 7",
        sub__top="_BASE_: list.yaml\nA: {Y: [3]}\nB: {N: 1}",
    )
    expected = {
        "A": {"X": 5, "Y": [3], "Z": {"P": 1, "R": 4}, "W": 6},
        **{"B": {"N": 1}, "C": 7, "D": "(1, 2)"},
    }
    # A node does not take the place of a value.
    assert refused(path).startswith("top.yaml: B: a node is not accepted in place of 3")
    path = write(sub__top="_BASE_: list.yaml\nA: {Y: [3]}\nB:\n")
    expected["B"] = None
    assert load_yaml(path) == CfgNode.load_yaml_with_base(path) == expected


def test_a_base_that_only_the_host_can_open():
    files = {
        "a/b.yaml": "_BASE_: https://x.org/c.yaml\nA: 1",
        "https://x.org/c.yaml": "_BASE_: d.yaml\nA: 2\nB: 3",
        "https://x.org/d.yaml": "C: 4",
    }
    assert load_yaml("a/b.yaml", lambda path: io.StringIO(files[path])) == {"C": 4, "B": 3, "A": 1}


def test_bases_in_a_circle(write):
    path = write(sub__a="_BASE_: ../b.yaml", b="_BASE_: [d.yaml, ./c.yaml]", d="A: 1", c="A: 1")
    load_yaml(path.replace("c.yaml", "b.yaml"))  # the same base twice is no circle
    write(c="_BASE_: sub/../sub/a.yaml")
    folder = os.path.dirname(path)
    with pytest.raises(InputError, match="_BASE_ goes in a circle: ") as e:
        load_yaml(f"{folder}/sub/a.yaml")
    names = str(e.value).split(": ")[-1].split(" -> ")
    assert [os.path.relpath(name, folder) for name in names] == [
        *("sub/a.yaml", "b.yaml", "c.yaml", "sub/a.yaml"),
    ]


def test_bad_bases(write):
    assert refused(write(a="_BASE_: 3")) == (
        "a.yaml: _BASE_: 3 is not accepted; use a path, or a list of them"
    )
    assert "_BASE_: ['a', 3] is not accepted" in refused(write(a="_BASE_: [a, 3]"))
    found = refused(write(a="_BASE_: b.yaml", c="_BASE_: a.yaml"))
    assert found == "b.yaml cannot be read: No such file or directory (_BASE_ of a.yaml)"
    found = refused(write(b="A: [", d="_BASE_: b.yaml"))
    assert found.startswith("b.yaml is not a config file: while parsing")


def test_arithmetic(write):
    path = write(a=f"A: {{B: {EVAL} ['[[x, 2**(x/3)] for x in [1, 2]]']}}\nC: {EVAL} ['(1, 2)']")
    found = load_yaml(path)
    assert repr(found) == repr({"A": {"B": [[1, 2 ** (1 / 3)], [2, 2 ** (2 / 3)]]}, "C": (1, 2)})


@pytest.mark.parametrize("value", ["['int(3)']", "[\"__import__('os').remove('x')\"]"])
def test_other_expressions(write, value):
    found = refused(write(a=f"A:\n  B: [1, {EVAL} {value}]"))
    assert found.startswith(f"a.yaml: A.B: {EVAL}: ")
    assert "int(3)" in found or "os" in found
    assert found.endswith("over range(...)")


@pytest.mark.parametrize("value", ["3", "[3]", "['1', '2']", "{args: ['1']}", "[]"])
def test_other_arguments(write, value):
    found = refused(write(a=f"A: {EVAL} {value}"))
    assert found == f'a.yaml: A: {EVAL}: it takes a list of one expression in quotes: ["2 * 3"]'


TAGS = [
    *("!!python/object/apply:os.system ['true']", "!!python/object/new:eval ['1']"),
    *("!!python/name:os.system", "!!python/tuple [1]", "!!python/module:os", "!mine x"),
    "!!python/object:os.X {a: 1}",
]


@pytest.mark.parametrize("value", TAGS)
@pytest.mark.parametrize(
    "text", ["A: {{B: {} }}", "A:\n  B:\n  - 1\n  - {}", "A: {{B: {{? {} : 1}}}}"]
)
def test_other_tags(write, value, text):
    found = refused(write(a=text.format(value)))
    tag = value.split()[0]
    end = f"use YAML's own, or {EVAL} for arithmetic"
    assert found == f"a.yaml: A.B: the tag {tag} is not accepted; {end}"


def test_yamls_own_tags(write):
    path = write(a="A: !!str 3\nB: !!float 4\nC: &c {D: 1}\nE: {<<: *c, F: *c}\nG: 2020-01-01")
    assert load_yaml(path) == CfgNode.load_yaml_with_base(path)


CUT = {
    "A: {X: (192, 224), Y: 192}": ("A.X", "'(192'", "(192, 224)", "[192, 224]"),
    "A: {Y: 192, X: (1, 2, 3)}": ("A.X", "'(1'", "(1, 2, 3)", "[1, 2, 3]"),
    "A: {X: (192,), Y: 3}": ("A.X", "'(192'", "(192,)", "[192,]"),
    "A: {X: ((1, 2), (3, 4)), Y: (a)}": ("A.X", "'((1'", "((1, 2), (3, 4))", "[[1, 2], [3, 4]]"),
    "A: {B: {Y: (a), X: (1,\n  2)}}": ("A.B.X", "'(1'", "(1, 2)", "[1, 2]"),
    "{A: {X: (a, b)}}": ("A.X", "'(a'", "(a, b)", "[a, b]"),
    "A:\n  X: [3, (192, 224)]": ("A.X", "'(192'", "(192, 224)", "[192, 224]"),
    "A: {X: [[(1, 2, 3), (4)]]}": ("A.X", "'(1'", "(1, 2, 3)", "[1, 2, 3]"),
}


@pytest.mark.parametrize("text", CUT)
def test_a_value_that_yaml_cuts_at_the_comma(write, text):
    key, piece, whole, brackets = CUT[text]
    found = refused(write(a=text))
    assert found.startswith(f"a.yaml: {key}: {piece} is what is left of {whole} in ")
    in_braces = "in braces" in found
    assert in_braces == ("[" not in text)
    other = f' or "{whole}", or put the key on a line of its own, without braces'
    assert found.endswith(f"; write {brackets}{other if in_braces else ''}")


@pytest.mark.parametrize("text", CUT)
def test_the_ways_that_the_message_shows(write, text):
    """They are loaded, and are what was meant."""
    _, _, whole, brackets = CUT[text]
    whole_in_text = whole.replace(" 2)", "\n  2)") if "\n  2)" in text else whole
    assert whole_in_text in text
    load_yaml(write(a=text.replace(whole_in_text, brackets)))
    if "[" not in text:
        load_yaml(write(a=text.replace(whole_in_text, f'"{whole}"')))


@pytest.mark.parametrize(
    "text",
    [
        "A: (192, 224)",
        "A: {X: '(192, 224)', Y: \"(1, 2)\", Z: (3), W: [a (b, c d), '(1', '2)'], V: (}",
        "A: {X: (a, Y: b), Z: 1}",  # perhaps a name with a parenthesis
        "A: [(, b]\nB: [')', (]\nC: [(1, ')']",
        "A:\n  X: (a\n  Y):\nB:\n- (a\n- b)",  # no comma has cut these
    ],
)
def test_other_parentheses(write, text):
    path = write(a=text)
    assert load_yaml(path) == CfgNode.load_yaml_with_base(path)


@pytest.mark.parametrize("text", ["", "words", "- 1", "3", "# a comment"])
def test_without_keys(write, text):
    assert refused(write(a=text)) == "a.yaml is not a config file: it has no keys"


def test_broken_files(write, tmp_path):
    assert refused(write(a="A: [")).startswith("a.yaml is not a config file: while parsing")
    assert "a.yaml is not a config file: unacceptable" in refused(write(a="A: \x01"))
    found = refused(write(a="A: &a {B: {C: [*a]}}"))
    assert found == "a.yaml: A.B.C: what contains itself is not accepted"
    assert "a.yaml is not a config file: maximum recursion" in refused(write(a=f"A: {'[' * 2000}"))
    for value in ("2020-13-45", "!!int x", "!!int ''", "!!bool x", "!!timestamp x"):
        assert "a.yaml is not a config file: " in refused(write(a=f"A: {value}"))
    (tmp_path / "a.yaml").write_bytes(b"A: \xff\xfe")
    assert "a.yaml is not a config file: 'utf-8' codec" in refused(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("base", ['"\\0"', '"\\uD800"'])
def test_a_base_that_can_be_no_path(write, base):
    assert "is not accepted; use a path, or a list of them" in refused(write(a=f"_BASE_: {base}"))


@pytest.mark.parametrize(
    "text", ['TRAIN: {A: ("a", "b")}', "TRAIN: [('a', 'b')]", 'A: {\n  B: 1,\n  C: ("a", "b")}']
)
def test_a_tuple_of_strings_where_yaml_has_none(write, text):
    assert "write [...] in place of a tuple (...)" in refused(write(a=text))
    assert load_yaml(write(a=text.replace("(", "[").replace(")", "]")))


@pytest.mark.parametrize("text", ["A: [1, 2", "A: (1)\nB: [1"])
def test_other_broken_lists_have_no_hint_of_tuples(write, text):
    assert "tuple" not in refused(write(a=text))


@pytest.mark.parametrize(
    "line", ["a{}: &a{} {{p: *a{}, q: *a{}}}", "a{}: &a{}\n  <<: [*a{}, *a{}]"]
)
def test_aliases_that_repeat_each_other(write, line):
    """2^40 values: to make them would take days."""
    lines = [line.format(k, k, k - 1, k - 1) for k in range(1, 41)]
    found = refused(write(a="\n".join(["a0: &a0 {x: 1}", *lines])))
    assert found == f"a.yaml: more than {yaml_file.MAX_VALUES} values, by aliases, are not accepted"


def test_anchors_are_looked_at_once(write, monkeypatch):
    """Lists of twice the same list would be 2^12 nodes."""
    seen, tag = [], yaml_file._Check._tag

    def count(self, node, key):
        seen.append(node)
        assert len(seen) < 100
        tag(self, node, key)

    monkeypatch.setattr(yaml_file._Check, "_tag", count)
    lists = "\n".join(f"A{k + 1}: &a{k + 1} [*a{k}, *a{k}]" for k in range(12))
    found = load_yaml(write(a=f"A0: &a0 [1]\n{lists}"))
    assert found["A2"] == [[[1], [1]], [[1], [1]]]
