"""The config's JSON schema, read: which keys there are, what each takes, and which one a wrong key was meant to be.

It serves error messages, `rlhf plan` and docs/configuration.md. It knows JSON schema as pydantic writes it, and
nothing of what the config means.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

Node: TypeAlias = Mapping[str, Any]

_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


@dataclass(frozen=True, slots=True)
class Recommended:
    """The range that is usual in practice, of a value that may also lie outside."""

    low: float
    high: float
    algorithms: tuple[str, ...] = ()  # those that it is meant for; (): all

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


def recommended(node: Node) -> Recommended | None:
    """What a field recommends: `recommended: [low, high]`, and `recommended_for` where not all algorithms are meant.

    >>> str(recommended({"type": "number", "recommended": [0.05, 0.1]}))
    '0.05 to 0.1'
    """
    if "recommended" not in node:
        return None
    low, high = node["recommended"]
    return Recommended(low, high, tuple(node.get("recommended_for", ())))


@dataclass(frozen=True, slots=True)
class Leaf:
    """One key that holds a value."""

    path: str  # dotted; an element of a list is `*`
    accepts: str  # in words
    default: str | None  # as JSON; None: must be given
    help: str
    types: tuple[str, ...] = ()  # in a section distinguished by `type`, those that have this key; (): all
    recommended: Recommended | None = None


class Schema:
    """A JSON schema with its definitions.

    >>> schema = Schema({"properties": {"steps": {"type": "integer", "minimum": 1, "description": "Steps."}}})
    >>> list(schema.leaves())
    [Leaf(path='steps', accepts='integer ≥ 1', default=None, help='Steps.', types=(), recommended=None)]
    """

    def __init__(self, root: Node) -> None:
        self.root = root

    def resolve(self, node: Node) -> Node:
        """The node itself, or what its reference names; a nullable section is its section."""
        while "$ref" in node:
            node = self.root["$defs"][node["$ref"].rsplit("/", 1)[1]]
        parts = [part for part in node.get("anyOf", ()) if part.get("type") != "null"]
        return self.resolve(parts[0]) if len(parts) == 1 and "$ref" in parts[0] else node

    def alternatives(self, node: Node) -> dict[str, Node]:
        """The sections that may stand here: {"": section}, or one for each `type`; empty for a value."""
        node = self.resolve(node)
        if "discriminator" in node:
            return {tag: self.resolve({"$ref": ref}) for tag, ref in node["discriminator"]["mapping"].items()}
        return {"": node} if "properties" in node else {}

    def keys(self, node: Node) -> list[str]:
        """Every key that a section may have, in the schema's order."""
        return list(dict.fromkeys(key for section in self.alternatives(node).values() for key in section["properties"]))

    def locate(self, location: Sequence[str | int]) -> tuple[str, Node | None]:
        """Dotted path and node of a pydantic error's location; None for a key that does not exist.

        Tags of typed sections and names of union members, which pydantic writes into a location, are left out.
        """
        node, parts = self.root, []
        for step in location:
            node = self.resolve(node)
            if "discriminator" in node and step in node["discriminator"]["mapping"]:
                node = self.resolve({"$ref": node["discriminator"]["mapping"][step]})
            elif "properties" in node:
                parts.append(str(step))
                if step not in node["properties"]:
                    return ".".join(parts), None
                node = node["properties"][step]
            elif isinstance(step, int) and self.alternatives(node.get("items", {})):
                parts.append(str(step))
                node = node["items"]
            else:
                break
        return ".".join(parts), node

    def describe(self, node: Node) -> str:
        """What a node takes, in words.

        >>> Schema({}).describe({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]})
        'number > 0, or null'
        """
        if "anyOf" in node:
            return ", or ".join(self.describe(part) for part in node["anyOf"])
        alternatives = self.alternatives(node)
        if alternatives and "" not in alternatives:
            return f"section with `type` one of {', '.join(alternatives)}"
        node = self.resolve(node)
        if "properties" in node:
            return f"section ({', '.join(node['properties'])})"
        if "const" in node or "enum" in node:
            options = node.get("enum", [node.get("const")])
            return ("one of " if len(options) > 1 else "") + ", ".join(str(option) for option in options)
        if node.get("type") == "array":
            items = node.get("prefixItems")
            return f"list of {len(items)} ({self.describe(items[0])})" if items else self._list_of(node)
        bounds = [f"{sign} {node[name]}" for name, sign in _BOUNDS if name in node]
        kind = {"boolean": "true or false"}.get(node.get("type", ""), node.get("type", "anything"))
        return f"{kind} {', '.join(bounds)}" if bounds else str(kind)

    def _list_of(self, node: Node) -> str:
        if "items" not in node:
            return "list"
        kind, space, rest = self.describe(node["items"]).partition(" ")
        return f"list of {kind}s{space}{rest}"

    def leaves(self, node: Node | None = None, prefix: str = "") -> Iterator[Leaf]:
        """Every key that holds a value, in the schema's order; of keys that alternatives share, each variant once."""
        alternatives = self.alternatives(self.root if node is None else node)
        for key in self.keys(self.root if node is None else node):
            if key == "type" and "" not in alternatives:
                first = next(iter(alternatives.values()))["properties"][key]
                yield Leaf(f"{prefix}{key}", f"one of {', '.join(alternatives)}", None, _help(first))
                continue
            variants: dict[Leaf, list[str]] = {}
            for tag, section in alternatives.items():
                if key in section["properties"]:
                    required = key in section.get("required", ())
                    for leaf in self._leaf(section["properties"][key], f"{prefix}{key}", required=required):
                        variants.setdefault(leaf, []).append(tag)
            for leaf, having in variants.items():
                yield replace(leaf, types=tuple(having)) if len(having) < len(alternatives) else leaf

    def _leaf(self, node: Node, path: str, *, required: bool) -> Iterator[Leaf]:
        if self.alternatives(node):
            if "anyOf" in node:
                yield Leaf(path, "section, or null", "null", _help(node))
            yield from self.leaves(node, f"{path}.")
        elif self.alternatives(self.resolve(node).get("items", {})):
            yield from self.leaves(self.resolve(node)["items"], f"{path}.*.")
        else:
            default = None if required or "default" not in node else json.dumps(node["default"], ensure_ascii=False)
            yield Leaf(path, self.describe(node), default, _help(node), recommended=recommended(node))

    def nearest(self, path: str) -> list[str]:
        """Existing paths that an unknown one was probably meant to be, best first; empty where none is near.

        A key beside it that is spelled much alike, the same word elsewhere, then what is less alike.
        """
        parent, _, word = path.rpartition(".")
        location = [int(part) if part.isdecimal() else part for part in parent.split(".") if part]
        _, section = self.locate(location)
        dot = f"{parent}." if parent else ""
        beside = self.keys(section) if section is not None else []
        leaves = list(dict.fromkeys(leaf.path.replace("*", "0") for leaf in self.leaves()))
        words = list(dict.fromkeys(leaf.rpartition(".")[2] for leaf in leaves))
        for cutoff in (0.8, 0.6):
            if near := difflib.get_close_matches(word, beside, n=1, cutoff=cutoff):
                return [dot + near[0]]
            meant = word if word in words else next(iter(difflib.get_close_matches(word, words, n=1, cutoff=0.8)), None)
            if meant is not None:
                found = [leaf for leaf in leaves if leaf.rpartition(".")[2] == meant]
                return sorted(found, key=lambda leaf: leaf.count("."))[:3]
        return []


def _help(node: Node) -> str:
    return " ".join(str(node.get("description", "")).split())
