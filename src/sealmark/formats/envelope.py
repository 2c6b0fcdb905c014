"""Signed documents: DSSE v1 envelopes with one payload type a kind of document.

This is a profile of DSSE (Dead Simple Signing Envelope, version 1.0): every DSSE verifier reads what
is written here, while this reader takes less than DSSE allows. There is one signature, and envelope
and payload are canonical JSON, so that a document has exactly one spelling and one hash. The payload
``{"alg", "body", "kid"}`` names algorithm and key inside the signed bytes. The caller says whom to
trust; a key that comes with a document is never used.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sealmark.core.canonical import canonical_json
from sealmark.core.errors import FormatError, ParameterError, TamperedError, UntrustedError
from sealmark.crypto.signing import ALGORITHM, SIGNATURE_BYTES, SigningKey, VerifyKey
from sealmark.formats.strict_json import from_plain, parse_canonical, to_plain

KINDS = ("commitment", "evidence", "license", "revocation")
MAX_BYTES = 16 << 20


class Document(NamedTuple):
    """A document whose signature was checked.

    Attributes:
        kind: one of `KINDS`.
        body: what was signed.
        signer: which of the caller's keys signed it.
    """

    kind: str
    body: dict[str, Any]
    signer: VerifyKey


def payload_type(kind: str) -> str:
    """The media type of a kind of document.

    Raises:
        ParameterError: no such kind.

    Example:
        >>> payload_type("license")
        'application/vnd.sealmark.license.v1+json'
    """
    if kind not in KINDS:
        raise ParameterError("unknown kind of document", expected=f"one of {KINDS}", found=kind)
    return f"application/vnd.sealmark.{kind}.v1+json"


def pre_authentication_encoding(media_type: str, body: bytes) -> bytes:
    """PAE of DSSE v1: the bytes that are signed, which no other pair of type and body gives.

    Example:
        >>> pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    name = media_type.encode()
    return b" ".join([b"DSSEv1", b"%d" % len(name), name, b"%d" % len(body), body])


def sign_document(kind: str, body: Mapping[str, Any], key: SigningKey) -> bytes:
    """Sign a document.

    Args:
        kind: one of `KINDS`.
        body: plain JSON; floats may be infinite or NaN.
        key: the signer's.

    Returns:
        The envelope, to be written to a file as it is.

    Raises:
        ParameterError: unknown kind, a body that is not plain JSON, or a document too large to read back.
    """
    media_type = payload_type(kind)
    try:
        payload = canonical_json({"alg": ALGORITHM, "kid": key.kid, "body": to_plain(body)})
    except (TypeError, ValueError) as error:
        raise ParameterError("the document is not plain JSON", found=error) from None
    signature = key.sign(pre_authentication_encoding(media_type, payload))
    envelope = canonical_json(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": media_type,
            "signatures": [{"keyid": key.kid, "sig": base64.b64encode(signature).decode()}],
        }
    )
    if len(envelope) > MAX_BYTES:
        raise ParameterError("the document is too large", expected=f"{MAX_BYTES} bytes", found=len(envelope))
    return envelope


def open_document(data: bytes, kind: str, anchors: Iterable[VerifyKey]) -> Document:
    """Check a signed document and return it with its signer.

    Args:
        data: the envelope.
        kind: the kind that the caller wants; another one is refused.
        anchors: the keys that the caller trusts for this kind.

    Raises:
        ParameterError: no anchors, or an unknown kind.
        FormatError: not such an envelope, another kind, or not the one canonical spelling.
        UntrustedError: signed by none of the anchors.
        TamperedError: the signature does not fit, or names another key than the one that made it.
    """
    trusted = {anchor.kid: anchor for anchor in anchors}
    if not trusted:
        raise ParameterError("no trust anchors", expected="the verify keys that you trust", found="none")
    media_type = payload_type(kind)
    payload, kid, signature = _fields(parse_canonical(data, limit=MAX_BYTES), media_type)
    if kid not in trusted:
        raise UntrustedError(
            "the document is signed by nobody you trust",
            expected=f"one of {sorted(trusted)}",
            found=kid,
            advice="ask its sender whose it is; add a key only if you got it another way",
        )
    trusted[kid].verify(signature, pre_authentication_encoding(media_type, payload))
    return Document(kind, _body(payload, kid), trusted[kid])


def verify_document(data: bytes, kind: str, anchors: Iterable[VerifyKey]) -> dict[str, Any]:
    """The body of a signed document; as `open_document`, which also tells the signer.

    Example:
        >>> key = SigningKey(bytes(32))
        >>> data = sign_document("evidence", {"log10_p": float("-inf")}, key)
        >>> verify_document(data, "evidence", [key.verify_key])
        {'log10_p': -inf}
    """
    return open_document(data, kind, anchors).body


def _fields(envelope: Any, media_type: str) -> tuple[bytes, str, bytes]:
    """Payload, key id and signature of an envelope that has exactly these."""
    try:
        (entry,) = envelope["signatures"]
        payload = base64.b64decode(envelope["payload"], validate=True)
        signature = base64.b64decode(entry["sig"], validate=True)
        kid, found = str(entry["keyid"]), envelope["payloadType"]
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error):
        raise FormatError("not a signed document", expected="a DSSE envelope with one signature") from None
    if found != media_type:
        raise FormatError("another kind of document", expected=media_type, found=repr(found)[:80])
    rebuilt = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": media_type,
        "signatures": [{"keyid": kid, "sig": base64.b64encode(signature).decode()}],
    }
    if envelope != rebuilt or len(signature) != SIGNATURE_BYTES:
        raise FormatError("not a signed document", expected="no other fields, canonical base64")
    return payload, kid, signature


def _body(payload: bytes, kid: str) -> dict[str, Any]:
    """The body of a payload whose signature holds."""
    statement = parse_canonical(payload, limit=MAX_BYTES, what="the payload")
    if not isinstance(statement, dict) or statement.keys() != {"alg", "body", "kid"}:
        raise FormatError("not a signed statement", expected="the fields alg, body and kid")
    if statement["alg"] != ALGORITHM:
        raise FormatError("unknown algorithm", expected=ALGORITHM, found=repr(statement["alg"])[:40])
    if statement["kid"] != kid:
        raise TamperedError("the signature was moved", expected=f"key {kid}", found=repr(statement["kid"])[:80])
    body = from_plain(statement["body"])
    if not isinstance(body, dict):
        raise FormatError("not a signed statement", expected="a body with named fields")
    return body
