"""What the TOML files may say: one frozen model for each command, every key with its meaning, default and range.

A file is the experiment; `--set section.key=value` overrides one value of it. An unknown key, a wrong type or a value
out of range is one line that names the file, the key and the remedy. Everything here is public: secrets and texts are
named by path, never written into a configuration.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from veiltune._validate import nearest
from veiltune.errors import ConfigError

_LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _host_and_port(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or (":" in host and not host.startswith("[")):
        raise PydanticCustomError("address", "must be host:port, an IPv6 host in brackets")
    return address


Address = Annotated[str, AfterValidator(_host_and_port)]


class _Section(BaseModel):
    """Frozen, no unknown keys, no conversion between types (a whole number may stand for a float)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class VendorSection(_Section):
    """How the customer reaches the vendor."""

    address: Address
    """host:port of the vendor"""
    credentials: str = ""
    """enrolment folder with tenant.key, tenant.crt and ca.crt"""
    plaintext: bool = False
    """no TLS; possible only on the loopback interface"""
    timeout_seconds: Positive = 120.0
    """for one call, after which it is sent again"""

    @model_validator(mode="after")
    def _needs_credentials(self) -> Self:
        if self.plaintext:
            _check_loopback(self.address)
        elif not self.credentials:
            raise ValueError("needs credentials, the enrolment folder that the vendor issued")
        return self


class ModelSection(_Section):
    """Which bottom model the customer accepts."""

    digest: str = ""
    """sha256 that the vendor's bottom bundle must have; empty keeps to the first and reports it in summary.json"""


class SplitSection(_Section):
    """Where the model is cut, and who holds which part."""

    cut_layer: Annotated[int, Field(ge=0)]
    """blocks in the bottom; 0 = embeddings only"""
    cut_embeddings: Literal["word", "block"] = "word"
    """at cut_layer 0: release word embeddings, or what leaves the whole embeddings block"""
    head: Literal["vendor", "customer"] = "vendor"
    """customer = U-shape: final norm, pooler and head stay with the customer"""
    bottom: Literal["frozen", "full", "lora", "bitfit", "adapter"] = "frozen"
    """what trains below the cut; anything but frozen releases every example again in each epoch"""


class DataSection(_Section):
    """The customer's tables."""

    train: str
    """file (CSV, TSV, JSONL, Parquet) or hub:NAME:SPLIT"""
    eval: str
    """the same, for the utility that is reported"""
    text_column: str = "text"
    """column of the texts"""
    label_column: str = "label"
    """column of the labels"""
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet"] = "auto"
    """auto goes by the file's ending"""
    max_length: Count = 128
    """tokens kept of one text"""


class PrivacySection(_Section):
    """What is done to representations and labels before they leave. Exactly one strength, none for mechanism none."""

    mechanism: Literal["none", "d_chi", "gaussian"] = "d_chi"
    """noise on each token's representation"""
    eta: Positive | None = None
    """strength, 1 / distance: smaller is more private"""
    noise_to_norm: Positive | None = None
    """strength as mean noise norm / mean representation norm: larger is more private"""
    snr_db: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """strength as signal-to-noise ratio in decibels: smaller is more private"""
    cti: Literal["off", "budget", "top"] = "off"
    """contributing tokens get less noise: by score, or only the top fraction"""
    cti_top_fraction: Annotated[float, Field(gt=0, le=1)] = 0.01
    """share of the vocabulary that cti = top counts as contributing"""
    cti_top_multiplier: Annotated[float, Field(ge=1)] = math.inf
    """eta of those tokens is multiplied by this; inf sends them without noise"""
    cti_at_inference: bool = True
    """also scale the noise of texts without a label"""
    labels: Literal["randomized_response", "disclosed"] = "randomized_response"
    """disclosed: the output gradients give every label away"""
    label_epsilon: Positive = 3.0
    """of randomised response, for each label"""
    keep_releases: bool = True
    """of a trainable bottom: keep all of them in the outbox for the audit; false keeps what a resumption needs"""

    @model_validator(mode="after")
    def _exactly_one_strength(self) -> Self:
        given = [name for name in ("eta", "noise_to_norm", "snr_db") if getattr(self, name) is not None]
        if self.mechanism == "none":
            if given or self.cti != "off":
                surplus = (*given, "cti")[0]
                raise ValueError(f"has {surplus}, which means nothing without noise; remove it")
        elif len(given) != 1:
            raise ValueError(
                f"needs exactly one of eta, noise_to_norm, snr_db, got {', '.join(given) or 'none of them'}"
            )
        return self


class TrainSection(_Section):
    """The fine-tuning itself."""

    method: Literal["lora", "bitfit", "adapter"] = "lora"
    """what trains in the vendor's part"""
    rank: Count = 8
    """of LoRA"""
    alpha: Positive = 16.0
    """of LoRA; updates are scaled by alpha / rank"""
    dropout: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """on the PEFT parameters' inputs"""
    adapter_size: Count = 64
    """bottleneck of an adapter"""
    epochs: Count = 3
    """passes over the training table"""
    batch_size: Count = 32
    """examples of one update"""
    micro_batches: Count = 1
    """calls that a batch is sent in"""
    learning_rate: Positive = 5e-4
    """peak of the schedule"""
    weight_decay: NonNegative = 0.01
    """of AdamW"""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.06
    """share of the steps in which the learning rate rises"""
    seed: int = 0
    """of initialisation, order and dropout; never of the noise"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of matrix products, on both sides; bf16 is faster where the hardware has it"""
    checkpoint_every: Count = 50
    """steps between checkpoints"""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 = all"""
    customer_alone: bool = True
    """also train a small head on the bottom alone, so that the utility can be compared with sending nothing"""

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> Self:
        if self.micro_batches > self.batch_size:
            raise ValueError(
                f"has {self.micro_batches} micro_batches for {self.batch_size} examples in batch_size; lower it"
            )
        return self


class WireSection(_Section):
    """How tensors travel."""

    dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    """rounding of representations, after the noise"""
    pad_to: Annotated[int, Field(ge=0)] = 0
    """lengths are rounded up to a multiple of this, so that they say less; 0 sends them as they are"""


class TuneConfig(_Section):
    """A customer's run: `veiltune tune CONFIG`."""

    run: str = "runs/tune"
    """run folder"""
    noise_seed: int | None = None
    """TESTS ONLY: whoever knows it can remove the noise; None draws from the operating system"""
    vendor: VendorSection
    """how to reach the vendor"""
    model: ModelSection = ModelSection()
    """which bottom model to accept"""
    split: SplitSection
    """where the model is cut"""
    data: DataSection
    """the tables"""
    privacy: PrivacySection
    """what is done before anything leaves"""
    train: TrainSection = TrainSection()
    """the fine-tuning"""
    wire: WireSection = WireSection()
    """how tensors travel"""


class VendorConfig(_Section):
    """A vendor's server: `veiltune vendor serve CONFIG`."""

    model: str
    """base model: minilm, a local folder or a hub name"""
    address: Address = "127.0.0.1:50051"
    """host:port to listen on; port 0 takes a free one"""
    state: str = "vendor-state"
    """folder of authority, job database and checkpoints"""
    database: str = ""
    """SQLAlchemy URL of the job store; empty: SQLite in the state folder"""
    blobs: str = ""
    """fsspec URL of uploads and checkpoints; empty: the state folder"""
    plaintext: bool = False
    """no TLS and no tenants; possible only on the loopback interface"""
    max_jobs_per_tenant: Count = 16
    """unfinished jobs that one tenant may have"""
    max_cut_layer: Annotated[int, Field(ge=0)] | None = None
    """blocks that may be disclosed; None: all"""
    max_message_bytes: Annotated[int, Field(ge=2**16, lt=2**31)] = 64 * 2**20
    """of one call"""
    norm_bound: Positive = 1e6
    """largest L2 norm of a token's representation that is accepted"""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 = all"""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    """where the model computes: cpu, cuda or cuda:N"""

    @model_validator(mode="after")
    def _plaintext_is_local(self) -> Self:
        if self.plaintext:
            _check_loopback(self.address)
        return self


Config = TypeVar("Config", bound=_Section)


def load_config(cls: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies overrides.

    Args:
        cls: `TuneConfig` or `VendorConfig`.
        path: The file.
        overrides: `section.key=value` each, the value as TOML; a value that is not TOML is taken as a string, an
            empty one removes the key.

    Returns:
        The frozen configuration.

    Raises:
        ConfigError: If the file is missing or is not UTF-8 TOML, or a key or value is not allowed; one line.
    """
    tree = _read_toml(Path(path))
    sources = {_apply_override(tree, override): f"--set {override}" for override in overrides}
    return parse_config(cls, tree, where=str(path), sources=sources)


def parse_config(
    cls: type[Config], tree: Mapping[str, Any], *, where: str = "options", sources: Mapping[str, str] | None = None
) -> Config:
    """Checks a tree of keys and values.

    Args:
        cls: `TuneConfig` or `VendorConfig`.
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

    >>> print(dump_toml(WireSection(dtype="int8")))
    dtype = "int8"
    pad_to = 0
    <BLANKLINE>
    """
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _check_loopback(address: str) -> None:
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
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    where = next((source for name, source in sources.items() if f"{name}.".startswith(f"{key}.")), file)
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}; {nearest(path[-1], _fields_beside(cls, path))}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing; add it or pass --set {key}=..."
    if first["type"] == "value_error":
        return f"{where}: {f'{key} ' if key else ''}{first['ctx']['error']}"
    expected = first["msg"].replace("Input should be", "must be").replace("String should", "must")
    return f"{where}: {key} {expected}, got {first['input']!r}"


def _fields_beside(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The keys that are known where `path` ends."""
    for section in path[:-1]:
        inner = cls.model_fields[section].annotation
        assert isinstance(inner, type) and issubclass(inner, BaseModel)
        cls = inner
    return list(cls.model_fields)
