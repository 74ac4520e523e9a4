"""The plain tree: YAML in, dotted paths set."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config.tree import apply_overrides, get_path, parse_override, read_yaml, set_path, strings_at
from trainers.errors import UserError


def problems(error):
    return [(p.where, p.message) for p in error.value.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("-2.5E+3", -2500.0),
        ("5", 5),
        ("0.5", 0.5),
        ("true", True),
        ("null", None),
        ("none", "none"),
        ("", None),
        ("2024-01-31", "2024-01-31"),
        ("rule.py:reward", "rule.py:reward"),
        ("[a, 1]", ["a", 1]),
        ("'5'", "5"),
    ],
)
def test_values_mean_what_a_user_expects(text, value):
    found = read_yaml(text, source="x")
    assert found == value
    assert type(found) is type(value)


def test_every_duplicate_key_is_named_with_both_lines():
    text = "train:\n  steps: 1\n  steps: 2\nrewards:\n  - weight: 1\n    weight: 2\ntrain: {}\n"
    with pytest.raises(UserError) as error:
        read_yaml(text, source="run.yaml")
    assert [p.where for p in error.value.problems] == ["run.yaml:3", "run.yaml:6", "run.yaml:7"]
    assert "duplicate key steps, already given in line 2" in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "not valid YAML"),
        ("a: 1\n\tb: 2\n", 2, "not valid YAML"),
        ("a: &x [*x]\n", 1, "an alias holds itself"),
        ("a: 1\n[1, 2]: 3\n", 2, "a key must be a word"),
        ("a: 1\nb: !!python/object:os.system x\n", 2, "the tag"),
        ("a: !!binary aGk=\n", 1, "the tag"),
        ("a: 1\n---\nb: 1\n", 2, "not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_its_line(text, line, what):
    with pytest.raises(UserError) as error:
        read_yaml(text, source="run.yaml")
    where, message = problems(error)[0]
    assert where == f"run.yaml:{line}"
    assert what in message


def test_control_characters_are_refused():
    with pytest.raises(UserError, match="not valid YAML"):
        read_yaml("a: \x00", source="run.yaml")


@pytest.mark.parametrize("text", ["train.steps", "=5", "train..steps=5", ".steps=5", ""])
def test_what_is_no_override_says_how_one_looks(text):
    with pytest.raises(UserError, match=r"write key\.path=value"):
        parse_override(text)


def test_a_value_may_hold_an_equals_sign():
    assert parse_override("rewards.0.url=http://h/?a=b") == ("rewards.0.url", "http://h/?a=b")


def test_set_path_makes_sections_changes_lists_and_leaves_its_argument_alone():
    tree = {"rewards": [{"type": "model", "weight": 1}], "name": "a"}
    before = copy.deepcopy(tree)
    assert set_path(tree, "train.lr.peak", 2)["train"] == {"lr": {"peak": 2}}
    assert set_path(tree, "rewards.0.weight", 2)["rewards"] == [{"type": "model", "weight": 2}]
    assert set_path(tree, "rewards.1.type", "function")["rewards"][1] == {"type": "function"}
    assert set_path(tree, "name", {"a": 1})["name"] == {"a": 1}
    assert tree == before


def test_set_path_refuses_places_that_are_none():
    with pytest.raises(UserError, match=r"rewards\.5\.weight: '5' is not an index into a list of 1; give 0 to 1"):
        set_path({"rewards": [{}]}, "rewards.5.weight", 1)
    with pytest.raises(UserError, match="not an index into a list"):
        set_path({"rewards": [{}]}, "rewards.first", 1)
    with pytest.raises(UserError, match="'steps' cannot be set inside the value 5"):
        set_path({"train": 5}, "train.steps", 1)


def test_the_last_override_wins_and_all_bad_ones_are_reported():
    assert apply_overrides({"a": 1}, ["a=2", "a=3", "b.c=4"]) == {"a": 3, "b": {"c": 4}}
    with pytest.raises(UserError) as error:
        apply_overrides({"a": 1}, ["a", "a.b=1", "c=[1"])
    assert [where for where, _ in problems(error)] == ["a", "a.b", "c:1"]


words = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=3)


@given(st.dictionaries(words, st.integers(), max_size=3), st.lists(words, min_size=1, max_size=4), st.integers())
def test_what_is_set_is_read_back_and_the_rest_stays(tree, keys, value):
    tree = {key: part for key, part in tree.items() if key != keys[0]}
    node = changed = set_path(tree, ".".join(keys), value)
    for key in keys:
        node = node[key]
    assert node == value
    assert {key: part for key, part in changed.items() if key != keys[0]} == tree


@pytest.mark.parametrize(
    ("path", "value"),
    [("a.b", 1), ("c.1.d", 2), ("c.2", None), ("c.x", None), ("a.b.e", None), ("f", None), ("a", {"b": 1})],
)
def test_a_value_is_found_by_its_path(path, value):
    assert get_path({"a": {"b": 1}, "c": [0, {"d": 2}]}, path) == value


def test_strings_are_found_by_a_pattern_and_set_by_their_own_path():
    tree = {
        "data": {"prompts": ["a", 1], "eval_prompts": "e"},
        "rewards": [{"model": "m"}, "no section", {"path": "f"}, {"model": None}],
        "data.eval_prompts": "a key with a dot is another key",
    }
    assert list(strings_at(tree, "data.prompts")) == [("data.prompts.0", "a")]
    assert list(strings_at(tree, "data.eval_prompts")) == [("data.eval_prompts", "e")]
    assert list(strings_at(tree, "rewards.*.model")) == [("rewards.0.model", "m")]
    assert list(strings_at(tree, "data.*")) == []  # a section has no elements
    assert list(strings_at("text", "data")) == []
    for where, text in strings_at(tree, "rewards.*.model"):
        assert get_path(set_path(tree, where, text.upper()), where) == "M"
