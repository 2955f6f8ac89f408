"""Envelopes and statements: what is valid is read, and each kind of what is not is refused by its own reason."""

from __future__ import annotations

import base64
import copy
import datetime
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from audits.errors import InputError
from audits.outcomes import Outcome
from audits.run import refused, with_identity
from registry_models.attestation.refusals import Refusal, RefusedAttestationError
from registry_models.attestation.signing import opened, sign
from registry_models.attestation.statement import PREDICATE_TYPE, STATEMENT_TYPE, read_statement, statement_of
from tests.registry_models.attestation.keys import ALGORITHMS, make_keys

HOUR = datetime.timedelta(hours=1)


def payload(**changes: Any) -> bytes:
    """A statement about an audit that could not judge."""
    report = with_identity(refused("no recipe"), audit_id="a1", model_name="net", model_version=3)
    statement = statement_of(report, digest="d" * 64, due_key="k", environment="torch 2")
    statement["predicate"] |= changes
    return json.dumps(statement).encode()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_was_signed_is_read_with_the_public_key(algorithm: str, tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, algorithm)
    envelope = tmp_path / "a.json"
    envelope.write_text(json.dumps(sign(payload(), private)))
    found, signer = opened(envelope, public)
    assert found == payload(attestedAt=json.loads(found)["predicate"]["attestedAt"], **_times(found))
    assert len(signer) == 64
    statement = read_statement(found)
    assert (statement.name, statement.digest, statement.outcome) == ("models:/net/3", "d" * 64, Outcome.INCONCLUSIVE)
    assert statement.predicate["checks"] == {"audit.completed": "inconclusive"}


def _times(found: bytes) -> dict[str, Any]:
    return {"auditedAt": json.loads(found)["predicate"]["auditedAt"]}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_openssl_agrees_with_the_signature(algorithm: str, tmp_path: Path) -> None:
    """An oracle that shares no code: the signed bytes by DSSE's definition, verified by openssl."""
    private, public = make_keys(tmp_path, algorithm)
    envelope = sign(b"text", private)
    kind = envelope["payloadType"].encode()
    (tmp_path / "pae").write_bytes(b"DSSEv1 %d %s 4 text" % (len(kind), kind))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    raw = ["-rawin", "-digest", "sha256"] if algorithm == "ecdsa" else ["-rawin"]
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-sigfile", "sig", "-in", "pae", *raw]
    assert subprocess.run(verify, cwd=tmp_path, check=False, capture_output=True).returncode == 0
    (tmp_path / "pae").write_bytes(b"DSSEv1 %d %s 4 next" % (len(kind), kind))
    assert subprocess.run(verify, cwd=tmp_path, check=False, capture_output=True).returncode != 0


def _payload_of_another(envelope: dict[str, Any]) -> None:
    said = json.loads(base64.b64decode(envelope["payload"]))
    said["predicate"]["outcome"] = "pass"
    envelope["payload"] = base64.b64encode(json.dumps(said).encode()).decode()


def _another_type(envelope: dict[str, Any]) -> None:
    envelope["payloadType"] = "application/json"


def _another_signature(envelope: dict[str, Any]) -> None:
    signature = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    signature[0] ^= 1
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()


@pytest.mark.parametrize("forge", [_payload_of_another, _another_type, _another_signature])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_forged_envelope_is_refused(algorithm: str, forge: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    private, public = make_keys(tmp_path, algorithm)
    envelope = sign(payload(), private)
    forged = copy.deepcopy(envelope)
    forge(forged)
    with pytest.raises(RefusedAttestationError, match="its signature is wrong") as caught:
        opened(json.dumps(forged).encode(), public)
    assert caught.value.reason is Refusal.SIGNATURE
    opened(json.dumps(envelope).encode(), public)


def test_another_key_is_refused_and_so_is_another_under_the_keys_name(tmp_path: Path) -> None:
    (private, public), (other, _) = make_keys(tmp_path / "ours"), make_keys(tmp_path / "theirs")
    envelope = sign(payload(), other)
    with pytest.raises(RefusedAttestationError, match="signed by another key") as caught:
        opened(json.dumps(envelope).encode(), public)
    assert caught.value.reason is Refusal.KEY
    envelope["signatures"][0]["keyid"] = sign(payload(), private)["signatures"][0]["keyid"]
    with pytest.raises(RefusedAttestationError) as caught:
        opened(json.dumps(envelope).encode(), public)
    assert caught.value.reason is Refusal.SIGNATURE


def test_what_is_signed_and_no_statement_about_an_audit_is_refused() -> None:
    of_another_kind = json.loads(payload()) | {"predicateType": "https://slsa.dev/provenance/v1"}
    without_subject = json.loads(payload()) | {"subject": []}
    for said in (b"[]", b"text", json.dumps(of_another_kind).encode(), json.dumps(without_subject).encode()):
        with pytest.raises(RefusedAttestationError) as caught:
            read_statement(said)
        assert caught.value.reason is Refusal.KIND
    for field in ({"outcome": "fine"}, {"auditedAt": "yesterday"}, {"auditedAt": "2026-01-01T00:00:00"}):
        with pytest.raises(RefusedAttestationError):
            read_statement(payload(**field))


def test_other_files_and_other_versions_are_foreign() -> None:
    statement = read_statement(payload())
    statement.refuse_foreign("d" * 64, "models:/net/3")
    for digest, name in (("e" * 64, None), ("e" * 64, "models:/net/3"), ("d" * 64, "models:/net/4")):
        with pytest.raises(RefusedAttestationError) as caught:
            statement.refuse_foreign(digest, name)
        assert caught.value.reason is Refusal.FOREIGN


def test_a_statement_ends(tmp_path: Path) -> None:
    now = datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC)
    statement = read_statement(payload(expires="2026-01-02T00:00:00Z", auditedAt="2026-01-01T00:00:00Z"))
    statement.refuse_expired(25 * HOUR, now - HOUR)
    for max_age, at in ((None, now), (23 * HOUR, now - HOUR / 2)):
        with pytest.raises(RefusedAttestationError) as caught:
            statement.refuse_expired(max_age, at)
        assert caught.value.reason is Refusal.EXPIRED


def test_keys_and_envelopes_that_are_none_are_named(tmp_path: Path) -> None:
    private, public = make_keys(tmp_path)
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "pkey", "-in", private, "-aes256", "-passout", "pass:x", "-out", encrypted]
    subprocess.run(command, check=True, capture_output=True)
    for key, told in ((encrypted, "is encrypted"), (public, "holds no private key"), (tmp_path / "none", "cannot be")):
        with pytest.raises(InputError, match=told):
            sign(b"", key)
    good = json.dumps(sign(payload(), private)).encode()
    with pytest.raises(InputError, match="is a private key: `openssl pkey -in"):
        opened(good, private)
    for content in (b"", b"{}", b"[]", b'{"payload": 1}', good[:-9]):
        with pytest.raises(InputError, match="holds no signed envelope"):
            opened(content, public)


def test_the_statement_is_in_totos() -> None:
    said = json.loads(payload())
    assert set(said) == {"_type", "subject", "predicateType", "predicate"}
    assert (said["_type"], said["predicateType"]) == (STATEMENT_TYPE, PREDICATE_TYPE)
    assert STATEMENT_TYPE == "https://in-toto.io/Statement/v1"
    assert said["subject"] == [{"name": "models:/net/3", "digest": {"sha256": "d" * 64}}]
