"""Config files and their bases, against fvcore's loading."""

import io
import os
import urllib.request
from collections import Counter

import pytest
from fvcore.common.config import CfgNode

from bn_det.config import yaml_text
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
    assert "list of 51 files is not accepted; use 50" in refused(write(a=f"_BASE_: {['a'] * 51}"))
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
        "A: {X: '(192, 224)', Y: \"(1, 2)\", Z: (3), W: [a (b, c d), '(1', '2)'], V: ')'}",
        "A:\n  X: (a\n  Y):\nB:\n- (a\n- b)",  # no comma has cut these
    ],
)
def test_other_parentheses(write, text):
    path = write(a=text)
    assert load_yaml(path) == CfgNode.load_yaml_with_base(path)


OPEN = {
    "{B: (1, C: 2}": ("B", "(1", "braces"),
    "A: {X: (a, Y: b), Z: 1}": ("A.X", "(a", "braces"),
    "A: {B: {X: name(}}": ("A.B.X", "name(", "braces"),
    "A: {X: (1, b, c}": ("A.X", "(1", "braces"),
    "A: [(1, 2]": ("A", "(1", "a list"),
    "A: {X: [3, ((1, 2)]}": ("A.X", "((1", "a list"),
    "A: [(1, ')']": ("A", "(1", "a list"),
}


@pytest.mark.parametrize("text", OPEN)
def test_a_parenthesis_that_stays_open(write, text):
    key, piece, where = OPEN[text]
    found = refused(write(a=text))
    start = f"a.yaml: {key}: {piece!r} has a parenthesis that is not closed, in {where}, "
    assert found.startswith(start) and "write [...] in place of a tuple (...)" in found
    load_yaml(write(a=text.replace(piece, f'"{piece}"', 1)))


@pytest.mark.parametrize("text", ["", "words", "- 1", "3", "# a comment"])
def test_without_keys(write, text):
    assert refused(write(a=text)) == "a.yaml is not a config file: it has no keys"


def test_broken_files(write, tmp_path):
    assert refused(write(a="A: [")).startswith("a.yaml is not a config file: while parsing")
    assert "a.yaml is not a config file: unacceptable" in refused(write(a="A: \x01"))
    found = refused(write(a="A: &a {B: {C: [*a]}}"))
    assert found == "a.yaml: A.B.C: what contains itself is not accepted"
    end = "use 50 nodes and lists in each other at most"
    assert refused(write(a=f"A: {'[' * 2000}")) == f"a.yaml is not a config file: {end}"
    assert "a.yaml is not a config file: while constr" in refused(write(a="<<: 3"))
    (tmp_path / "a.yaml").write_bytes(b"A: \xff\xfe")
    assert "a.yaml is not a config file: 'utf-8' codec" in refused(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "base", ['"\\0"', '"\\uD800"', '"a\\nb"', '"a\\n"', '"a\\u2028b"', "''", '["a", ""]', ".nan"]
)
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


REPEAT = "with what aliases repeat, are not accepted"


@pytest.mark.parametrize(
    "line", ["a{}: &a{} {{p: *a{}, q: *a{}}}", "a{}: &a{}\n  <<: [*a{}, *a{}]"]
)
def test_aliases_that_repeat_each_other(write, line):
    """2^40 values: to make them would take days."""
    lines = [line.format(k, k, k - 1, k - 1) for k in range(1, 41)]
    found = refused(write(a="\n".join(["a0: &a0 {x: 1}", *lines])))
    assert found == f"a.yaml: more than {yaml_text.MAX_VALUES} values, {REPEAT}"


def test_anchors_are_looked_at_once(write, monkeypatch):
    """Lists of twice the same list would be 2^12 nodes."""
    seen, tag = [], yaml_text._Check._tag

    def count(self, node, key):
        seen.append(node)
        assert len(seen) < 100
        tag(self, node, key)

    monkeypatch.setattr(yaml_text._Check, "_tag", count)
    lists = "\n".join(f"A{k + 1}: &a{k + 1} [*a{k}, *a{k}]" for k in range(12))
    found = load_yaml(write(a=f"A0: &a0 [1]\n{lists}"))
    assert found["A2"] == [[[1], [1]], [[1], [1]]]


BOMB = "".join(f"a{k + 1}: &a{k + 1} [*a{k}, *a{k}]\n" for k in range(12))


@pytest.mark.parametrize(
    "text, where, line",
    [
        (f"a0: &a0 [1, 1]\n{BOMB}? *a12\n: 1\n", "", 13),
        (f"a0: &a0 {{x: 1}}\n{BOMB}A: {{B: {{? *a12 : 1}}}}", "A.B: ", 13),
        ("&x {? [*x] : 1}", "", 1),
        ("A:\n- &x {? [*x] : 1}", "A: ", 2),
        (f"? {EVAL} ['1']\n: 1", "", 1),
    ],
    ids=["bomb", "bomb below", "circle", "circle below", "expression"],
)
def test_a_list_as_key(write, text, where, line):
    """Of 2^13 values, written out: few enough to fail rather than to fill the memory."""
    end = f"a list, from line {line}, in place of a key is not accepted; use a text"
    assert refused(write(a=text)) == f"a.yaml: {where}{end}"


def test_keys_with_values_as_key(write):
    found = refused(write(a="A: {? {a: b} : 1}"))
    assert found.startswith("a.yaml: A: keys with values, from line 1, in place of a key")


def test_messages_are_short(write):
    """Whatever the keys are that they name: here 40 times one of a million characters."""
    braces = f"{{*k : {{{'*k : {' * 38}*k : !x 1{'}' * 40}"
    found = refused(write(a=f"k: &k {'x' * 10**6}\nA: {braces}"))
    assert found.startswith("a.yaml: A.xxx") and "the tag !x is not" in found
    for text in (
        f"A: !!int {'x' * 10**4}",
        *(f"A: {{X: ({'x' * 10**4}, 2{end}}}" for end in ("", ")")),
        f"A: !<{'x' * 10**4}> 1",
    ):
        assert len(found) < 1000 > len(refused(write(a=text)))
    under = f"A: {'x' * 10**4}"
    assert len(refused(write(b=under, a="_BASE_: b.yaml\nA: {B: 1}"))) < 500


@pytest.mark.parametrize("has_aliases", [False, True])
def test_depth(write, has_aliases):
    """Of lists in the one node that a file is."""

    def text(number):
        if not has_aliases:
            return f"A: {'[' * number}{']' * number}"
        lists = "".join(f"a{k + 1}: &a{k + 1} [*a{k}]\n" for k in range(number))
        return f"a0: &a0 1\n{lists}A: *a{number}"

    assert load_yaml(write(a=text(49)))["A"]
    end = f"more than 50 nodes and lists in each other, {REPEAT}"
    for number in (51, 200):
        assert refused(write(a=text(number))) == f"a.yaml: {end}"


def test_expressions_that_aliases_repeat(write):
    text = f'A: &e {EVAL} ["[0 for x in range(3000)]"]\nB: [{"*e, " * 40}]'
    assert f"more than {yaml_text.MAX_VALUES} values" in refused(write(a=text))


NO_SCALARS = {
    f"0x{'f' * 6000}": "!!int: it has more than 1000 characters",
    "9" * 5000: "!!int: it has more than 1000 characters",
    f"{'1:' * 10**4}1": "!!int: it has more than 1000 characters",
    f"0x{'f' * 17}": "!!int: it has more than 64 bits",
    f"{'1:' * 199}1.5": "!!float: it is too large",
    f"{'1:' * 10**4}1.5": "!!float: it has more than 1000 characters",
    "2020-13-45": "!!timestamp: it is not one",
    "!!timestamp x": "!!timestamp: it is not one",
    "!!int ''": "!!int: it is not one",
    "!!int x": "!!int: it is not one",
    "!!float ''": "!!float: it is not one",
    "!!bool x": "!!bool: it is not one",
    "!!binary x": "!!binary: it is not one",
    "=": "!!value: it is not one",
}


@pytest.mark.parametrize("text", ["A: {{B: {}}}", "A:\n  B:\n  - {}"])
@pytest.mark.parametrize("value", NO_SCALARS, ids=lambda value: value[:20])
def test_scalars_that_are_not_of_their_tag(write, value, text):
    reason = NO_SCALARS[value]
    found = refused(write(a=text.format(value)))
    assert found.startswith("a.yaml: A.B: ") and len(found) < 300
    assert found.endswith(f"is not accepted as {reason}; write it in quotes if it is a text")


def test_a_base_that_is_too_long_a_number(write):
    assert refused(write(a=f"_BASE_: 0x{'f' * 6000}")).startswith("a.yaml: _BASE_: '0xfff")


def test_numbers_that_are_large(write):
    found = load_yaml(write(a=f"A: 0x{'f' * 16}\nB: 1:30\nC: 1e300"))
    assert found == {"A": 2**64 - 1, "B": 90, "C": "1e300"}


WRONG_KINDS = {
    "!!timestamp {=: '2020-01-01'}": "keys with values",
    "!!str {=: a}": "keys with values",
    "!!int {=: '1'}": "keys with values",
    "!!bool {=: 'yes'}": "keys with values",
    "!!binary {=: 'aaaa'}": "keys with values",
    "!!seq {a: 1}": "keys with values",
    "!!map [a]": "a list",
    "!!str [a]": "a list",
    "!!set x": "a single value",
    "!!omap x": "a single value",
}


@pytest.mark.parametrize("value", WRONG_KINDS)
def test_tags_for_something_else(write, value):
    kind, tag = WRONG_KINDS[value], value.split()[0]
    end = f"the tag {tag} is not accepted for {kind}"
    assert refused(write(a=f"A: {{B: {value}}}")) == f"a.yaml: A.B: {end}"
    if "{" in value:
        assert refused(write(a=value)) == f"a.yaml: {end}"


def test_a_file_that_is_a_set(write):
    end = "the tag !!set is not accepted for a whole file"
    assert refused(write(a="!!set {a, b}")) == f"a.yaml: {end}"
    assert load_yaml(write(a='"": !!set {a}')) == {"": {"a"}}
    assert load_yaml(write(a="A: !!set {a, b}")) == {"A": {"a", "b"}}


def test_an_expression_in_the_place_of_a_text(write):
    found = refused(write(a=f"A: {EVAL} [!!str {{=: a}}]"))
    assert found == f'a.yaml: A: {EVAL}: it takes a list of one expression in quotes: ["2 * 3"]'


@pytest.mark.parametrize(
    "name, shown, kind",
    [
        *[("1", "1", "int"), ("~", "None", "NoneType"), ("NO", "False", "bool")],
        *[("2020-01-01", "2020-01-01", "date"), ("!!binary YQ==", "b'a'", "bytes")],
    ],
)
def test_keys_that_are_no_texts(write, name, shown, kind):
    end = f"a key of type {kind} is not accepted: keys are texts; write it in quotes"
    assert refused(write(a=f"{name}: 2")) == f"a.yaml: {shown}: {end}"
    assert refused(write(a=f"A: {{B: {{{name}: 2}}}}")) == f"a.yaml: A.B.{shown}: {end}"
    assert load_yaml(write(a=f"A: [{{{name}: 2}}]"))  # for yacs it is a value


@pytest.mark.parametrize("end", ["\\n", "\\r", "\\u2028", "\\x85"])
def test_line_ends_in_keys_and_tags(write, end):
    found = refused(write(a=f'"a{end}b": {{c: !!python/name:os.system ""}}'))
    assert found.startswith("a.yaml: 'a") and "b'.c: the tag !!python/name:os.system" in found
    assert len(found.splitlines()) == 1
    found = refused(write(a="A: !<a%0Ab> x"))
    assert found.startswith("a.yaml: A: the tag 'a\\nb' is not accepted")
    found = refused(write(b="A: {b: 1}", a=f'_BASE_: b.yaml\nA: {{b: {{"a{end}b": 1}}}}'))
    assert found.startswith("a.yaml: A.b: a node is not accepted in place of 1")


def test_a_path_with_a_line_end(tmp_path):
    for name, text in (("a", ""), ("b", "A: ["), ("c", "A: !x 1"), ("d", "_BASE_: 3")):
        path = tmp_path / f"{name}\n.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=rf"{name}\\n\.yaml'") as e:
            load_yaml(str(path))
        assert "\n" not in str(e.value)


def test_a_url_that_is_none(write):
    path = write(a="_BASE_: 'http://x.invalid/a b'")

    def open_file(path):
        return open(path) if "://" not in path else urllib.request.urlopen(path)

    with pytest.raises(InputError, match="^http://x.invalid/a b cannot be read: URL can't contain"):
        load_yaml(path, open_file)


def test_each_file_is_read_once(write):
    """In a chain where each names the next one twice: 2^45 times."""
    files = {f"n{k}": f"_BASE_: [n{k + 1}.yaml, ./n{k + 1}.yaml]" for k in range(45)}
    write(n45="A: 3", **files)
    path, seen = write(n0=f"{files['n0']}\nB: 4"), Counter()

    def open_file(path):
        seen[os.path.realpath(path)] += 1
        assert seen[os.path.realpath(path)] == 1
        return open(path)

    assert load_yaml(path, open_file) == {"A": 3, "B": 4}
    assert len(seen) == 46


def test_a_base_is_not_changed_by_what_is_over_it(write):
    path = write(
        root="A: {X: 1, Y: {Z: 1}, W: [1]}",
        left="_BASE_: root.yaml\nA: {X: 2, Y: {Z: 2, N: 2}}",
        right="_BASE_: root.yaml\nB: 3",
        top="_BASE_: [left.yaml, right.yaml]\nA: {Y: {M: 4}}",
    )
    expected = {"A": {"X": 1, "Y": {"Z": 1, "N": 2, "M": 4}, "W": [1]}, "B": 3}
    assert load_yaml(path) == CfgNode.load_yaml_with_base(path) == expected


def test_the_bases_of_a_link_are_beside_the_link(write, tmp_path):
    path = write(
        sub__a="_BASE_: b.yaml", sub__b="A: 1", b="A: 2\nB: 2", top="_BASE_: [sub/a.yaml, a.yaml]"
    )
    (tmp_path / "a.yaml").symlink_to("sub/a.yaml")
    assert load_yaml(path) == CfgNode.load_yaml_with_base(path) == {"A": 2, "B": 2}


def test_a_long_chain_of_bases(write):
    files = {f"n{k}": f"_BASE_: n{k - 1}.yaml" for k in range(1, 1200)}
    path = write(n0="A: 3", **files)
    found = refused(path)
    start = "n1149.yaml: _BASE_: more than 50 files, each the base of the one before, are not "
    assert found == f"{start}accepted; the first is n1199.yaml"
    assert load_yaml(path.replace("1199", "50")) == {"A": 3}
    assert refused(path.replace("1199", "51")).startswith("n1.yaml: ")


def test_a_key_that_is_there_twice(write):
    """PyYAML takes the last, without a word."""
    path = write(a="SOLVER:\n  MAX_ITER: 6\nMODEL: {}\nSOLVER:\n  BASE_LR: 0.1\n")
    with pytest.raises(InputError, match="SOLVER: is there twice, in lines 1 and 4; use one"):
        load_yaml(path)
    path = write(b="SOLVER:\n  MAX_ITER: 6\n  'MAX_ITER': 7\n")
    with pytest.raises(InputError, match="SOLVER.MAX_ITER: is there twice, in lines 2 and 3"):
        load_yaml(path)


def test_a_base_that_is_a_pipe(write, tmp_path):
    """It would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    path = write(a="_BASE_: pipe\n")
    with pytest.raises(InputError, match="pipe: is a pipe, a device or a socket; use a file"):
        load_yaml(path)
