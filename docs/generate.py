"""Writes the generated parts of these pages: `make docs` runs it through cog, `make check` fails where one is stale.

A page calls one function from a comment, ``[[[cog import generate; cog.outl(generate.commands()) ]]]``.
"""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from veiltune.audit.leakage import LeakageRecord
from veiltune.audit.record import AttackRecord
from veiltune.config import Section, TrainConfig, TuneConfig, VendorConfig
from veiltune.config.guard import GuardConfig

_COMMAND_LISTS = re.compile(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n")  # they cut every sentence short
_HELP_OPTION = "* `--help`: Show this message and exit.\n"
_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
_WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}


def commands() -> str:
    """What every command says of itself, by Typer's own documentation writer."""
    page = subprocess.run(
        [sys.executable, "-m", "typer", "veiltune.cli", "utils", "docs", "--name", "veiltune", "--title", "-"],
        check=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
    ).stdout
    _, first, rest = html.unescape(page).partition("## `veiltune ")  # the title and the usage of the whole stay behind
    sections = _COMMAND_LISTS.sub("", first + rest).replace(_HELP_OPTION, "").replace("**Options**:\n\n\n", "")
    return re.sub(r"\n{3,}", "\n\n", sections).strip()


def tune_keys() -> str:
    """Every key of a customer's TOML file: one table a section."""
    return _sections(TuneConfig)


def train_keys() -> str:
    """Every key of a private training run's TOML file: one table a section."""
    return _sections(TrainConfig)


def guard_keys() -> str:
    """Every key of a guarded API's TOML file: one table a section."""
    return _sections(GuardConfig)


def _sections(config: type[Section]) -> str:
    schema = config.model_json_schema()
    return "\n\n".join(["### Outside every section", *_pages(schema, schema["$defs"], "")])


def _pages(section: dict[str, Any], definitions: dict[str, Any], prefix: str) -> Iterator[str]:
    """A table of a section's own keys, then the sections inside it, each under its dotted name."""
    inner = {name: _reference(field) for name, field in section["properties"].items()}
    own = {name: field for name, field in section["properties"].items() if not inner[name]}
    yield _table(own, section.get("required", []))
    for name, reference in inner.items():
        if reference:
            definition = definitions[reference.rpartition("/")[2]]
            yield f"### `[{prefix}{name}]`"
            yield definition["description"]
            yield from _pages(definition, definitions, f"{prefix}{name}.")


def _reference(field: dict[str, Any]) -> str:
    """What defines a section, also one that may be left out; empty for a key."""
    choices = [field, *field.get("anyOf", [])]
    return next((choice["$ref"] for choice in choices if "$ref" in choice), "")


def vendor_keys() -> str:
    """Every key of a vendor's TOML file."""
    schema = VendorConfig.model_json_schema()
    return _table(schema["properties"], schema.get("required", []))


def attack_schema() -> str:
    """The JSON schema of attacks.json."""
    return json.dumps(AttackRecord.model_json_schema(), indent=1, sort_keys=True) + "\n"


def leakage_schema() -> str:
    """The JSON schema of leakage.json."""
    return json.dumps(LeakageRecord.model_json_schema(), indent=1, sort_keys=True) + "\n"


def _table(fields: dict[str, dict[str, Any]], required: list[str]) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "*required*" if name in required else _toml(field.get("default"))
        rows.append(f"| `{name}` | {_type(field)} | {default} | {field['description']} |")
    return "\n".join(rows)


def _type(field: dict[str, Any]) -> str:
    if field.get("type") == "array":
        return f"list of {_type(field['items'])}s"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    for choice in field.get("anyOf", []):
        if choice.get("type") != "null":
            return _type(choice)
    bounds = [phrase.format(f"{field[key]:.12g}") for key, phrase in _BOUNDS.items() if key in field]
    return " ".join([_WORDS[field["type"]], *bounds[:1], *(f"and {bound}" for bound in bounds[1:])])


def _toml(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{json.dumps(value, ensure_ascii=False)}`" if isinstance(value, str) else f"`{value}`"


if __name__ == "__main__":
    print(leakage_schema() if sys.argv[1:] == ["leakage"] else attack_schema(), end="")
