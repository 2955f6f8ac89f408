"""Signed envelopes (DSSE) by securesystemslib, with keys as openssl writes them. No cryptography of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audits.errors import InputError, MissingPartError
from audits.parts import missing_part
from registry_models.attestation.refusals import Refusal, RefusedAttestationError

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

#: What in-toto statements are called in an envelope.
PAYLOAD_TYPE = "application/vnd.in-toto+json"

#: Largest envelope that is read; one has about 5 kB.
MAXIMUM_BYTES = 2**20


def sign(payload: bytes, key_file: Path) -> dict[str, Any]:
    """Return the envelope of a payload, signed with the private key in ``key_file``.

    Raises:
        InputError: the file holds no private key that can sign.
        MissingPartError: securesystemslib is not installed.
    """
    signer = private_signer(key_file)
    from securesystemslib.dsse import Envelope

    envelope = Envelope(payload, PAYLOAD_TYPE, {})
    envelope.sign(signer)
    found: dict[str, Any] = envelope.to_dict()
    return found


def private_signer(key_file: Path) -> Any:
    """Return securesystemslib's signer of the private key in ``key_file``.

    Raises:
        InputError: the file cannot be read, or holds no private key that can sign.
        MissingPartError: securesystemslib is not installed.
    """
    _require()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner, SSlibKey

    content = _read(key_file)
    try:
        private: Any = load_pem_private_key(content, password=None)
        return CryptoSigner(private, SSlibKey.from_crypto(private.public_key()))
    except TypeError as error:
        raise InputError(f"the key {key_file} is encrypted: give it decrypted, as `openssl pkey` writes it") from error
    except Exception as error:  # whatever the library says of a file that holds no usable key
        raise InputError(f"{key_file} holds no private key of a known kind, as PEM: {_first_line(error)}") from error


def opened(envelope: Path | bytes, key_file: Path) -> tuple[bytes, str]:
    """Return the payload of an envelope that the key's owner signed, and the key's id.

    Args:
        envelope: its file, or what is in it.
        key_file: the public key, PEM.

    Raises:
        RefusedAttestationError: another key signed it, or the signature is not of this payload.
        InputError: there is no envelope, or no public key, in the files.
        MissingPartError: securesystemslib is not installed.
    """
    _require()
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError

    key = public_key(key_file)
    content = _read(envelope) if isinstance(envelope, Path) else envelope
    try:
        read = Envelope.from_dict(json.loads(content))
        signers, payload, kind = list(read.signatures), bytes(read.payload), str(read.payload_type)
    except Exception as error:  # anything can be in that file
        name = envelope if isinstance(envelope, Path) else "the attestation"
        raise InputError(f"{name} holds no signed envelope (DSSE): {_first_line(error)}") from error
    if key.keyid not in signers:
        by = ", ".join(signer[:16] for signer in signers) or "nobody"
        raise RefusedAttestationError(
            Refusal.KEY, f"it is signed by another key ({by}) than {key_file} ({key.keyid[:16]})"
        )
    try:
        read.verify([key], 1)
    except VerificationError as error:
        raise RefusedAttestationError(
            Refusal.SIGNATURE, "its signature is wrong: it was changed after it was signed, or never signed by this key"
        ) from error
    if kind != PAYLOAD_TYPE:
        raise RefusedAttestationError(Refusal.KIND, f"it is signed and holds {kind!r}, not an in-toto statement")
    return payload, str(key.keyid)


def public_key(key_file: Path) -> SSlibKey:
    """Return the public key in a PEM file.

    Raises:
        InputError: there is none; the text has the cure for a private one.
        MissingPartError: securesystemslib is not installed.
    """
    _require()
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    content = _read(key_file)
    if b"PRIVATE KEY" in content:
        raise InputError(f"{key_file} is a private key: `openssl pkey -in {key_file} -pubout` writes its public one")
    try:
        found: SSlibKey = SSlibKey.from_crypto(load_pem_public_key(content))
    except Exception as error:  # whatever the library says of a file that holds no usable key
        raise InputError(f"{key_file} holds no public key of a known kind, as PEM: {_first_line(error)}") from error
    return found


def _require() -> None:
    """Name what is not installed.

    Raises:
        MissingPartError: securesystemslib is not there, or lacks its cryptography.
    """
    try:
        import securesystemslib.dsse  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_part(error) or error from error
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingPartError("Attestation is not installed: pip install 'gradaudit[attest]'") from error


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAXIMUM_BYTES + 1)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    if len(content) > MAXIMUM_BYTES:
        raise InputError(f"{file} is larger than {MAXIMUM_BYTES // 2**20} MiB: refused")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
