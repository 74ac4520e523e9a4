"""docs/configuration.md, made from the schema: `python -m cluster.config.docs > docs/configuration.md`."""

from __future__ import annotations

import itertools
import sys

from cluster.config.run import run_schema
from cluster.config.schema import Leaf

_HEAD = """# Configuration

Made from the schema by `python -m cluster.config.docs > docs/configuration.md`; `rlhf plan` prints the values of a run.

The smallest file:

```yaml
policy:    {model: path/or/hub-id}
data:      {prompts: prompts.jsonl}
rewards:   [{type: model, model: path/or/hub-id}]
algorithm: {type: grpo}
```

Any key can be changed on the command line: `rlhf train run.yaml train.steps=50 rewards.0.weight=2`; values are YAML,
elements of a list are counted from 0. Unknown keys are errors. Relative paths count from the config file's folder,
on the command line from the working directory.
"""


def render() -> str:
    """The page, as Markdown: one table for each section, in the schema's order."""
    schema = run_schema()
    sections = schema.root.properties
    lines = [_HEAD]
    for section, leaves in itertools.groupby(schema.leaves(), key=_section):
        title = f"## `{section}`" if section else "## The run"
        help_text = sections[section].help if section else ""
        lines += [f"{title}\n", *([f"{help_text}\n"] if help_text else [])]
        lines += ["| key | takes | default | |", "|---|---|---|---|", *map(_row, leaves), ""]
    return "\n".join(lines)


def _section(leaf: Leaf) -> str:
    section, dot, _ = leaf.path.partition(".")
    return section if dot else ""


def _row(leaf: Leaf) -> str:
    only = f" (for {' and '.join(f'`{name}`' for name in leaf.types)})" if leaf.types else ""
    default = "**required**" if leaf.default is None else f"`{leaf.default}`"
    return (
        f"| `{leaf.path}` | {_cell(leaf.accepts)} | {_cell(default)} | {_cell(leaf.help)}{_recommended(leaf)}{only} |"
    )


def _recommended(leaf: Leaf) -> str:
    if leaf.recommended is None:
        return ""
    algorithms = "".join(f" for `{name}`" for name in leaf.recommended.algorithms)
    return f" Recommended{algorithms}: {leaf.recommended}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*.", "\\*.")


if __name__ == "__main__":
    sys.stdout.write(render())
