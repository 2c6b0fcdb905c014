"""Licenses with wrapped keys, issued and kept in a vault in one transaction, beside the cryptography alone.

    python benchmarks/licenses.py [--count 10000] [--rounds 3]

Seconds of one core, the best of all rounds. The rounds take turns, so that all meet the same machine. The
reference is what nobody can do without: for each user one HPKE encryption and one Ed25519 signature.
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from sealmark.crypto.recipients import Identity, Recipient
from sealmark.crypto.signing import SigningKey
from sealmark.formats.license import License, Rights, sign_license
from sealmark.formats.license_keys import add_keys
from sealmark.vault import Vault, write_key_file

MODEL, RIGHTS = "ab" * 32, Rights(not_after=datetime(2032, 1, 1, tzinfo=UTC))
DATA_KEY = secrets.token_bytes(32)
KEY = SigningKey.generate()


def cryptography(people: list[Recipient]) -> None:
    for person in people:
        person.encrypt(DATA_KEY, b"")
        KEY.sign(bytes(1000))


def documents(people: list[Recipient]) -> None:
    for turn, person in enumerate(people):
        bare = License(str(turn), f"user-{turn}", MODEL, rights=RIGHTS)
        sign_license(add_keys(bare, person, data_key=DATA_KEY), KEY)


def issuing(people: list[Recipient]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_key_file(folder / "key")
        with Vault.create(folder / "vault", key_file=folder / "key") as vault, vault.transaction():
            for turn, person in enumerate(people):
                vault.issue_license(f"user-{turn}", model=MODEL, to=person, data_key=DATA_KEY, rights=RIGHTS)


WORK: dict[str, Callable[[list[Recipient]], None]] = {
    "HPKE and Ed25519 alone": cryptography,
    "signed documents": documents,
    "kept in a vault": issuing,
}


def seconds(work: Callable[[list[Recipient]], None], people: list[Recipient]) -> tuple[float, float]:
    """Of the processor, and by the clock."""
    start, used = time.perf_counter(), time.process_time()
    work(people)
    return time.process_time() - used, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    people = [Identity.generate().recipient for _ in range(options.count)]
    results = [{name: seconds(work, people) for name, work in WORK.items()} for _ in range(options.rounds)]
    best = {name: tuple(min(result[name][kind] for result in results) for kind in range(2)) for name in WORK}
    reference = best["HPKE and Ed25519 alone"][0]
    print("| what | licenses | processor, s | clock, s | / cryptography |\n|---|---|---|---|---|")
    for name, (used, passed) in best.items():
        print(f"| {name} | {options.count} | {used:.2f} | {passed:.2f} | {used / reference:.2f} |")


if __name__ == "__main__":
    main()
