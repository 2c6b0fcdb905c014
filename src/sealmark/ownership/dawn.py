"""Szyller et al. 2021: a prediction service gives each client a few keyed wrong answers, and knows them again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sealmark.blackbox.answer_key import Answered, AnswerKey, choose, coarse, layer_values
from sealmark.blackbox.triggers import TriggerMark
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ForgedSecretError, MarkFailedError, ParameterError, UnsupportedError
from sealmark.core.evidence import DEFAULT_ALPHA, Basis, Score, Verdict, check_alpha
from sealmark.core.identity import Accusation, Ranked
from sealmark.core.modes import chunks, evaluating
from sealmark.core.secret import Secret
from sealmark.core.suspect import Suspect
from sealmark.core.task import Batch, Task
from sealmark.crypto.random import Stream

_SURVEYED = 5000  # rows of the owner's that decide the mapping
_CHUNK = 1000  # blends that are asked at once


@dataclass(frozen=True)
class Dawn(TriggerMark):
    """Dynamic adversarial watermarking of neural networks.

    A query is mapped to bits: each coordinate above or below its median over the owner's rows. HMAC-SHA-256
    of the bits under the client's key selects it, at the published rate, for a wrong answer: the class
    vector permuted by the same key, with another class on top. Near copies of a query get the same answer.
    A thief who trains on the answers learns them by heart; `AnswerKey` serves, `register` puts what was
    answered into the secret, `verify` asks a suspect, `name_client` says whose answers it learned.

    Wrong labels are uniform over the other classes. So whatever a suspect made without the answers says, it
    matches each with chance 1 / (K - 1) at most. This holds for an honest record: who writes it knows the key
    and could write down queries that happen to match, so publish `Secret.commitment` of the registered
    secret from time to time, before there is a suspect.

    `embed` is what a thief does to himself: it asks about blends of the owner's rows and trains on the wrong
    answers. It is there to try what a surrogate would show; a product uses `sealmark.runtime.asgi`.

    Args:
        triggers: wrong answers that `embed` learns.
        per_batch: of these beside each batch.
        rate: share of queries that are answered wrongly (r_w).
        bits: coordinates of the mapping, at least; as many as tell the owner's rows apart.
        grid: without a layer, the mapping sees the mean of each of grid x grid blocks of a plane.
        layer: the mapping reads this layer of the model instead; the service then computes it once more.
    """

    per_batch: int = 4
    rate: float = 0.005
    bits: int = 32
    grid: int = 8
    layer: str = ""

    rule = 0.5
    card = Card(
        title="Keyed wrong answers of a prediction service, by client",
        citation="S. Szyller, B. G. Atli, S. Marchal, N. Asokan, DAWN: Dynamic Adversarial Watermarking of "
        "Neural Networks, ACM Multimedia 2021",
        function=("ownership", "identity"),
        scenario="black-box",
        mechanism="backdoor (answers of the service)",
        capacity="any number of clients",
        type="active watermark of answers",
        target_models="classifiers of three classes or more behind a service",
        needs_training=True,
        needs_data=True,
        needs_trained=True,
        reported="marks every surrogate made by two extraction attacks; honest clients lose 0.03 to 0.5 points "
        "(secondary source); confidence 1 - 2^-64 (from memory, not checked against the paper)",
        reproduced="digits, 3 seeds, rate 0.05, 1,050 queries: 43 to 57 wrong answers; surrogates repeat all of "
        "them, p = 1e-40 to 1e-51, at 95 to 98 % accuracy, by labels or probabilities, and after pruning half of "
        "the weights; honest clients lose 4.2 to 7.0 points; independent models, other clients' answers and wrong "
        "keys match 0 to 10 %. Nearly equal queries (noise of 0.01) keep their bits in 99 %, of 0.03 in 47 %",
        broken_by=(
            "fine-tuning the surrogate on 400 true labels: 5 to 22 % are left at rate 0.05 (measured here)",
            "extracting the surrogate once more on other rows: 2 to 8 % are left (measured here)",
            "the majority over five noisy copies of a query: of 5 % wrong answers 0.6 to 2 % are left (measured)",
            "many accounts: about 20 wrong answers are needed of one client or of one group",
            "learning with noisy labels, early stopping (Lukas et al. 2022)",
        ),
        deviations=(
            "without a layer the mapping sees the input itself, so that no service must be changed",
            "coordinates are cut in the gap nearest to the median; those that noise changes least come first",
            "wrong labels are uniform over the other classes and p-values exact bounds, where the paper accepts "
            "at less than half mismatches",
            "a client's wrong answers can be capped",
        ),
        max_drop=0.01,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rate <= 0.5 or self.bits < 8 or self.grid < 1:
            raise ParameterError(
                "bad parameters of dawn", expected="0 < rate <= 0.5, bits >= 8, grid >= 1", found=self.parameters
            )

    def bind(
        self, model: nn.Module, task: Task | None, chosen: Any, rng: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The form of queries and answers; which coordinates are mapped, and where each is cut."""
        host, _ = super().bind(model, task, chosen, rng)
        if host["classes"] < 3 or task is None:
            raise ParameterError(
                "two classes leave one wrong answer, which proves nothing", expected="3 classes or more"
            )
        rows = task.owner.inputs[:_SURVEYED]
        values = layer_values(model, self.layer, rows) if self.layer else coarse(rows.numpy(), host, self.grid)
        distinct = len({row.tobytes() for row in rows.numpy()})
        places, thresholds = choose(values, self.bits, distinct)
        return host, {"places": torch.from_numpy(places), "thresholds": torch.from_numpy(thresholds)}

    def draw(self, secret: Secret) -> Tensor:
        """No queries were registered.

        Raises:
            ParameterError: always.
        """
        raise ParameterError(
            "no answers are registered in this secret",
            expected="what the service answered",
            advice="read them from the evidence store and call register",
        )

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """The wrong label of each registered query; nothing in a secret that is fresh from `keygen`.

        Raises:
            ForgedSecretError: a query is registered twice.
        """
        if "natural" not in secret.tensors:
            return {}
        return secret.memo("derived", lambda: {"labels": self._labels(secret)})

    def check_secret(self, secret: Secret, commitment: str | None = None) -> None:
        """Refuse also registered queries that the mapping tells from those whose answers were falsified.

        Else a forger would exchange them for inputs that every model answers as the labels say. A mapping that
        reads a layer cannot be checked without the model, and rests on the commitment alone.
        """
        super().check_secret(secret, commitment)
        if "queries" not in secret.tensors or self.layer:
            return
        key = AnswerKey(secret)
        if key.bits(key.read(list(secret.tensors["queries"].numpy()))) != _records(secret)[1]:
            raise ForgedSecretError("a registered query is another than was answered")

    def trigger_set(self, secret: Secret) -> Batch:
        """The registered queries, exactly as they were asked, and the wrong label of each."""
        if "queries" not in secret.tensors:
            self.draw(secret)
        return Batch(secret.tensors["queries"], self.parts(secret)["labels"])

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Wrong answers that the suspect repeats, against Bin(n, 1 / (K - 1))."""
        found = super().score(suspect, secret)
        clients = json.loads(secret.tensors["names"].numpy().tobytes())
        return replace(found, details={**found.details, "clients": len(clients)})

    def register(self, secret: Secret, answers: Iterable[Answered], *, model: nn.Module | None = None) -> Secret:
        """The secret with what one client, or several who worked together, were answered wrongly.

        Args:
            secret: of `keygen`.
            answers: of the evidence store; the same query twice counts once.
            model: where the mapping reads a layer of it.

        Raises:
            ParameterError: there are none.
            ForgedSecretError: a record does not fit the key: its bits are others, or it was not selected.
        """
        key = AnswerKey(secret, model)
        records = list({(answer.client, answer.bits): answer for answer in answers}.values())
        if not records:
            raise ParameterError("no answers to register", expected="one or more")
        kind = np.dtype(key.dtype).newbyteorder("<")
        queries = key.read([np.frombuffer(record.query, kind).reshape(key.shape) for record in records])
        for record, bits in zip(records, key.bits(queries), strict=True):
            if record.bits != bits or not key.selects(record.client, bits):
                raise ForgedSecretError("a record does not fit the key", found=f"one of {record.client!r}")
        names = sorted({record.client for record in records})
        return secret.with_learned(
            {
                "queries": torch.from_numpy(queries),
                "natural": torch.tensor([record.natural for record in records]),
                "mapped": torch.from_numpy(np.stack([np.frombuffer(r.bits, np.uint8) for r in records]).copy()),
                "clients": torch.tensor([names.index(record.client) for record in records]),
                "names": torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8),
            }
        )

    def name_client(
        self,
        suspect: Suspect,
        secret: Secret,
        answers: Iterable[Answered],
        *,
        alpha: float = DEFAULT_ALPHA,
        model: nn.Module | None = None,
    ) -> Accusation:
        """Whose answers did the suspect learn?

        Args:
            suspect: answers queries.
            secret: of `keygen`.
            answers: of all clients that come into question.
            alpha: bound on the probability of accusing anyone innocent, over all clients together.
            model: where the mapping reads a layer of it.

        Raises:
            AccessError: the suspect does not answer.
            ParameterError: there are no answers.
            ForgedSecretError: the secret does not re-derive, or a record does not fit the key.
        """
        check_alpha(alpha)
        self.check_secret(secret)
        suspect.require(self.access)
        by_client: dict[str, list[Answered]] = {}
        for answer in answers:
            by_client.setdefault(answer.client, []).append(answer)
        if not by_client:
            raise ParameterError("no answers of any client", expected="one or more")
        scores = {
            client: self.score(suspect, self.register(secret, theirs, model=model))
            for client, theirs in by_client.items()
        }
        tries = math.log(len(scores))
        log_p = {name: min(0.0, score.null.log_p(score.statistic) + tries) for name, score in scores.items()}
        ranking = tuple(
            Ranked(
                name, scores[name].details["trigger_accuracy"], math.exp(log_p[name]), log_p[name] / math.log(10)
            )
            for name in sorted(scores, key=log_p.__getitem__)
        )
        accused = tuple(entry for entry in ranking if log_p[entry.user] <= math.log(alpha))
        reachable = all(score.null.floor + tries <= math.log(alpha) for score in scores.values())
        return Accusation(
            verdict=Verdict.MATCH if accused else Verdict.NO_MATCH if reachable else Verdict.INCONCLUSIVE,
            accused=accused,
            ranking=ranking[:20],
            alpha=alpha,
            users=len(scores),
            null=f"Bin(n, 1/{secret.host['classes'] - 1}) for the n answers of each client",
            basis=Basis.BOUND,
            scheme=self.name,
            commitment=secret.commitment,
            details={"answers": sum(score.details["triggers"] for score in scores.values())},
        )

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """Ask the model, before it is trained, about blends of the owner's rows; learn the wrong answers.

        Raises:
            UnsupportedError: no task, so no rows to ask about.
            MarkFailedError: the key selects no blends.
        """
        if task is None:
            raise UnsupportedError(
                "dawn marks a service's answers, not a model",
                expected="a task whose rows a thief asks about",
                advice="put sealmark.runtime.asgi before the service, or call embed with a task",
            )
        return Embedding(self, self.register(secret, self._stolen(model, secret, task), model=model))

    def _stolen(self, model: nn.Module, secret: Secret, task: Task) -> list[Answered]:
        """The first ``triggers`` wrong answers that a thief gets who asks about blends without end."""
        key, found = AnswerKey(secret, model), dict[bytes, NDArray[Any]]()
        for attempt in range(math.ceil(20 * self.triggers / self.rate / _CHUNK)):
            blends = key.read(_blends(task.owner.inputs, secret.stream(f"blends {attempt}")))
            for query, bits in zip(blends, key.bits(blends), strict=True):
                if key.selects("", bits) and bits not in found:
                    found[bits] = query
            if len(found) >= self.triggers:
                break
        if len(found) < self.triggers:
            raise MarkFailedError(
                "too few queries are selected",
                expected=self.triggers,
                found=len(found),
                advice="raise the rate, or pass fewer triggers",
            )
        chosen = list(found)[: self.triggers]
        queries = np.stack([found[bits] for bits in chosen])
        with evaluating(model) as device:
            asked = [model(part.to(device)).argmax(-1).cpu() for part in chunks(torch.from_numpy(queries))]
        natural = torch.cat(asked).tolist()
        return [
            Answered("", bits, query.tobytes(), kind)
            for bits, query, kind in zip(chosen, queries, natural, strict=True)
        ]

    def _labels(self, secret: Secret) -> Tensor:
        clients, mapped = _records(secret)
        if len(set(zip(clients, mapped, strict=True))) < len(mapped):
            raise ForgedSecretError("the secret counts a query twice", expected="distinct queries")
        key = AnswerKey(secret, nn.Identity() if self.layer else None)
        rows = zip(clients, mapped, secret.tensors["natural"].tolist(), strict=True)
        return torch.tensor([key.label(*row) for row in rows])


def _records(secret: Secret) -> tuple[list[str], list[bytes]]:
    """Who asked each registered query, and what it is under the mapping."""
    names = json.loads(secret.tensors["names"].numpy().tobytes())
    clients = [names[index] for index in secret.tensors["clients"].tolist()]
    return clients, [row.tobytes() for row in secret.tensors["mapped"].numpy()]


def _blends(rows: Tensor, stream: Stream) -> NDArray[Any]:
    """Keyed blends of two rows: weighted sums; for whole numbers, the first part of one and the rest of another."""
    first, second = stream.integers(2 * _CHUNK, len(rows)).reshape(2, _CHUNK)
    weights = stream.uniform(_CHUNK, offset=4 * _CHUNK)
    one, other = rows.numpy()[first], rows.numpy()[second]
    if rows.is_floating_point():
        share = weights.reshape(-1, *[1] * (one.ndim - 1)).astype(one.dtype)
        return np.asarray(share * one + (1 - share) * other)
    flat, rest = one.reshape(_CHUNK, -1), other.reshape(_CHUNK, -1)
    return np.where(np.arange(flat.shape[1]) < weights[:, None] * flat.shape[1], flat, rest).reshape(one.shape)
