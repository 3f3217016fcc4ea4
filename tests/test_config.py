from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from veiltune.config import TrainConfig, TuneConfig, VendorConfig, dump_toml, load_config
from veiltune.config.base import Section
from veiltune.config.guard import GuardConfig
from veiltune.errors import ConfigError

MINIMAL = """
[vendor]
address = "localhost:50051"
plaintext = true
[split]
cut_layer = 2
[data]
train = "train.csv"
eval = "eval.csv"
[privacy]
noise_to_norm = 1.5
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tune.toml"
    path.write_text(MINIMAL)
    return path


def refusal(
    path: Path, *overrides: str, cls: type[TuneConfig] | type[TrainConfig] | type[VendorConfig] = TuneConfig
) -> str:
    """The message of the refusal, always one line."""
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults(path: Path) -> None:
    config = load_config(TuneConfig, path)
    assert (config.privacy.mechanism, config.privacy.labels, config.privacy.label_epsilon) == (
        "d_chi",
        "randomized_response",
        3.0,
    )
    assert (config.split.bottom, config.wire.dtype, config.train.method) == ("frozen", "bf16", "lora")
    assert config.noise_seed is None


def test_dump_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(TuneConfig, path, ["noise_seed=7", "split.head=customer"])
    (tmp_path / "dumped.toml").write_text(dump_toml(config))
    assert load_config(TuneConfig, tmp_path / "dumped.toml") == config


def test_dump_leaves_no_default_unsaid(path: Path) -> None:
    dumped = dump_toml(load_config(TuneConfig, path))
    assert "cti_top_multiplier = inf" in dumped
    assert "eta = " not in dumped


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("train.epochs=7", lambda c: c.train.epochs, 7),
        ("train.alpha=8", lambda c: c.train.alpha, 8.0),
        ("run=runs/other", lambda c: c.run, "runs/other"),
        ("data.train='a b.csv'", lambda c: c.data.train, "a b.csv"),
        ("privacy.cti_at_inference = false", lambda c: c.privacy.cti_at_inference, False),
        ("data.train=hub:sst2:train", lambda c: c.data.train, "hub:sst2:train"),
        ("data.train=a=b.csv", lambda c: c.data.train, "a=b.csv"),
    ],
)
def test_overrides(path: Path, override: str, get: object, expected: object) -> None:
    assert callable(get)
    assert get(load_config(TuneConfig, path, [override])) == expected


def test_later_override_wins_and_empty_removes(path: Path) -> None:
    config = load_config(TuneConfig, path, ["train.rank=4", "train.rank=2", "privacy.noise_to_norm=", "privacy.eta=9"])
    assert (config.train.rank, config.privacy.noise_to_norm, config.privacy.eta) == (2, None, 9.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=4", "unknown key 'train.epoch'; did you mean 'epochs'?"),
        ("trian.epochs=4", "unknown key 'trian'; did you mean 'train'?"),
        ("train.epochs=many", "train.epochs must be a valid integer, got 'many'"),
        ("train.epochs=1.5", "train.epochs must be a valid integer, got 1.5"),
        ("train.epochs=true", "train.epochs must be a valid integer, got True"),
        ("train.rank=0", "train.rank must be greater than or equal to 1, got 0"),
        ("train.rank=4294967296", "train.rank must be less than or equal to 1024, got 4294967296"),
        ("train.seed=-1", "train.seed must be greater than or equal to 0, got -1"),
        (f"train.seed={2**63}", f"train.seed must be less than {2**63}, got {2**63}"),
        ("train.threads=1000000", "train.threads must be less than or equal to 1024, got 1000000"),
        ("split.cut_layer=4294967296", "split.cut_layer must be less than 2147483648, got 4294967296"),
        ("wire.pad_to=65537", "wire.pad_to must be less than or equal to 65536, got 65537"),
        ("vendor.timeout_seconds=1e300", "vendor.timeout_seconds must be less than or equal to 86400, got 1e+300"),
        ("privacy.noise_to_norm=inf", "privacy.noise_to_norm must be less than or equal to 10000, got inf"),
        ("privacy.noise_to_norm=-1", "privacy.noise_to_norm must be greater than or equal to 0.000001, got -1"),
        ("vendor.credentials=me", "vendor has credentials, which plaintext does not use; remove one of the two"),
        ("privacy.mechanism=d_chl", "privacy.mechanism must be 'none', 'd_chi' or 'gaussian', got 'd_chl'"),
        ("privacy.eta=1", "privacy needs exactly one of eta, noise_to_norm, snr_db, got eta, noise_to_norm"),
        ("privacy.noise_to_norm=", "privacy needs exactly one of eta, noise_to_norm, snr_db, got none of them"),
        ("privacy.mechanism=none", "privacy has noise_to_norm, which means nothing without noise; remove it"),
        ("vendor.address=localhost", "vendor.address must be host:port, an IPv6 host in brackets, got 'localhost'"),
        ("vendor.address=a:99999", "vendor.address must be host:port, an IPv6 host in brackets, got 'a:99999'"),
        ("vendor.address=::1:80", "vendor.address must be host:port, an IPv6 host in brackets, got '::1:80'"),
        ("vendor.address=a.org:80", "vendor allows plaintext only on loopback, not on 'a.org:80'; use certificates"),
        ("vendor.plaintext=false", "vendor needs credentials, the enrolment folder that the vendor issued"),
        ("privacy.dp.epsilom=3", "unknown key 'privacy.dp.epsilom'; did you mean 'epsilon'?"),
        ("train.micro_batches=64", "train has 64 micro_batches for 32 examples in batch_size; lower it"),
    ],
)
def test_refusals_name_the_override(path: Path, override: str, message: str) -> None:
    assert refusal(path, override) == f"--set {override}: {message}"


@pytest.mark.parametrize(
    ("cls", "other", "tree"),
    [(TrainConfig, "tune", "split.cut_layer = 1"), (TuneConfig, "train", 'defences.preset = "dp"')],
)
def test_a_configuration_of_another_command_is_named(cls: type[Section], other: str, tree: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'model.digest = ""\n{tree}\n')
    with pytest.raises(
        ConfigError, match=f"is a configuration of `veiltune {other}`; this command is for another kind"
    ):
        load_config(cls, path)


def test_refusals_name_the_file(path: Path) -> None:
    path.write_text(MINIMAL.replace("cut_layer", "cut_layers"))
    assert refusal(path) == f"{path}: unknown key 'split.cut_layers'; did you mean 'cut_layer'?"
    path.write_text(MINIMAL.replace("cut_layer = ", "# "))
    assert refusal(path) == f"{path}: split.cut_layer is missing; add it or pass --set split.cut_layer=..."


@pytest.mark.parametrize("override", ["train", "=3", "train.=3", ".train=3", "train.rank=\n3"])
def test_malformed_override(path: Path, override: str) -> None:
    assert refusal(path, override) == f"--set must be section.key=value, got {override!r}"


def test_override_below_a_value(path: Path) -> None:
    assert refusal(path, "split.cut_layer.x=3") == "--set split.cut_layer.x=3: cut_layer is a value, not a section"


def test_unreadable_files(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.toml").endswith("none.toml does not exist; name a TOML file")
    (tmp_path / "latin.toml").write_bytes('run = "café"'.encode("latin-1"))
    assert "is not UTF-8 (byte 10)" in refusal(tmp_path / "latin.toml")
    (tmp_path / "broken.toml").write_text("run =\n")
    assert "is not valid TOML: Invalid value (at line 1" in refusal(tmp_path / "broken.toml")
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def test_no_strength_without_a_mechanism(path: Path) -> None:
    config = load_config(TuneConfig, path, ["privacy.mechanism=none", "privacy.noise_to_norm="])
    assert config.privacy.eta is config.privacy.noise_to_norm is config.privacy.snr_db is None
    assert "has cti" in refusal(path, "privacy.mechanism=none", "privacy.noise_to_norm=", "privacy.cti=top")


def test_vendor_config(tmp_path: Path) -> None:
    path = tmp_path / "vendor.toml"
    path.write_text('model = "minilm"\n')
    assert load_config(VendorConfig, path).address == "127.0.0.1:50051"
    message = refusal(path, "plaintext=true", "address=0.0.0.0:80", cls=VendorConfig)
    assert message == f"{path}: allows plaintext only on loopback, not on '0.0.0.0:80'; use certificates"


def test_frozen(path: Path) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_config(TuneConfig, path).run = "elsewhere"  # type: ignore[misc]


@pytest.mark.parametrize("cls", [TuneConfig, TrainConfig, VendorConfig])
def test_every_key_says_what_it_means(cls: type[BaseModel]) -> None:
    for name, field in cls.model_fields.items():
        assert field.description, name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            test_every_key_says_what_it_means(field.annotation)


@given(text=st.text(max_size=30))
def test_any_override_is_accepted_or_refused_in_one_line(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_text(MINIMAL)
    try:
        load_config(TuneConfig, path, [f"split.cut_layer={text}"])
    except ConfigError as error:
        assert "\n" not in str(error)


def test_a_budget_that_the_ledger_cannot_count_is_refused(tmp_path: Path) -> None:
    """SQLite counts up to 2^63 - 1; beyond, every request would fail."""
    path = tmp_path / "guard.toml"
    path.write_text("")
    assert load_config(GuardConfig, path, [f"limits.budget={10**18}"]).limits.budget == 10**18
    with pytest.raises(ConfigError, match=r"limits\.budget must be") as refusal:
        load_config(GuardConfig, path, [f"limits.budget={10**18 + 1}"])
    assert "\n" not in str(refusal.value)
