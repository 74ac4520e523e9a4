"""The config's JSON schema, read: which keys there are, what each takes, and which one a wrong key was meant to be.

It serves error messages, `rlhf plan` and docs/configuration.md. It knows JSON schema as pydantic writes it, and
nothing of what the config means.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True, slots=True)
class Recommended:
    """The range that is usual in practice, of a value that may also lie outside."""

    low: float
    high: float
    algorithms: tuple[str, ...] = ()  # those that it is meant for; (): all

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


class Discriminator(BaseModel):
    """Which section stands for each `type`: tag → reference."""

    model_config = ConfigDict(frozen=True)

    mapping: dict[str, str]


class Node(BaseModel):
    """One node of a JSON schema: what is read of it here. A keyword that is not there is None, or empty.

    >>> str(Node.model_validate({"type": "number", "recommended": [0.05, 0.1]}).usual)
    '0.05 to 0.1'
    """

    model_config = ConfigDict(frozen=True)

    ref: str | None = Field(default=None, alias="$ref")
    defs: dict[str, Node] = Field(default={}, alias="$defs")
    any_of: tuple[Node, ...] = Field(default=(), alias="anyOf")
    discriminator: Discriminator | None = None
    type: str | None = None
    properties: dict[str, Node] = {}
    required: tuple[str, ...] = ()
    items: Node | None = None
    prefix_items: tuple[Node, ...] = Field(default=(), alias="prefixItems")
    const: Any = None
    enum: tuple[Any, ...] = ()
    minimum: int | float | None = None
    exclusive_minimum: int | float | None = Field(default=None, alias="exclusiveMinimum")
    maximum: int | float | None = None
    exclusive_maximum: int | float | None = Field(default=None, alias="exclusiveMaximum")
    default: Any = None
    description: str = ""
    recommended: tuple[int | float, int | float] | None = None
    recommended_for: tuple[str, ...] = ()

    @property
    def is_section(self) -> bool:
        """Whether it holds keys, not a value."""
        return "properties" in self.model_fields_set

    @property
    def has_default(self) -> bool:
        """Whether it may be left out; its default may be null."""
        return "default" in self.model_fields_set

    @property
    def options(self) -> tuple[Any, ...]:
        """The only values that it takes; empty where there is no such list."""
        return self.enum or ((self.const,) if "const" in self.model_fields_set else ())

    @property
    def bounds(self) -> list[str]:
        """Limits of a number, in signs."""
        limits = (
            ("≥", self.minimum),
            (">", self.exclusive_minimum),
            ("≤", self.maximum),
            ("<", self.exclusive_maximum),
        )
        return [f"{sign} {limit}" for sign, limit in limits if limit is not None]

    @property
    def usual(self) -> Recommended | None:
        """What is recommended: `recommended: [low, high]`, and `recommended_for` where not all algorithms are meant."""
        return None if self.recommended is None else Recommended(*self.recommended, self.recommended_for)

    @property
    def help(self) -> str:
        """The description, on one line."""
        return " ".join(self.description.split())


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

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = Node.model_validate(root)

    def resolve(self, node: Node) -> Node:
        """The node itself, or what its reference names; a nullable section is its section."""
        while node.ref is not None:
            node = self._named(node.ref)
        parts = [part for part in node.any_of if part.type != "null"]
        return self.resolve(parts[0]) if len(parts) == 1 and parts[0].ref is not None else node

    def _named(self, reference: str) -> Node:
        return self.root.defs[reference.rsplit("/", 1)[1]]

    def alternatives(self, node: Node) -> dict[str, Node]:
        """The sections that may stand here: {"": section}, or one for each `type`; empty for a value."""
        node = self.resolve(node)
        if node.discriminator is not None:
            return {tag: self.resolve(self._named(ref)) for tag, ref in node.discriminator.mapping.items()}
        return {"": node} if node.is_section else {}

    def keys(self, node: Node) -> list[str]:
        """Every key that a section may have, in the schema's order."""
        return list(dict.fromkeys(key for section in self.alternatives(node).values() for key in section.properties))

    def locate(self, location: Sequence[str | int]) -> tuple[str, Node | None]:
        """Dotted path and node of a pydantic error's location; None for a key that does not exist.

        Tags of typed sections and names of union members, which pydantic writes into a location, are left out.
        """
        node, parts = self.root, []
        for step in location:
            node, name = self.resolve(node), str(step)
            if node.discriminator is not None and name in node.discriminator.mapping:
                node = self.alternatives(node)[name]
            elif node.is_section:
                parts.append(name)
                if name not in node.properties:
                    return ".".join(parts), None
                node = node.properties[name]
            elif isinstance(step, int) and node.items is not None and self.alternatives(node.items):
                parts.append(name)
                node = node.items
            else:
                break
        return ".".join(parts), node

    def describe(self, node: Node) -> str:
        """What a node takes, in words.

        >>> nullable = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}
        >>> Schema({}).describe(Node.model_validate(nullable))
        'number > 0, or null'
        """
        if node.any_of:
            return ", or ".join(self.describe(part) for part in node.any_of)
        alternatives = self.alternatives(node)
        if alternatives and "" not in alternatives:
            return f"section with `type` one of {', '.join(alternatives)}"
        node = self.resolve(node)
        if node.is_section:
            return f"section ({', '.join(node.properties)})"
        if options := node.options:
            return ("one of " if len(options) > 1 else "") + ", ".join(str(option) for option in options)
        if node.type == "array":
            items = node.prefix_items
            return f"list of {len(items)} ({self.describe(items[0])})" if items else self._list_of(node)
        kind = "true or false" if node.type == "boolean" else node.type or "anything"
        return f"{kind} {', '.join(node.bounds)}" if node.bounds else kind

    def _list_of(self, node: Node) -> str:
        if node.items is None:
            return "list"
        kind, space, rest = self.describe(node.items).partition(" ")
        return f"list of {kind}s{space}{rest}"

    def leaves(self, node: Node | None = None, prefix: str = "") -> Iterator[Leaf]:
        """Every key that holds a value, in the schema's order; of keys that alternatives share, each variant once."""
        alternatives = self.alternatives(self.root if node is None else node)
        for key in self.keys(self.root if node is None else node):
            having = {tag: section for tag, section in alternatives.items() if key in section.properties}
            if key == "type" and "" not in alternatives:
                first = next(iter(having.values())).properties[key]
                yield Leaf(f"{prefix}{key}", f"one of {', '.join(alternatives)}", None, first.help)
                continue
            variants: dict[Leaf, list[str]] = {}
            for tag, section in having.items():
                required = key in section.required
                for leaf in self._leaf(section.properties[key], f"{prefix}{key}", required=required):
                    variants.setdefault(leaf, []).append(tag)
            for leaf, tags in variants.items():
                yield replace(leaf, types=tuple(tags)) if len(tags) < len(alternatives) else leaf

    def _leaf(self, node: Node, path: str, *, required: bool) -> Iterator[Leaf]:
        items = self.resolve(node).items
        if self.alternatives(node):
            if node.any_of:
                yield Leaf(path, "section, or null", "null", node.help)
            yield from self.leaves(node, f"{path}.")
        elif items is not None and self.alternatives(items):
            yield from self.leaves(items, f"{path}.*.")
        else:
            default = json.dumps(node.default, ensure_ascii=False) if node.has_default and not required else None
            yield Leaf(path, self.describe(node), default, node.help, recommended=node.usual)

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
