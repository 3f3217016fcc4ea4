from __future__ import annotations

import shutil
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from veiltune.errors import InputError
from veiltune.vendor.pki import create_authority, describe, issue_server, issue_tenant
from veiltune.wire.credentials import check_credentials, read_certificate


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority with a server and the tenant acme; never changed."""
    state = tmp_path_factory.mktemp("pki") / "state"
    create_authority(state)
    issue_server(state, ["localhost", "127.0.0.1", "[::1]"])
    issue_tenant(state, "acme")
    return state


@pytest.fixture
def tenant(issued: Path, tmp_path: Path) -> Path:
    """A copy of acme's enrolment folder."""
    return Path(shutil.copytree(issued / "tenants" / "acme", tmp_path / "acme"))


def refusal(folder: Path, name: str = "tenant", now: datetime | None = None) -> str:
    with pytest.raises(InputError) as caught:
        check_credentials(folder, name=name, now=now)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


def handshake(state: Path, client: Path, *, hostname: str = "localhost") -> str:
    """A TLS handshake in memory, both sides verifying; returns the common name that the server sees."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.verify_mode = ssl.CERT_REQUIRED
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for context, folder in ((server_context, state / "server"), (client_context, client)):
        name = "server" if (folder / "server.key").exists() else "tenant"
        context.load_cert_chain(folder / f"{name}.crt", folder / f"{name}.key")
        context.load_verify_locations(folder / "ca.crt")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    peers = [client_context.wrap_bio(to_client, to_server, server_hostname=hostname), server]
    while peers:
        try:
            peers[0].do_handshake()
            peers.pop(0)
        except ssl.SSLWantReadError:
            peers.append(peers.pop(0))
    certificate = server.getpeercert()
    assert certificate is not None
    (((_, common_name),),) = certificate["subject"]  # type: ignore[misc,str-unpack]
    return str(common_name)


def test_both_parties_check_out(issued: Path) -> None:
    check_credentials(issued / "tenants" / "acme")
    check_credentials(issued / "server", name="server")


def test_handshake_names_the_tenant(issued: Path) -> None:
    assert handshake(issued, issued / "tenants" / "acme") == "acme"


def test_a_server_certificate_is_no_tenant(issued: Path) -> None:
    with pytest.raises(ssl.SSLError, match="unsuitable certificate purpose"):
        handshake(issued, issued / "server")


def test_another_host_name_is_refused(issued: Path) -> None:
    with pytest.raises(ssl.SSLError, match="Hostname mismatch"):
        handshake(issued, issued / "tenants" / "acme", hostname="elsewhere.org")


def test_another_authority_is_refused(issued: Path, tmp_path: Path) -> None:
    create_authority(tmp_path)
    with pytest.raises(ssl.SSLError):
        handshake(issued, issue_tenant(tmp_path, "acme"))


def test_names_in_the_certificates(issued: Path) -> None:
    tenant = read_certificate(issued / "tenants" / "acme" / "tenant.crt")
    assert tenant.subject.rfc4514_string() == "CN=acme"
    assert describe(tenant).startswith("acme (urn:veiltune:tenant:acme), signed by Veiltune vendor authority, valid")
    server = describe(issued / "server" / "server.crt")
    assert server.startswith("Veiltune vendor server (localhost, 127.0.0.1, ::1), signed by")
    assert describe(issued / "ca.crt").startswith("Veiltune vendor authority, signed by Veiltune vendor authority")


def test_modes(issued: Path) -> None:
    for key in issued.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700


def test_the_authority_key_stays(issued: Path) -> None:
    names = {path.name for path in (issued / "tenants" / "acme").iterdir()}
    assert names == {"tenant.key", "tenant.crt", "ca.crt"}


def test_leaf_certificates_cannot_sign(issued: Path) -> None:
    leaf = read_certificate(issued / "tenants" / "acme" / "tenant.crt")
    assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False


def test_validity_days(tmp_path: Path) -> None:
    create_authority(tmp_path)
    certificate = read_certificate(issue_tenant(tmp_path, "acme", valid_days=7) / "tenant.crt")
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=6, hours=23) < left <= timedelta(days=7)
    with pytest.raises(InputError, match="valid_days must be a whole number of at least 1, got 0"):
        issue_tenant(tmp_path, "other", valid_days=0)


def test_nothing_is_overwritten(issued: Path) -> None:
    before = {path: path.read_bytes() for path in issued.rglob("*.*")}
    attempts: list[Callable[[], Path]] = [
        lambda: create_authority(issued),
        lambda: issue_server(issued, ["localhost"]),
        lambda: issue_tenant(issued, "acme"),
    ]
    for again in attempts:
        with pytest.raises(InputError, match="exists and is not overwritten; move it away to issue a new one"):
            again()
    assert {path: path.read_bytes() for path in issued.rglob("*.*")} == before


@pytest.mark.parametrize("name", ["", "Acme", "a b", "../ca", "a" * 64, "acme\n", "é"])
def test_bad_tenant_names(issued: Path, name: str) -> None:
    with pytest.raises(InputError, match="must be 1 to 63 of a-z, 0-9 and hyphen"):
        issue_tenant(issued, name)


@pytest.mark.parametrize("hosts", [[], ["a b"], ["localhost:80"], ["é.org"], ["-"]])
def test_bad_hosts(tmp_path: Path, hosts: list[str]) -> None:
    create_authority(tmp_path)
    with pytest.raises(InputError, match="host"):
        issue_server(tmp_path, hosts)
    assert not (tmp_path / "server").exists()


def test_no_authority(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ca.crt is missing; create the authority first"):
        issue_tenant(tmp_path, "acme")


def test_foreign_authority_key(issued: Path, tmp_path: Path) -> None:
    create_authority(tmp_path)
    shutil.copy(issued / "ca.crt", tmp_path / "ca.crt")
    with pytest.raises(InputError, match=r"ca.key is not the key of ca.crt"):
        issue_tenant(tmp_path, "acme")


@pytest.mark.parametrize("name", ["tenant.key", "tenant.crt", "ca.crt"])
def test_a_missing_file(tenant: Path, name: str) -> None:
    (tenant / name).unlink()
    assert refusal(tenant) == f"{name} is missing; ask the vendor for a new enrolment folder"


@pytest.mark.parametrize("name", ["tenant.crt", "ca.crt"])
def test_not_a_certificate(tenant: Path, name: str) -> None:
    (tenant / name).write_text("hello")
    assert refusal(tenant) == f"{name} is not a PEM certificate; ask the vendor for a new enrolment folder"


def test_not_a_key(tenant: Path) -> None:
    (tenant / "tenant.key").write_text("hello")
    assert refusal(tenant).startswith("tenant.key is not an unencrypted PEM private key")


def test_expired_and_not_yet_valid(tenant: Path) -> None:
    end = read_certificate(tenant / "tenant.crt").not_valid_after_utc
    assert refusal(tenant, now=end + timedelta(days=1)).startswith(f"tenant.crt expired on {end:%Y-%m-%d}; ask")
    assert refusal(tenant, now=datetime(2020, 1, 1, tzinfo=UTC)).endswith("check this machine's clock")
    authority_end = read_certificate(tenant / "ca.crt").not_valid_after_utc
    assert "expired" in refusal(tenant, now=authority_end + timedelta(days=1))


def test_key_of_another(issued: Path, tenant: Path) -> None:
    shutil.copy(issued / "server" / "server.key", tenant / "tenant.key")
    assert refusal(tenant).startswith("tenant.key is not the key of tenant.crt")


def test_another_authority(tenant: Path, tmp_path: Path) -> None:
    shutil.copy(create_authority(tmp_path / "other"), tenant / "ca.crt")
    assert refusal(tenant).startswith("tenant.crt was not signed by the authority in ca.crt")


def test_the_other_role(issued: Path, tenant: Path) -> None:
    for ending in ("key", "crt"):
        shutil.copy(issued / "server" / f"server.{ending}", tenant / f"tenant.{ending}")
    assert refusal(tenant).startswith("tenant.crt was not issued for a tenant")
