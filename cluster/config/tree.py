"""The config as a plain tree: how YAML is read, and how dotted paths name the values in it.

Whoever reads, changes or walks a tree of sections and lists does it with the functions here: `get_path`, `set_path`,
`leaves` and `strings_at`. It knows yaml and no schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import yaml

from trainers.errors import Problem, UserError

Tree: TypeAlias = dict[str, Any]

_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}
_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """YAML's safe types; 1e-6 is a number (YAML 1.2) and a date stays text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the attribute's own type
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str, *, source: str) -> Any:
    """The value that a YAML text holds; UserError names `source` and the line of a mistake or of a duplicate key.

    >>> read_yaml("train: {learning_rate: 1e-6}", source="run.yaml")
    {'train': {'learning_rate': 1e-06}}
    """
    try:
        return _construct(_Loader(text), source)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError([Problem(where, f"not valid YAML: {what}")]) from error
    except (yaml.YAMLError, ValueError) as error:  # control characters; numbers such as 0b2
        raise UserError([Problem(source, f"not valid YAML: {error}")]) from error


def _construct(loader: _Loader, source: str) -> Any:
    node = loader.get_single_node()
    if node is None:
        return None
    problems = [Problem(f"{source}:{line}", message) for line, message in _mistakes(node, ())]
    if problems:
        raise UserError(problems)
    return loader.construct_document(node)


def _mistakes(node: yaml.Node, above: tuple[yaml.Node, ...]) -> Iterator[tuple[int, str]]:
    """(line, message) of what YAML allows but a config cannot mean."""
    if any(node is parent for parent in above):
        yield node.start_mark.line + 1, "an alias holds itself"
        return
    if node.tag not in _TAGS:
        yield node.start_mark.line + 1, f"the tag {node.tag!r} is not known here; write a plain value"
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _mistakes(item, (*above, node))
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                yield line, "a key must be a word, found a list or a section"
                continue
            if key.value in first:
                yield line, f"duplicate key {key.value}, already given in line {first[key.value]}; keep one of them"
            first.setdefault(key.value, line)
            yield from _mistakes(value, (*above, node))


def parse_override(text: str) -> tuple[str, Any]:
    """Path and value of `key.path=value`, the value being read as YAML.

    >>> parse_override("train.learning_rate=1e-6"), parse_override("sampling.stop=[END]")
    (('train.learning_rate', 1e-06), ('sampling.stop', ['END']))
    """
    path, equals, value = text.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError([Problem(text, "not an override; write key.path=value, for example train.steps=50")])
    return path, read_yaml(value, source=path)


def set_path(tree: Mapping[str, Any], path: str, value: Any) -> Tree:
    """A copy of the tree with `value` at a dotted path; sections that are not there yet are made.

    An element of a list is named by its index from 0; the index after the last one appends.

    >>> set_path({"rewards": [{"weight": 1}]}, "rewards.0.weight", 2)
    {'rewards': [{'weight': 2}]}
    """
    new = _with(tree, path.split("."), value, path)
    assert isinstance(new, dict)
    return new


def _with(node: Any, keys: Sequence[str], value: Any, path: str) -> Any:
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if node is None or isinstance(node, Mapping):
        section = dict(node or {})
        return {**section, key: _with(section.get(key), rest, value, path)}
    if isinstance(node, list):
        if not key.isdecimal() or int(key) > len(node):
            raise UserError(
                [Problem(path, f"{key!r} is not an index into a list of {len(node)}; give 0 to {len(node)}")]
            )
        index = int(key)
        changed = _with(node[index] if index < len(node) else None, rest, value, path)
        return [*node[:index], changed, *node[index + 1 :]]
    raise UserError([Problem(path, f"{key!r} cannot be set inside the value {node!r}, which is not a section")])


def get_path(tree: Any, path: str) -> Any:
    """The value at a dotted path; None if there is none.

    >>> get_path({"rewards": [{"weight": 1}]}, "rewards.0.weight")
    1
    """
    node = tree
    for key in path.split("."):
        if isinstance(node, Mapping):
            node = node.get(key)
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return None
    return node


def strings_at(tree: Any, pattern: str) -> Iterator[tuple[str, str]]:
    """The strings at a dotted path, or in a list there, each with its own path; `*` is every element of a list.

    >>> tree = {"data": {"prompts": ["a", "b"]}, "rewards": [{"model": "m"}, {"path": "f.py:f"}]}
    >>> [*strings_at(tree, "data.prompts"), *strings_at(tree, "rewards.*.model")]
    [('data.prompts.0', 'a'), ('data.prompts.1', 'b'), ('rewards.0.model', 'm')]
    """
    return _strings(tree, pattern.split("."), ())


def _strings(node: Any, keys: Sequence[str], above: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if not keys and isinstance(node, str):
        yield ".".join(above), node
    elif isinstance(node, list) and (not keys or keys[0] == "*"):
        for index, item in enumerate(node):
            yield from _strings(item, keys[1:], (*above, str(index)))
    elif keys and isinstance(node, Mapping) and keys[0] in node:
        yield from _strings(node[keys[0]], keys[1:], (*above, keys[0]))


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its dotted path, in order; an empty section or list is a value.

    >>> list(leaves({"a": {"b": 1, "c": {}}, "d": [2, []]}))
    [('a.b', 1), ('a.c', {}), ('d.0', 2), ('d.1', [])]
    """
    if not isinstance(tree, (Mapping, list)) or not tree:
        yield prefix, tree
        return
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))


def apply_overrides(tree: Mapping[str, Any], overrides: Iterable[str]) -> Tree:
    """The tree with each `key.path=value` set in turn; every override that cannot be read is reported."""
    result = dict(tree)
    problems: list[Problem] = []
    for text in overrides:
        try:
            result = set_path(result, *parse_override(text))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return result
