"""The vendor's own certificate authority: one for its server, one client certificate for each tenant.

    STATE/ca.key, ca.crt                                   the authority; ca.key never leaves this machine
    STATE/server/server.key, server.crt, ca.crt            what the gRPC server presents
    STATE/tenants/NAME/tenant.key, tenant.crt, ca.crt      the enrolment folder: hand it to the tenant, then delete it

Keys are EC P-256 with mode 0600. A client certificate's common name is the tenant: the server believes it because
only this authority can sign one. There is no revocation list: keep validity short and issue again.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from veiltune._validate import in_range, positive_int
from veiltune.errors import InputError
from veiltune.runs import atomic_write_bytes, private_folder
from veiltune.wire.credentials import USAGES, Role, read_certificate

AUTHORITY_NAME = "Veiltune vendor authority"  # no tenant can be called so: names have neither spaces nor capitals
SERVER_NAME = "Veiltune vendor server"
_TENANT_NAME = re.compile(r"[a-z0-9-]{1,63}")
_HOST_NAME = re.compile(r"[A-Za-z0-9*]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_CLOCK_SKEW = timedelta(minutes=5)  # a certificate is valid at once on a machine whose clock is a little behind


def create_authority(folder: str | Path, *, valid_days: int = 3650) -> Path:
    """Makes the authority `ca.key` and `ca.crt`; returns the path of the certificate.

    Raises:
        InputError: If one is there already; overwriting it would lock every tenant out.
        StorageError: If the folder cannot be written.
    """
    folder = private_folder(Path(folder))
    _refuse_existing(folder / "ca.key", folder / "ca.crt")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(AUTHORITY_NAME, AUTHORITY_NAME, key.public_key(), valid_days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(sign_certificates=True), critical=True)
    _write_pair(folder, "ca", key, builder.sign(key, hashes.SHA256()))
    return folder / "ca.crt"


def issue_server(folder: str | Path, hosts: Sequence[str], *, valid_days: int = 365) -> Path:
    """Issues the server's certificate into `server/`; returns that folder.

    Args:
        folder: Holds the authority.
        hosts: Names or IP addresses under which customers reach the server; at least one.
        valid_days: Days until it expires.

    Raises:
        InputError: If there is no authority, no host, or a certificate already.
        StorageError: If the folder cannot be written.
    """
    return _issue(Path(folder), "server", "server", SERVER_NAME, server_names(hosts), valid_days)


def server_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """The hosts as a certificate names them.

    Raises:
        InputError: If there is none, or one is neither a name nor an IP address.
    """
    if not hosts:
        raise InputError("hosts must name at least one host or IP address under which customers reach the server")
    return [_host(host) for host in hosts]


def issue_tenant(folder: str | Path, name: str, *, valid_days: int = 90) -> Path:
    """Issues a tenant's client certificate; returns the enrolment folder `tenants/NAME`.

    Args:
        folder: Holds the authority.
        name: The tenant, 1 to 63 of a-z, 0-9 and hyphen; becomes the common name and `urn:veiltune:tenant:NAME`.
        valid_days: Days until it expires.

    Raises:
        InputError: If the name is not of that form, there is no authority, or the tenant is enrolled already.
        StorageError: If the folder cannot be written.
    """
    if not _TENANT_NAME.fullmatch(name):
        raise InputError(f"a tenant's name must be 1 to 63 of a-z, 0-9 and hyphen, got {name[:64]!r}")
    identity = x509.UniformResourceIdentifier(f"urn:veiltune:tenant:{name}")
    return _issue(Path(folder), f"tenants/{name}", "tenant", name, [identity], valid_days)


def describe(certificate: x509.Certificate | Path) -> str:
    """One line about a certificate: who, for what, until when.

    >>> describe(issue_tenant(state, "acme") / "tenant.crt")  # doctest: +SKIP
    'acme (urn:veiltune:tenant:acme), signed by Veiltune vendor authority, valid until 2026-03-01'
    """
    if isinstance(certificate, Path):
        certificate = read_certificate(certificate)
    try:
        identities = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = " (" + ", ".join(str(identity.value) for identity in identities) + ")"
    except x509.ExtensionNotFound:
        names = ""
    signed = f"signed by {_name_in(certificate.issuer)}, valid until {certificate.not_valid_after_utc:%Y-%m-%d}"
    return f"{_name_in(certificate.subject)}{names}, {signed}"


def _issue(
    authority: Path,
    subfolder: str,
    role: Role,
    name: str,
    identities: list[x509.GeneralName],
    valid_days: int,
) -> Path:
    signing_key, signer = _read_authority(authority)
    folder = authority / subfolder
    _refuse_existing(folder / f"{role}.key", folder / f"{role}.crt")
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(name, AUTHORITY_NAME, key.public_key(), valid_days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(sign_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([USAGES[role]]), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName(identities), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False
    )
    private_folder(folder)
    atomic_write_bytes(folder / "ca.crt", signer.public_bytes(Encoding.PEM))
    _write_pair(folder, role, key, builder.sign(signing_key, hashes.SHA256()))
    return folder


def _builder(name: str, issuer: str, key: ec.EllipticCurvePublicKey, valid_days: int) -> x509.CertificateBuilder:
    in_range(1, 36_500, valid_days=positive_int(valid_days=valid_days))
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_common_name(name))
        .issuer_name(_common_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=valid_days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _name_in(name: x509.Name) -> str:
    return str(name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _key_usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not _HOST_NAME.fullmatch(host):
        raise InputError(f"a host must be a name or an IP address without port, got {host[:64]!r}")
    return x509.DNSName(host)


def _read_authority(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    remedy = "create the authority first"
    certificate = read_certificate(folder / "ca.crt", remedy=remedy)
    try:
        key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        raise InputError(f"{folder / 'ca.key'} is missing or is not a PEM private key; {remedy}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise InputError(f"{folder / 'ca.key'} is not the key of ca.crt; restore the pair from a backup")
    return key, certificate


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise InputError(f"{path} exists and is not overwritten; move it away to issue a new one")


def _write_pair(folder: Path, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    atomic_write_bytes(folder / f"{name}.key", secret, mode=0o600)
    atomic_write_bytes(folder / f"{name}.crt", certificate.public_bytes(Encoding.PEM))
