"""Certificates as both parties check them before a connection is tried: one clear line instead of a TLS alert.

A credentials folder holds three PEM files: `NAME.key`, `NAME.crt` and `ca.crt`, with NAME `tenant` or `server`.
The handshake itself is gRPC's and checks the other party; this is about one's own files.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from veiltune.errors import InputError

Role = Literal["tenant", "server"]
USAGES = {"tenant": ExtendedKeyUsageOID.CLIENT_AUTH, "server": ExtendedKeyUsageOID.SERVER_AUTH}
_REMEDY = "ask the vendor for a new enrolment folder"
_REMEDIES: dict[Role, str] = {"tenant": _REMEDY, "server": "issue the server's certificate again"}


def check_credentials(folder: str | Path, *, name: Role = "tenant", now: datetime | None = None) -> None:
    """Refuses a credentials folder with which no handshake can succeed.

    Args:
        folder: Holds `NAME.key`, `NAME.crt` and `ca.crt`.
        name: Whose credentials: a tenant's (client certificate) or the vendor's server's.
        now: The time to check for; the present if None.

    Raises:
        InputError: If a file is missing or is not PEM, a certificate is outside its validity, the key is not the
            certificate's, the authority did not sign it, or it was issued for the other role.
    """
    folder, now = Path(folder), now or datetime.now(UTC)
    remedy = _REMEDIES[name]
    certificate = read_certificate(folder / f"{name}.crt", remedy=remedy)
    authority = read_certificate(folder / "ca.crt", remedy=remedy)
    for path, subject in ((folder / f"{name}.crt", certificate), (folder / "ca.crt", authority)):
        _check_validity(path, subject, now, remedy)
    _check_key(folder / f"{name}.key", certificate, remedy)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise InputError(f"{folder / f'{name}.crt'} was not signed by the authority in ca.crt; {remedy}") from None
    if USAGES[name] not in _usages(certificate):
        raise InputError(f"{folder / f'{name}.crt'} was not issued for a {name}; {remedy}")


def read_certificate(path: Path, *, remedy: str = _REMEDY) -> x509.Certificate:
    """Reads a PEM certificate.

    Raises:
        InputError: If the file is missing or is not one.
    """
    data = _read(path, remedy)
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError:
        raise InputError(f"{path} is not a PEM certificate; {remedy}") from None


def _check_validity(path: Path, certificate: x509.Certificate, now: datetime, remedy: str) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise InputError(f"{path} expired on {end:%Y-%m-%d}; {remedy}")
    if now < start:
        raise InputError(f"{path} is valid only from {start:%Y-%m-%d %H:%M} UTC; check this machine's clock")


def _check_key(path: Path, certificate: x509.Certificate, remedy: str) -> None:
    data = _read(path, remedy)
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise InputError(f"{path} is not an unencrypted PEM private key; {remedy}") from None
    if key.public_key() != certificate.public_key():
        raise InputError(f"{path} is not the key of {path.with_suffix('.crt').name}; {remedy}")


def _usages(certificate: x509.Certificate) -> list[x509.ObjectIdentifier]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return []


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
