"""Properties of every scheme."""

from __future__ import annotations

import copy
import io
import json
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import nn

from sealmark.core import registry
from sealmark.core.errors import ForgedSecretError, ParameterError, SealmarkError
from sealmark.core.lock import Lock
from sealmark.core.scheme import Scheme
from sealmark.core.secret import Secret
from sealmark.core.weights import ModelWeights
from sealmark.formats.secret import read_secret, write_secret
from sealmark.testing.bench import Bench, state_bytes


def refuses(error: type[SealmarkError], call: Callable[[], object]) -> bool:
    """Whether ``call`` raises that error; another error passes through."""
    try:
        call()
    except error:
        return True
    return False


def check_card_is_data(scheme: Scheme, bench: Bench) -> None:
    """The card can be read without importing the scheme, and says what an owner must know."""
    card = scheme.card
    json.dumps(card.as_dict())
    if scheme.name in registry.items("scheme"):
        assert registry.item("scheme", scheme.name).card() == card, "the card is not written in literals"
    assert card.function, "the card names no function"
    assert card.citation, "the card names no source"
    assert card.broken_by, "the card names nothing that breaks it"


def check_parameters_round_trip(scheme: Scheme, bench: Bench) -> None:
    """A secret tells which scheme, with which parameters, made it."""
    _, secret = bench.protect(scheme)
    assert secret.facts["scheme"] == scheme.name
    if scheme.name in registry.items("scheme"):
        assert registry.scheme_of(secret) == scheme


def check_secret_file_round_trip(scheme: Scheme, bench: Bench) -> None:
    """A secret comes back from its file as it was, and the file is for the owner alone."""
    _, secret = bench.protect(scheme)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "secret"
        write_secret(secret, path)
        assert path.stat().st_mode & 0o077 == 0, "others may read the secret"
        again = read_secret(path)
    assert again == secret
    assert again.facts == secret.facts


def check_secret_follows_from_the_seed(scheme: Scheme, bench: Bench) -> None:
    """The same randomness gives the same protected model; other randomness another commitment.

    What refuses a wrong key is encrypted with a salt of its own each time, and opens to the same model.
    """
    model, secret = bench.protect(scheme)
    again, same, *_ = _again(bench, scheme)
    assert same == secret
    if isinstance(scheme, Lock) and scheme.card.refuses_wrong_key and not scheme.card.needs_training:
        assert state_bytes(again) != state_bytes(model), "encrypted twice with the same salt"
        again, model = scheme.unlock(again, secret), scheme.unlock(model, same)
    assert state_bytes(again) == state_bytes(model)
    assert bench.fresh(scheme, 0) != secret


def check_original_is_untouched(scheme: Scheme, bench: Bench) -> None:
    """Protecting works on a copy."""
    *_, before, after = _again(bench, scheme)
    assert after == before


def check_secret_is_not_shown(scheme: Scheme, bench: Bench) -> None:
    """No secret byte in its representation or in the protected model; it cannot be pickled."""
    model, secret = bench.protect(scheme)
    seed = secret.reveal_seed()
    shown = repr(secret) + str(secret) + repr(scheme)
    assert seed.hex() not in shown
    shipped = state_bytes(model)
    assert not any(seed[i : i + 8] in shipped for i in range(len(seed) - 7)), "the model holds the seed"
    assert refuses(SealmarkError, lambda: pickle.dump(secret, io.BytesIO()))
    assert copy.deepcopy(secret) is secret


def check_foreign_secret_is_refused(scheme: Scheme, bench: Bench) -> None:
    """A secret of another scheme, or with other parameters, is refused before anything is done."""
    _, secret = bench.protect(scheme)
    foreign = Secret(secret.reveal_seed(), secret.facts | {"scheme": "another"}, secret.tensors)
    other = Secret(secret.reveal_seed(), secret.facts | {"parameters": {"x": 1}}, secret.tensors)
    assert refuses(ParameterError, lambda: scheme.check_secret(foreign))
    assert refuses(ParameterError, lambda: scheme.check_secret(other))


def check_forged_secret_is_refused(scheme: Scheme, bench: Bench) -> None:
    """A secret that does not open the published commitment is refused, and so are foreign tensors."""
    _, secret = bench.protect(scheme)
    scheme.check_secret(secret, secret.commitment)
    forged = bench.fresh(scheme, 1)
    assert refuses(ForgedSecretError, lambda: scheme.check_secret(forged, secret.commitment))
    tensors = dict(secret.tensors) | {"foreign": bench.task.test.inputs[:1]}
    stuffed = Secret(secret.reveal_seed(), secret.facts, tensors)
    assert refuses(ForgedSecretError, lambda: scheme.check_secret(stuffed))


def _again(bench: Bench, scheme: Scheme) -> tuple[nn.Module, Secret, str, str]:
    """What protecting gives a second time, and the digest of the plain model before and after."""

    def make() -> tuple[nn.Module, Secret, str, str]:
        before = ModelWeights(bench.plain).digest()
        made = Bench.protect(_like(bench), scheme)
        return *made, before, ModelWeights(bench.plain).digest()

    return bench.make(("again", scheme), make)


def _like(bench: Bench) -> Bench:
    """A workbench with the same plain model and nothing protected yet."""
    other = Bench(bench.task)
    other.plain = bench.plain
    if "references" in vars(bench):
        other.references = bench.references
    return other
