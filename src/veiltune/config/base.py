"""Reading a TOML file into a frozen model: overrides, and refusals of one line each."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from veiltune._validate import nearest
from veiltune.errors import ConfigError

_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")

Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Threads = Annotated[int, Field(ge=0, le=1024)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]


def _host_and_port(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or (":" in host and not host.startswith("[")):
        raise PydanticCustomError("address", "must be host:port, an IPv6 host in brackets")
    return address


Address = Annotated[str, AfterValidator(_host_and_port)]


class Section(BaseModel):
    """Frozen, no unknown keys, no conversion between types (a whole number may stand for a float)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


Config = TypeVar("Config", bound=Section)


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies overrides.

    Args:
        cls: `TuneConfig`, `TrainConfig` or `VendorConfig`.
        path: The file.
        overrides: `section.key=value` each, the value as TOML; a value that is not TOML is taken as a string, an
            empty one removes the key.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: If the file is missing or is not UTF-8 TOML, or a key or value is not allowed; one line.
    """
    tree = _read_toml(Path(path))
    _check_kind(cls, tree, path)
    sources = {_apply_override(tree, override): f"--set {override}" for override in overrides}
    return parse_config(cls, tree, where=str(path), sources=sources)


def _check_kind(cls: type[Section], tree: Mapping[str, Any], path: str | Path) -> None:
    """Tells the configuration of a split run from that of private fine-tuning, which have sections of one name."""
    ours, split = cls.model_fields.keys(), "split" in tree or "vendor" in tree
    if split != ("split" in ours) and ("split" in ours or "defences" in ours) and (split or "defences" in tree):
        command = "tune" if split else "train"
        raise ConfigError(f"{path} is a configuration of `veiltune {command}`; this command is for another kind of run")


def parse_config(
    cls: type[Config], tree: Mapping[str, Any], *, where: str = "options", sources: Mapping[str, str] | None = None
) -> Config:
    """Checks a tree of keys and values.

    Args:
        cls: `TuneConfig`, `TrainConfig` or `VendorConfig`.
        tree: As TOML gives it.
        where: What a refusal names as the place of the fault.
        sources: Another place for some dotted keys.

    Raises:
        ConfigError: If a key or value is not allowed; one line.
    """
    try:
        return cls.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_describe(cls, error, where, sources or {})) from None


def dump_toml(config: BaseModel) -> str:
    """The configuration as TOML with every default spelt out; `load_config` reads it back equal.

    >>> class Wire(Section):
    ...     dtype: str
    ...     pad_to: int = 0
    >>> print(dump_toml(Wire(dtype="int8")))
    dtype = "int8"
    pad_to = 0
    <BLANKLINE>
    """
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def check_loopback(address: str) -> None:
    """Refuses plaintext on any other interface."""
    if address.rpartition(":")[0] not in _LOOPBACK_HOSTS:
        raise ValueError(f"allows plaintext only on loopback, not on {address!r}; use certificates")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; name a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Writes one override into the tree; returns its dotted key."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    *sections, key = dotted.split(".")
    if not equals or not all((*sections, key)) or not override.isprintable():
        raise ConfigError(f"--set must be section.key=value, got {override!r}")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    if text.strip():
        tree[key] = _parse_value(text.strip())
    else:
        tree.pop(key, None)
    return dotted


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself, so that names and paths need no quotes in a shell.

    >>> _parse_value("0.5"), _parse_value("true"), _parse_value("d_chi")
    (0.5, True, 'd_chi')
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _describe(cls: type[BaseModel], error: ValidationError, file: str, sources: Mapping[str, str]) -> str:
    """One line about the first fault: where it stands, the key, what was expected, what came, what to do."""
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # why another is missing
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    overrides = [source for name, source in sources.items() if f"{name}.".startswith(f"{key}.")]
    where = overrides[0] if len(overrides) == 1 else f"{file} with --set" if overrides else file
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}; {_hint(cls, path)}"
    if first["type"] == "missing":
        remedy = f"add the section [{key}]" if key in _sections(cls) else f"add it or pass --set {key}=..."
        return f"{where}: {key} is missing; {remedy}"
    if first["type"] == "value_error":
        return f"{where}: {f'{key} ' if key else ''}{first['ctx']['error']}"
    expected = first["msg"].replace("Input should be", "must be").replace(" after validation", "")
    expected = expected.replace("String should", "must").replace("List should", "must")
    return f"{where}: {key} {expected}, got {first['input']!r}"


def _hint(cls: type[BaseModel], path: Sequence[str]) -> str:
    """What the key at `path` was meant to be: itself in another section, or the nearest one in its own."""
    elsewhere = [known for known in _dotted_keys(cls) if known.split(".")[-1] == path[-1]]
    if elsewhere:
        return f"did you mean {' or '.join(map(repr, elsewhere))}?"
    for section in path[:-1]:
        inner = _section(cls.model_fields[section].annotation)
        assert inner is not None
        cls = inner
    return nearest(path[-1], cls.model_fields)


def _dotted_keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every section and key of a configuration, as `section.key`."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        inner = _section(field.annotation)
        if inner:
            yield from _dotted_keys(inner, f"{prefix}{name}.")


def _sections(cls: type[BaseModel]) -> list[str]:
    return [name for name, field in cls.model_fields.items() if _section(field.annotation)]


def _section(annotation: Any) -> type[BaseModel] | None:
    choices = [annotation, *get_args(annotation)]  # a section that may be left out is a union with None
    return next((choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)), None)
