"""Opening with a license: what it takes, what comes out, and the reason of every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sealmark
from sealmark.authorization.chaotic_weights import ChaoticWeights
from sealmark.authorization.sealed import SealedWeights
from sealmark.core.errors import (
    ModelMismatchError,
    ParameterError,
    RevokedError,
    SealmarkError,
    ServiceError,
    StaleListError,
    UnsupportedError,
    UntrustedError,
    WrongKeyError,
)
from sealmark.core.secret import Secret
from sealmark.core.weights import INDEX, FileWeights, save_model
from sealmark.crypto.recipients import Cost, Identity, Passphrase
from sealmark.crypto.signing import SigningKey
from sealmark.formats.license import Rights
from sealmark.formats.revocation import Revocation, RevocationList, sign_revocations
from sealmark.formats.sealed import seal_bytes, seal_file
from sealmark.runtime.device import COMPONENTS, device_id
from sealmark.runtime.last_seen import LastSeen
from sealmark.runtime.licensed import Opened
from sealmark.vault import Vault, write_key_file

ISSUED, END = datetime(2031, 1, 1, tzinfo=UTC), datetime(2031, 12, 31, tzinfo=UTC)
NOW, DAY, SECOND = datetime(2031, 6, 1, tzinfo=UTC), timedelta(days=1), timedelta(seconds=1)
SKEW = timedelta(seconds=300)
ADA, BEN = Identity(bytes(range(32))), Identity(bytes(range(1, 33)))
HERE = {name: f"{name} of here" for name in COMPONENTS}
THERE = {name: f"{name} of there" for name in COMPONENTS}


def network(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


PLAIN = network()
INPUTS = torch.eye(6)


def same(first: nn.Module, second: nn.Module) -> bool:
    return torch.allclose(first(INPUTS), second(INPUTS), atol=1e-6)


@pytest.fixture(scope="module")
def vault(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vault]:
    folder = tmp_path_factory.mktemp("owner")
    write_key_file(folder / "key")
    with Vault.create(folder / "vault", key_file=folder / "key") as vault:
        yield vault


class Copies:
    """A model as files: plain, sealed, and its keys."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.plain, self.sealed = folder, folder / "plain.safetensors", folder / "model.sealed"
        save_model(PLAIN, self.plain)
        self.key = SealedWeights().lock_file(self.plain, self.sealed)
        self.data_key, self.model = self.key.key("data"), str(self.key.facts["model"])


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Copies:
    return Copies(tmp_path_factory.mktemp("copies"))


Grant = Callable[..., bytes]
Open = Callable[..., Opened]


@pytest.fixture
def grant(vault: Vault, copies: Copies) -> Grant:
    """A license for Ada for the sealed copy, but for what is said otherwise."""

    def make(**changes: Any) -> bytes:
        usual = {"model": copies.model, "to": ADA.recipient, "data_key": copies.data_key, "issued": ISSUED}
        return vault.issue_license("ada", **usual | {"rights": Rights(not_after=END)} | changes).data

    return make


@pytest.fixture
def opened(vault: Vault, copies: Copies, grant: Grant, tmp_path: Path) -> Open:
    """Ada's opening of the sealed copy with a license, but for what is said otherwise."""

    def run(license: bytes | None = None, source: Path = copies.sealed, **changes: Any) -> Opened:  # noqa: A002
        usual = {"anchors": [vault.verify_key], "opener": ADA, "now": NOW, "memory": tmp_path / "state"}
        return sealmark.open(source, grant() if license is None else license, **usual | changes)

    return run


def code(run: Callable[[], object]) -> str:
    try:
        run()
    except SealmarkError as error:
        return error.code
    return "OK"


def test_the_licensee_gets_the_model(opened: Open) -> None:
    found = opened()
    model = network(seed=2)
    assert not same(model, PLAIN)
    assert found.load_into(model) is model
    assert same(model, PLAIN)
    assert (found.license.user, found.key) == ("ada", None)
    assert torch.equal(found.weights["0.weight"], PLAIN[0].weight)


def test_nothing_but_the_time_is_written(opened: Open, copies: Copies, tmp_path: Path) -> None:
    before = sorted(copies.folder.rglob("*"))
    opened()
    assert sorted(copies.folder.rglob("*")) == before
    assert {path.name for path in tmp_path.rglob("*")} == {"state", "lock", "seen.json"}
    assert json.loads((tmp_path / "state/seen.json").read_text())["latest"] == "2031-06-01T00:00:00Z"


def test_the_keys_and_weights_are_not_printed(opened: Open, copies: Copies) -> None:
    assert "weights" not in repr(opened())
    assert copies.data_key.hex() not in repr(opened())


def test_license_list_and_identity_may_be_files(opened: Open, vault: Vault, grant: Grant, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("ada.lic", "list", "identity")}
    files["ada.lic"].write_bytes(grant())
    files["list"].write_bytes(sign_revocations(RevocationList(1, (), ISSUED), vault.signing_key))
    files["identity"].write_text(ADA.reveal() + "\n")
    for kind in (Path, str):
        found = opened(kind(files["ada.lic"]), revocations=kind(files["list"]), opener=kind(files["identity"]))
        assert found.license.user == "ada"


def test_the_memory_may_be_a_folder_or_an_object(opened: Open, tmp_path: Path) -> None:
    for memory in (tmp_path / "mine", str(tmp_path / "mine"), LastSeen(tmp_path / "mine")):
        assert opened(memory=memory).license.user == "ada"
        assert LastSeen(tmp_path / "mine").latest() == NOW


def test_a_passphrase_opens_what_was_issued_for_it(opened: Open, grant: Grant) -> None:
    data = grant(to=Passphrase("open sesame", cost=Cost(1, 8, 1)))
    assert opened(data, opener=Passphrase("open sesame")).license.user == "ada"
    assert code(lambda: opened(data, opener=Passphrase("open says me"))) == "WRONG_KEY"


def test_with_license_and_copy_but_without_the_identity_nothing_opens(opened: Open) -> None:
    for opener in (None, BEN, Passphrase("guess")):
        with pytest.raises(WrongKeyError):
            opened(opener=opener)


def test_a_license_by_a_stranger_is_refused(opened: Open) -> None:
    with pytest.raises(UntrustedError):
        opened(anchors=[SigningKey.generate().verify_key])


def test_a_changed_license_is_refused(opened: Open, grant: Grant) -> None:
    data = bytearray(grant())
    data[data.index(b'"payload":"') + 40] ^= 1
    assert code(lambda: opened(bytes(data))) in {"TAMPERED", "BAD_FORMAT"}
    assert code(lambda: opened(bytes(data[:-1]))) == "BAD_FORMAT"


def test_a_license_for_another_model_is_refused_before_anything_is_decrypted(
    opened: Open, grant: Grant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("the keys were opened")

    monkeypatch.setattr("sealmark.runtime.licensed.open_keys", unwanted)
    with pytest.raises(ModelMismatchError):
        opened(grant(model="00" * 32))


def test_a_license_with_another_files_key_is_refused(opened: Open, grant: Grant) -> None:
    assert code(lambda: opened(grant(data_key=bytes(32)))) == "WRONG_KEY"


def test_a_license_without_keys_opens_nothing_sealed(opened: Open, grant: Grant) -> None:
    with pytest.raises(WrongKeyError, match="holds no key"):
        opened(grant(to=None, data_key=None))


def test_a_sealed_file_whose_header_names_the_licensed_model_is_not_believed(
    opened: Open, copies: Copies, tmp_path: Path
) -> None:
    start = copies.sealed.read_bytes()
    forged = tmp_path / "forged.sealed"
    forged.write_bytes(seal_bytes(copies.plain.read_bytes(), bytes(32), model=copies.model))
    assert code(lambda: opened(source=forged)) == "WRONG_KEY"
    forged.write_bytes(start[:-1] + bytes([start[-1] ^ 1]))
    assert code(lambda: opened(source=forged)) == "TAMPERED"


def test_on_another_device_nothing_opens(opened: Open, grant: Grant) -> None:
    data = grant(devices=[device_id(HERE)])
    assert opened(data, device=HERE).license.devices
    assert code(lambda: opened(data, device=THERE)) == "DEVICE_MISMATCH"
    assert code(lambda: opened(data)) == "DEVICE_MISMATCH"  # the device that runs this test


def test_each_listed_device_opens_it(opened: Open, grant: Grant) -> None:
    data = grant(devices=[device_id(HERE), device_id(THERE)])
    for device in (HERE, THERE):
        assert opened(data, device=device).license.user == "ada"


@pytest.mark.parametrize(
    ("now", "outcome"),
    [
        (ISSUED, "OK"),
        (END + SKEW, "OK"),
        (END + SKEW + SECOND, "EXPIRED"),
        (ISSUED - SKEW, "OK"),
        (ISSUED - SKEW - SECOND, "CLOCK_ROLLBACK"),
    ],
)
def test_the_clock_may_be_wrong_by_300_seconds_and_no_more(opened: Open, now: datetime, outcome: str) -> None:
    assert code(lambda: opened(now=now)) == outcome


@pytest.mark.parametrize(
    ("now", "outcome"), [(NOW, "OK"), (NOW - SKEW, "OK"), (NOW - SKEW - SECOND, "NOT_YET_VALID")]
)
def test_a_license_begins_when_it_says(opened: Open, grant: Grant, now: datetime, outcome: str) -> None:
    data = grant(rights=Rights(not_before=NOW, not_after=END))
    assert code(lambda: opened(data, now=now)) == outcome


def test_a_clock_that_was_set_back_is_found_out(opened: Open) -> None:
    opened(now=NOW)
    assert code(lambda: opened(now=NOW - SKEW)) == "OK"
    assert code(lambda: opened(now=NOW - SKEW - SECOND)) == "CLOCK_ROLLBACK"


def test_who_saw_the_license_end_cannot_go_back_before_its_end(opened: Open) -> None:
    assert code(lambda: opened(now=END + DAY)) == "EXPIRED"
    assert code(lambda: opened(now=NOW)) == "CLOCK_ROLLBACK"


def test_who_deletes_the_memory_goes_back_to_the_newest_document_and_no_further(
    opened: Open, vault: Vault, tmp_path: Path
) -> None:
    newest = sign_revocations(RevocationList(1, (), NOW), vault.signing_key)
    opened(now=NOW + DAY, revocations=newest)
    (tmp_path / "state/seen.json").unlink()
    assert code(lambda: opened(now=NOW)) == "OK"
    (tmp_path / "state/seen.json").unlink()
    assert code(lambda: opened(now=NOW - DAY)) == "CLOCK_ROLLBACK"  # the remembered list states its time


def test_this_machines_clock_judges_where_there_is_no_better_one(
    opened: Open, grant: Grant, tmp_path: Path
) -> None:
    long_ago = datetime(2001, 1, 1, tzinfo=UTC)
    data = grant(issued=long_ago, rights=Rights(not_after=long_ago + DAY))
    assert code(lambda: opened(data, now=long_ago)) == "OK"
    assert code(lambda: opened(data, now=None)) == "EXPIRED"


def listed(vault: Vault, number: int, *entries: Revocation) -> bytes:
    return sign_revocations(RevocationList(number, entries, ISSUED), vault.signing_key)


def test_a_revoked_license_is_refused(opened: Open, vault: Vault, grant: Grant) -> None:
    data = grant(number="revoked one")
    assert code(lambda: opened(data, revocations=listed(vault, 1))) == "OK"
    with pytest.raises(RevokedError, match="not paid"):
        opened(data, revocations=listed(vault, 2, Revocation("revoked one", NOW, "not paid")))


def test_a_list_is_remembered_also_where_it_is_held_back(opened: Open, vault: Vault, grant: Grant) -> None:
    data = grant(number="held back")
    assert code(lambda: opened(data, revocations=listed(vault, 2, Revocation("held back", NOW)))) == "REVOKED"
    assert code(lambda: opened(data)) == "REVOKED"
    with pytest.raises(StaleListError):
        opened(data, revocations=listed(vault, 1))
    assert code(lambda: opened(data, revocations=listed(vault, 3))) == "OK"
    assert code(lambda: opened(data)) == "OK"


def test_a_list_is_remembered_also_where_the_license_that_it_came_with_is_refused(
    opened: Open, vault: Vault, grant: Grant
) -> None:
    ended, other = grant(rights=Rights(not_after=NOW - 2 * DAY)), grant(number="other")
    assert code(lambda: opened(other)) == "OK"
    taken = listed(vault, 7, Revocation("other", NOW, "not paid"))
    assert code(lambda: opened(ended, revocations=taken)) == "EXPIRED"
    assert code(lambda: opened(other)) == "REVOKED"


def test_a_list_of_somebody_else_takes_nothing_back(opened: Open, vault: Vault, grant: Grant) -> None:
    other = SigningKey.generate()
    foreign = sign_revocations(RevocationList(9, (Revocation("7", NOW),), ISSUED), other)
    anchors = [other.verify_key, vault.verify_key]
    assert code(lambda: opened(revocations=foreign, anchors=anchors)) == "UNTRUSTED"
    assert code(lambda: opened(anchors=anchors)) == "OK"


def test_the_longer_license_ends_with_the_list_that_follows_a_shorter_renewal(
    opened: Open, vault: Vault, grant: Grant, tmp_path: Path
) -> None:
    old = grant(number="shortened")
    new = vault.renew_license("shortened", not_after=NOW + DAY, issued=ISSUED + DAY).data
    assert [code(lambda data=data: opened(data)) for data in (old, new)] == ["OK", "OK"]  # nobody told this machine
    newest = vault.revocation_list(time=NOW)
    assert [code(lambda data=data: opened(data, revocations=newest)) for data in (old, new)] == ["REVOKED", "OK"]
    assert code(lambda: opened(old)) == "REVOKED"


def test_the_first_reason_is_the_one_that_is_told(opened: Open, vault: Vault, grant: Grant, tmp_path: Path) -> None:
    """A license with every fault at once; each that is mended shows the next, in the documented order."""
    terms = {"model": "00" * 32, "data_key": bytes(32), "devices": [device_id(HERE)]}
    changes = {
        "anchors": [SigningKey.generate().verify_key],
        "device": THERE,
        "now": ISSUED - DAY,
        "opener": BEN,
        "revocations": listed(vault, 1, Revocation("faulty", NOW)),
    }
    reasons = []

    def tell(number: str = "faulty") -> None:
        data = grant(number=f"{number} {len(reasons)}", **terms)
        if number == "faulty":
            entry = Revocation(f"faulty {len(reasons)}", NOW)
            changes["revocations"] = listed(vault, 1, entry) if "anchors" not in changes else None
        memory = tmp_path / str(len(reasons))
        reasons.append(code(lambda: opened(data, **changes | {"memory": memory})))

    tell()
    del changes["anchors"]
    tell()
    del terms["model"]
    tell()
    changes["device"] = HERE
    tell()
    changes["now"] = END + DAY
    tell()
    changes["now"] = NOW
    tell()
    tell("mended")
    changes["opener"] = ADA
    tell("mended")
    del terms["data_key"]
    tell("mended")
    assert reasons == [
        "UNTRUSTED", "MODEL_MISMATCH", "DEVICE_MISMATCH", "CLOCK_ROLLBACK", "EXPIRED", "REVOKED", "WRONG_KEY",
        "WRONG_KEY", "OK",
    ]  # fmt: skip


def test_a_plain_copy_is_checked_and_loaded(opened: Open, copies: Copies, grant: Grant) -> None:
    for terms in ({"to": None, "data_key": None}, {"data_key": None}):
        found = opened(grant(model=FileWeights(copies.plain).digest(), **terms), source=copies.plain)
        assert same(found.load_into(network(seed=2)), PLAIN)


def test_a_plain_copy_of_somebody_else_is_refused(
    opened: Open, copies: Copies, grant: Grant, tmp_path: Path
) -> None:
    data = grant(model=FileWeights(copies.plain).digest(), to=None, data_key=None)
    save_model(network(seed=2), tmp_path / "other.safetensors")
    with pytest.raises(ModelMismatchError):
        opened(data, source=tmp_path / "other.safetensors")


def test_a_license_that_binds_a_plain_copy_to_its_user_asks_for_him(
    opened: Open, copies: Copies, grant: Grant
) -> None:
    data = grant(model=FileWeights(copies.plain).digest(), data_key=None)
    assert code(lambda: opened(data, source=copies.plain)) == "OK"
    assert code(lambda: opened(data, source=copies.plain, opener=BEN)) == "WRONG_KEY"


def test_a_locked_copy_is_unlocked_by_the_key_in_the_license(opened: Open, grant: Grant, tmp_path: Path) -> None:
    locked = ChaoticWeights().lock(PLAIN)
    save_model(locked.model, tmp_path / "locked.safetensors")
    terms = {"model": FileWeights(tmp_path / "locked.safetensors").digest(), "data_key": None}
    found = opened(grant(key=locked.key, **terms), source=tmp_path / "locked.safetensors")
    assert same(found.load_into(network(seed=2)), PLAIN)
    without = opened(grant(**terms), source=tmp_path / "locked.safetensors")
    assert not same(without.load_into(network(seed=2)), PLAIN)


def test_a_locked_and_sealed_copy_needs_both_keys(opened: Open, grant: Grant, tmp_path: Path) -> None:
    locked = ChaoticWeights().lock(PLAIN)
    save_model(locked.model, tmp_path / "locked.safetensors")
    key = SealedWeights().lock_file(tmp_path / "locked.safetensors", tmp_path / "locked.sealed")
    data = grant(key=locked.key, data_key=key.key("data"), model=key.facts["model"])
    assert same(opened(data, source=tmp_path / "locked.sealed").load_into(network(seed=2)), PLAIN)


def test_a_key_that_is_of_no_lock_is_told(opened: Open, grant: Grant) -> None:
    mark = Secret(bytes(32), {"scheme": "spread_spectrum", "parameters": {}})
    with pytest.raises(UnsupportedError, match="opens no lock"):
        opened(grant(key=mark)).load_into(network())


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    index = {}
    for turn, layer in enumerate((PLAIN[0], PLAIN[2])):
        part = nn.ModuleDict({str(2 * turn): layer})
        save_model(part, folder / f"part-{turn}.safetensors")
        index |= dict.fromkeys(FileWeights(folder / f"part-{turn}.safetensors"), f"part-{turn}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


def test_a_folder_of_shards_opens_sealed_and_plain(
    opened: Open, grant: Grant, shards: Path, tmp_path: Path
) -> None:
    key = SealedWeights().lock_file(shards, tmp_path / "sealed")
    data = grant(model=key.facts["model"], data_key=key.key("data"))
    for source in (shards, tmp_path / "sealed"):
        assert same(opened(data, source=source).load_into(network(seed=2)), PLAIN)


def test_no_sealed_shard_can_be_moved_dropped_or_taken_from_elsewhere(
    opened: Open, grant: Grant, shards: Path, copies: Copies, tmp_path: Path
) -> None:
    folder = tmp_path / "sealed"
    key = SealedWeights().lock_file(shards, folder)
    data = grant(model=key.facts["model"], data_key=key.key("data"))
    first, second = (folder / f"part-{turn}.safetensors.sealed" for turn in range(2))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert code(lambda: opened(data, source=folder)) == "MODEL_MISMATCH"
    first.unlink()
    assert code(lambda: opened(data, source=folder)) == "MODEL_MISMATCH"
    foreign = seal_bytes(copies.plain.read_bytes(), copies.data_key, model="other", role="weights-1-of-2")
    first.write_bytes(foreign)
    assert code(lambda: opened(data, source=folder)) == "MODEL_MISMATCH"
    first.write_bytes(kept)
    assert code(lambda: opened(data, source=folder)) == "OK"


def test_shards_that_hold_the_same_tensor_are_refused(
    opened: Open, grant: Grant, copies: Copies, tmp_path: Path
) -> None:
    (tmp_path / "sealed").mkdir()
    for turn in (1, 2):
        part = tmp_path / "sealed" / f"{turn}.sealed"
        seal_file(copies.plain, part, copies.data_key, model=copies.model, role=f"weights-{turn}-of-2")
    assert code(lambda: opened(source=tmp_path / "sealed")) == "BAD_FORMAT"


def test_an_unknown_tensor_is_the_callers_mistake(opened: Open) -> None:
    assert code(lambda: opened().weights["nonsense"]) == "UNKNOWN_NAME"


def test_what_is_sealed_and_is_no_weights_is_told(opened: Open, copies: Copies, tmp_path: Path) -> None:
    (tmp_path / "onnx.sealed").write_bytes(seal_bytes(b"bytes", copies.data_key, model=copies.model))
    with pytest.raises(UnsupportedError, match="not sealed weights"):
        opened(source=tmp_path / "onnx.sealed")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"source": Path("nowhere")}, "copy"),
        ({"license": Path("nowhere")}, "license"),
        ({"revocations": "nowhere"}, "revocation list"),
        ({"opener": "nowhere"}, "identity"),
        ({"anchors": []}, "anchors"),
        ({"now": datetime(2031, 6, 1)}, "zone"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_missing_is_the_callers_mistake(opened: Open, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ParameterError, match=match):
        opened(**changes)


def test_a_file_that_is_no_model_license_or_identity_is_refused(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"junk")
    (tmp_path / "large").write_bytes(bytes(20_000))
    assert code(lambda: opened(source=tmp_path / "junk")) == "BAD_FORMAT"
    assert code(lambda: opened(tmp_path / "junk")) == "BAD_FORMAT"
    assert code(lambda: opened(opener=tmp_path / "junk")) == "BAD_FORMAT"
    assert code(lambda: opened(opener=tmp_path / "large")) == "BAD_FORMAT"
    assert code(lambda: opened(revocations=tmp_path / "junk")) == "BAD_FORMAT"


@pytest.mark.parametrize("method", ["read_bytes", "open"])
def test_a_copy_that_cannot_be_read_is_a_failure_of_the_machine(
    method: str, opened: Open, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = getattr(Path, method)

    def broken(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == copies.plain:
            raise OSError(5, "the disk is gone")
        return working(path, *arguments, **options)

    monkeypatch.setattr(Path, method, broken)
    with pytest.raises(ServiceError, match=r"plain\.safetensors.*the disk is gone"):
        opened(source=copies.plain)
