"""Makes the vectors of this folder, with none of sealmark's code: ``python tests/vectors/make_vectors.py``.

Every vector tests ONE failure, in a named outcome class: the `code` of the error, or OK. Keys are the
ones of RFC 8032, section 7.1, so that the signatures are the same each time.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

OWNER = Ed25519PrivateKey.from_private_bytes(
    bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
)
OTHER = Ed25519PrivateKey.from_private_bytes(
    bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
)
Key = Ed25519PrivateKey
Vector = dict[str, Any]


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def raw(key: Key) -> bytes:
    return key.public_key().public_bytes_raw()


def kid(key: Key) -> str:
    return hashlib.sha256(raw(key)).hexdigest()[:32]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def media(kind: str) -> str:
    return f"application/vnd.sealmark.{kind}.v1+json"


def payload(body: Any, key: Key = OWNER, **changes: Any) -> bytes:
    return canonical({"alg": "Ed25519", "kid": kid(key), "body": body} | changes)


def envelope(content: bytes, kind: str = "evidence", key: Key = OWNER, signed_as: str = "") -> Vector:
    name = (signed_as or media(kind)).encode()
    pae = b"DSSEv1 %d %s %d %s" % (len(name), name, len(content), content)
    return {
        "payload": b64(content),
        "payloadType": media(kind),
        "signatures": [{"keyid": kid(key), "sig": b64(key.sign(pae))}],
    }


def valued(text: bytes) -> bytes:
    """A payload with one value in the spelling ``text``."""
    return payload({"a": 7}).replace(b'"a":7', b'"a":' + text)


def envelopes() -> list[Vector]:
    body = {"scheme": "example", "log10_p": {"$float": "-inf"}, "names": ["\u00e9", "\u6f22"]}
    good = envelope(payload(body))
    (entry,) = good["signatures"]
    text = canonical(good)
    loose = canonical({"alg": "Ed25519", "kid": kid(OWNER), "body": {}}).replace(b",", b", ")
    doubled = payload({"a": 1}).replace(b'{"a":1}', b'{"a":1,"a":1}')
    deep: Any = {}
    for _ in range(40):
        deep = {"a": deep}
    changed = payload(body | {"scheme": "exbmple"})
    moved = envelope(payload({}))["signatures"][0]["sig"]
    other_sig = envelope(payload(body), key=OTHER)["signatures"][0]["sig"]
    cases: list[tuple[str, str, bytes]] = [
        ("good", "OK", text),
        ("empty body", "OK", canonical(envelope(payload({})))),
        ("empty file", "BAD_FORMAT", b""),
        ("truncated by one byte", "BAD_FORMAT", text[:-1]),
        ("a line feed at the end", "BAD_FORMAT", text + b"\n"),
        ("not UTF-8", "BAD_FORMAT", text.replace(b"payload", b"p\xffyload", 1)),
        ("a list in place of an object", "BAD_FORMAT", b"[]"),
        ("nested a thousand times", "BAD_FORMAT", b"[" * 20_000),
        ("spaces between the fields", "BAD_FORMAT", json.dumps(good, sort_keys=True).encode()),
        ("fields in another order", "BAD_FORMAT", text.replace(*_swap(text))),
        ("a name that stands twice", "BAD_FORMAT", b'{"payload":"",' + text[1:]),
        ("a further field", "BAD_FORMAT", canonical(good | {"also": 1})),
        ("no payload", "BAD_FORMAT", canonical({k: v for k, v in good.items() if k != "payload"})),
        ("no signature", "BAD_FORMAT", canonical(good | {"signatures": []})),
        ("two signatures", "BAD_FORMAT", canonical(good | {"signatures": [entry, entry]})),
        ("a signature without its key id", "BAD_FORMAT", _signed(good, keyid=None)),
        ("a short signature", "BAD_FORMAT", _signed(good, sig=b64(bytes(63)))),
        ("base64 with unused bits set", "BAD_FORMAT", _signed(good, sig=entry["sig"][:-3] + _next(entry["sig"]))),
        ("base64 with a line feed", "BAD_FORMAT", _signed(good, sig=entry["sig"] + "\n")),
        ("base64 in the URL-safe alphabet", "BAD_FORMAT", _signed(good, sig=_url_safe(entry["sig"]))),
        ("another kind", "BAD_FORMAT", canonical(envelope(payload(body), "license"))),
        ("another version of the kind", "BAD_FORMAT", text.replace(b".v1+json", b".v2+json")),
        ("a payload type of another kind over its signature", "TAMPERED",
         canonical(envelope(payload(body), signed_as=media("license")))),
        ("one bit of the payload", "TAMPERED", canonical(good | {"payload": b64(changed)})),
        ("the signature of another document", "TAMPERED", _signed(good, sig=moved)),
        ("the signature of another key", "TAMPERED", _signed(good, sig=other_sig)),
        ("a signature of zeros", "TAMPERED", _signed(good, sig=b64(bytes(64)))),
        ("signed by a stranger", "UNTRUSTED", canonical(envelope(payload(body, OTHER), key=OTHER))),
        ("the key id of a stranger", "UNTRUSTED", _signed(good, keyid=kid(OTHER))),
        ("a payload that names another key", "TAMPERED", canonical(envelope(payload(body, OTHER)))),
        ("another algorithm", "BAD_FORMAT", canonical(envelope(payload(body, alg="none")))),
        ("a payload with spaces", "BAD_FORMAT", canonical(envelope(loose))),
        ("a payload with a name that stands twice", "BAD_FORMAT", canonical(envelope(doubled))),
        ("a payload with NaN", "BAD_FORMAT", canonical(envelope(valued(b"NaN")))),
        ("a payload with an endless number", "BAD_FORMAT", canonical(envelope(valued(b"1e999")))),
        ("a payload with a lone surrogate", "BAD_FORMAT", canonical(envelope(valued(b'"\\ud800"')))),
        ("a payload with an unknown float", "BAD_FORMAT", canonical(envelope(payload({"a": {"$float": "7"}})))),
        ("a payload nested too deep", "BAD_FORMAT", canonical(envelope(payload(deep)))),
        ("a payload with a further field", "BAD_FORMAT", canonical(envelope(payload(body, also=1)))),
        ("a payload that is a list", "BAD_FORMAT", canonical(envelope(b"[]"))),
        ("a body that is a list", "BAD_FORMAT", canonical(envelope(payload([])))),
    ]  # fmt: skip
    return [{"name": name, "outcome": outcome, "data": b64(data)} for name, outcome, data in cases]


def _signed(good: Vector, **changes: Any) -> bytes:
    entry = good["signatures"][0] | changes
    return canonical(good | {"signatures": [{k: v for k, v in entry.items() if v is not None}]})


def _swap(text: bytes) -> tuple[bytes, bytes]:
    start, end = text.index(b'"payloadType"'), text.index(b',"signatures"')
    first, second = text[1 : start - 1], text[start:end]
    return first + b"," + second, second + b"," + first


def _next(sig: str) -> str:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return alphabet[alphabet.index(sig[-3]) + 1] + "=="


def _url_safe(sig: str) -> str:
    assert set(sig) & set("+/")
    return sig.replace("+", "-").replace("/", "_")


def licenses() -> list[Vector]:
    rights = {
        "features": ["chat"], "level": "standard", "not_after": "2031-12-31T00:00:00Z",
        "not_before": "2031-01-01T00:00:00Z", "seats": 2,
    }  # fmt: skip
    body = {
        "devices": [], "id": "7", "issued": "2031-01-01T00:00:00Z", "issuer": kid(OWNER), "keys": "", "mark": "",
        "model": "ab" * 32, "rights": rights, "scheme": "example", "user": "ada", "wrap": {},
    }  # fmt: skip
    keyed = body | {"keys": b64(b"keys"), "wrap": {"type": "example"}}
    missing = {name: value for name, value in body.items() if name != "user"}
    cases: list[tuple[str, str, Vector, Vector]] = [
        ("good", "OK", body, {}),
        ("for ever", "OK", body | {"rights": rights | {"not_after": None, "not_before": None}}, {}),
        ("in the last second of the skew", "OK", body, {"now": "2031-12-31T00:05:00Z"}),
        ("a second after it ended", "EXPIRED", body, {"now": "2031-12-31T00:05:01Z"}),
        ("in the first second of the skew", "OK", body, {"now": "2030-12-31T23:55:00Z"}),
        ("a second before it begins", "NOT_YET_VALID", body, {"now": "2030-12-31T23:54:59Z"}),
        ("for another model", "MODEL_MISMATCH", body | {"model": "cd" * 32}, {}),
        ("a missing user", "BAD_FORMAT", missing, {}),
        ("a user that is a number", "BAD_FORMAT", body | {"user": 7}, {}),
        ("negative seats", "BAD_FORMAT", body | {"rights": rights | {"seats": -1}}, {}),
        ("seats that are true", "BAD_FORMAT", body | {"rights": rights | {"seats": True}}, {}),
        ("features that are text", "BAD_FORMAT", body | {"rights": rights | {"features": "chat"}}, {}),
        ("a wrapped key that is text", "BAD_FORMAT", body | {"wrap": "key"}, {}),
        ("with keys", "OK", keyed, {}),
        ("keys without a wrapped key", "BAD_FORMAT", keyed | {"wrap": {}}, {}),
        ("a wrapped key without keys", "BAD_FORMAT", keyed | {"keys": ""}, {}),
        ("keys that are a list", "BAD_FORMAT", keyed | {"keys": []}, {}),
        ("keys in base64 with unused bits set", "BAD_FORMAT", keyed | {"keys": "a2V5c3=="}, {}),
        ("devices that are text", "BAD_FORMAT", body | {"devices": "device"}, {}),
        ("a device that is a number", "BAD_FORMAT", body | {"devices": [7]}, {}),
        ("an unknown right", "BAD_FORMAT", body | {"rights": rights | {"fly": 1}}, {}),
        ("rights that are a list", "BAD_FORMAT", body | {"rights": []}, {}),
        ("a time without a zone", "BAD_FORMAT", body | {"issued": "2031-01-01T00:00:00"}, {}),
        ("a day that is not", "BAD_FORMAT", body | {"issued": "2031-02-30T00:00:00Z"}, {}),
        ("another issuer than the signer", "BAD_FORMAT", body | {"issuer": kid(OTHER)}, {}),
    ]
    return [
        {
            "name": name,
            "outcome": outcome,
            "now": changes.get("now", "2031-06-01T00:00:00Z"),
            "data": b64(canonical(envelope(payload(content), "license"))),
        }
        for name, outcome, content, changes in cases
    ]


def revocations() -> list[Vector]:
    """Read by one who saw list 3, with the license 7 that was issued in the first second of 2031."""
    entry = {"before": None, "license": "8", "reason": "", "time": "2031-06-01T00:00:00Z"}
    body = {"entries": [entry], "issued": "2031-06-01T00:00:00Z", "number": 3}
    missing = {name: value for name, value in entry.items() if name != "before"}

    def listed(**changes: Any) -> Vector:
        return body | {"entries": [entry | changes]}

    cases: list[tuple[str, str, Vector]] = [
        ("good", "OK", body),
        ("empty", "OK", body | {"entries": []}),
        ("a newer one", "OK", body | {"number": 4}),
        ("the license", "REVOKED", listed(license="7")),
        ("the license, if issued before", "REVOKED", listed(license="7", before="2031-01-01T00:00:01Z")),
        ("the license, if issued before the second", "OK", listed(license="7", before="2031-01-01T00:00:00Z")),
        ("an older one", "STALE_LIST", body | {"number": 2}),
        ("number 0", "BAD_FORMAT", body | {"number": 0}),
        ("a number that is true", "BAD_FORMAT", body | {"number": True}),
        ("a further field", "BAD_FORMAT", body | {"also": 1}),
        ("entries that are text", "BAD_FORMAT", body | {"entries": "7"}),
        ("an entry that is text", "BAD_FORMAT", body | {"entries": ["7"]}),
        ("an entry with a field too few", "BAD_FORMAT", body | {"entries": [missing]}),
        ("a license that is a number", "BAD_FORMAT", listed(license=7)),
        ("a reason that is none", "BAD_FORMAT", listed(reason=None)),
        ("a day that is not", "BAD_FORMAT", listed(before="2031-02-30T00:00:00Z")),
    ]
    return [
        {"name": name, "outcome": outcome, "data": b64(canonical(envelope(payload(content), "revocation")))}
        for name, outcome, content in cases
    ]


def secret_file(
    facts: Vector,
    tensors: dict[str, bytes],
    /,
    *,
    seed: bytes = bytes(range(32)),
    header: Any = None,
    **changes: Any,
) -> bytes:
    """A safetensors file of uint8 vectors; ``changes`` to the metadata come before the checksum."""
    text = canonical(facts).decode()
    fields = {
        "commitment": hashlib.sha256(b"sealmark/commitment/v1\0" + seed + text.encode()).hexdigest(),
        "created": "2031-01-01T00:00:00Z",
        "facts": text,
        "format": "sealmark.secret.v1",
        "model": facts.get("model", ""),
        "parameters": canonical(facts.get("parameters", {})).decode(),
        "scheme": facts.get("scheme", ""),
        "seed": seed.hex(),
    } | changes
    checksum = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    entries: Vector = {"__metadata__": {"checksum": checksum} | fields}
    end = 0
    for name, data in sorted(tensors.items()):
        entries[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [end, end + len(data)]}
        end += len(data)
    return framed(canonical(header(entries) if header else entries), b"".join(tensors[n] for n in sorted(tensors)))


def framed(header: bytes, data: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


def tensor_digest(data: bytes) -> str:
    return hashlib.sha256(canonical(["uint8", [len(data)]]) + b"\0" + data).hexdigest()


def secrets() -> list[Vector]:
    tensors = {"images": b"abc", "labels": b"defgh"}
    digests = {name: tensor_digest(data) for name, data in tensors.items()}
    facts = {"model": "ab" * 32, "parameters": {"bits": 8}, "scheme": "example", "tensors": digests}
    bare = {"scheme": "example"}
    good, small = secret_file(facts, tensors), secret_file(bare, {})
    size = int.from_bytes(small[:8], "little")
    text = small[8 : 8 + size].rstrip()

    def offsets(*pair: int) -> Any:
        return lambda h: h | {"labels": h["labels"] | {"data_offsets": list(pair)}}

    def old(h: Vector) -> Vector:
        return h | {"__metadata__": {k: v for k, v in h["__metadata__"].items() if k != "created"}}

    cases: list[tuple[str, str, bytes]] = [
        ("good", "OK", good),
        ("without tensors", "OK", small),
        ("empty file", "BAD_FORMAT", b""),
        ("truncated by one byte", "BAD_FORMAT", good[:-1]),
        ("one byte too many", "BAD_FORMAT", good + b"\0"),
        ("one byte too many, without tensors", "BAD_FORMAT", small + b"\0"),
        ("a header longer than the file", "BAD_FORMAT", (1 << 20).to_bytes(8, "little") + small[8:]),
        ("a header longer than the cap", "BAD_FORMAT", (1 << 60).to_bytes(8, "little") + small[8:]),
        ("a header that is a list", "BAD_FORMAT", framed(b"[]", b"")),
        ("no metadata", "BAD_FORMAT", framed(b"{}", b"")),
        ("a name that stands twice", "BAD_FORMAT", framed(b'{"__metadata__":{},' + text[1:], b"")),
        ("another format", "BAD_FORMAT", secret_file(bare, {}, format="sealmark.secret.v2")),
        ("a further field", "BAD_FORMAT", secret_file(bare, {}, also="1")),
        ("a field too few", "BAD_FORMAT", secret_file(bare, {}, header=old)),
        ("a wrong checksum", "BAD_FORMAT", small.replace(b"2031-01-01", b"2031-01-02")),
        ("a seed too short", "BAD_FORMAT", secret_file(bare, {}, seed=bytes(31))),
        ("a commitment that is not hexadecimal", "BAD_FORMAT", secret_file(bare, {}, commitment="\u00e9" * 64)),
        ("facts with spaces", "BAD_FORMAT", secret_file(bare, {}, facts='{"scheme": "example"}')),
        ("facts that are a list", "BAD_FORMAT", secret_file(bare, {}, facts="[]")),
        ("facts with a tensor that has no digest", "BAD_FORMAT", secret_file({"tensors": {"a": []}}, {})),
        ("a hole between tensors", "BAD_FORMAT", secret_file(facts, tensors, header=offsets(4, 9))),
        ("tensors that overlap", "BAD_FORMAT", secret_file(facts, tensors, header=offsets(2, 7))),
        ("a tensor of an unknown type", "BAD_FORMAT", good.replace(b'"U8"', b'"U7"')),
        ("a seed that does not open the commitment", "FORGED_SECRET", secret_file(bare, {}, commitment="0" * 64)),
        ("another tensor", "FORGED_SECRET", good[:-1] + b"x"),
        ("a tensor that was not committed", "FORGED_SECRET", secret_file(bare, {"a": b"x"})),
        ("a tensor missing", "FORGED_SECRET", secret_file(facts, {"images": b"abc"})),
        ("a scheme that is not the one of the facts", "FORGED_SECRET", secret_file(bare, {}, scheme="other")),
        ("a model that is not the one of the facts", "FORGED_SECRET", secret_file(bare, {}, model="other")),
        ("parameters that are not those of the facts", "FORGED_SECRET", secret_file(bare, {}, parameters="9")),
    ]  # fmt: skip
    return [{"name": name, "outcome": outcome, "data": b64(data)} for name, outcome, data in cases]


def build() -> dict[str, str]:
    """The text of each file of vectors."""
    keys = {"owner": raw(OWNER).hex(), "stranger": raw(OTHER).hex()}
    files = {"envelope": envelopes(), "license": licenses(), "revocation": revocations(), "secret": secrets()}
    return {
        f"{name}.json": json.dumps({"keys": keys, "vectors": vectors}, indent=1) + "\n"
        for name, vectors in files.items()
    }


if __name__ == "__main__":
    for name, text in build().items():
        Path(__file__).with_name(name).write_text(text)
