"""Song, Ristenpart and Shmatikov 2017: four ways in which a model hides bits, as marks and as the leak they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sealmark.codes.payload import payload_bits, payload_bytes
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.evidence import Score
from sealmark.core.hosts import read_host
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Batch, Task
from sealmark.core.weights import TensorMap
from sealmark.ownership._carriers import Carrier, Correlation, LowBits, Sign
from sealmark.stats.nulls import Binomial

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memorization(Watermark):
    """A model that remembers more than its task: bits in its weights, or in its answers to noise.

    ===============  ======================================================  ==================
    ``carrier``      where a bit is                                          who can read it
    ===============  ======================================================  ==================
    ``sign``         the sign of a weight                                    sees the weights
    ``correlation``  the level of a weight, by up to ``2**bits_per_weight``  sees the weights
    ``lsb``          the low bits of a float32, written after training       sees the weights
    ``capacity``     labels of keyed noise, floor(log2 K) bits a label       asks for labels
    ===============  ======================================================  ==================

    The paper is an attack on secrecy: whoever writes the training code carries the training data out.
    ``keygen(model, task, payload=data)`` with ``bits = 8 * len(data)`` is that attack and `decode` its
    other half. The payload is XORed with a keystream of the secret, so it stays secret without it. The one
    exception is ``correlation`` with several bits a weight: there each value is kept or inverted as a
    whole, so that a small error stays small, and how far the values are from the middle is open to all
    (how many so far; not which, for the order is keyed).

    Ours: the weights are a keyed choice from all weight tensors, one from each of n equal stretches, in a
    keyed order, where the code takes the first n. Bits are keyed, so matches are exactly Bin(T, 1/2) on any
    suspect made without the secret. A label is its symbol plus a keyed number modulo K, so that it is
    uniform over all K classes and matches with chance 1/K exactly, although three bits name eight of ten.

    Args:
        carrier: one of the four.
        bits: T, at least so many are carried; the payload fits into them.
        bits_per_weight: up to 8 for ``correlation``, up to 23 for ``lsb``; one for the others.
        strength: lambda / n for ``sign``, lambda / sqrt(n) for ``correlation``; unused by the others.
        margin: how far from zero ``sign`` pushes a weight; the paper has 0, which pruning undoes.
        per_batch: points beside each batch, for ``capacity``.

    Raises:
        ParameterError: another carrier, or numbers that mean nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> scheme = Memorization(carrier="lsb", bits=2048, bits_per_weight=16)
        >>> secret = scheme.keygen(model, payload=b"a license")
        >>> scheme.embedding(model, secret, None, np.random.default_rng(0)).finish(model) == secret
        True
        >>> from sealmark.core.suspect import WhiteBox
        >>> scheme.decode(WhiteBox(model), secret)
        b'a license'
    """

    carrier: Literal["sign", "correlation", "lsb", "capacity"] = "sign"
    bits: int = 512
    bits_per_weight: int = 1
    strength: float = 0.03
    margin: float = 0.02
    per_batch: int = 16

    carries_payload = True
    card = Card(
        title="Bits in signs, levels or low bits of weights, or in labels of noise",
        citation="C. Song, T. Ristenpart, V. Shmatikov, Machine Learning Models that Remember Too Much, "
        "ACM CCS 2017",
        function=("ownership",),
        scenario="white-box",
        mechanism="covert channel in signs of weights (default), their values, their low bits, or in labels",
        capacity="multi-bit",
        type="passive watermark",
        target_models="any network with convolutional or linear layers; capacity: classifiers",
        needs_training=True,
        needs_data=True,
        reported="CIFAR-10 and others: up to 18 to 22 low bits a weight without loss of accuracy; the other "
        "carriers within 1 to 3 points, with images that can be recognized (from memory, not checked "
        "against the paper)",
        reproduced="digits, 3 seeds, 512 bits: sign BER 0, p = 1e-153, accuracy within 0.4 points; still so after "
        "fine-tuning at the owner's rate, pruning of 50 % and int8; after pruning of 80 % BER 0.05 to 0.08. "
        "Correlation: the same at p = 1e-125, also after pruning of 80 %. Capacity: p = 1e-171 at 0.7 points, "
        "BER 0.01 to 0.12 after fine-tuning. Low bits in all weights: 20 a weight cost 0.1 points on average, 21 "
        "0.3, 22 0.4, 23 2.6. As a leak of training images, bytes that the net of 155,536 weights holds: sign "
        "19,442, exact; correlation 155,472 with a mean error of 8 of 255, or 10,000 with 0.3; low bits 388,840, "
        "exact; capacity 128 exact at 0.6 points, 375 exact at 1.0",
        broken_by=(
            "training random signs into all weights by the same scheme, with 400 rows: BER 0.5 for 0.6 to 1.2 "
            "points of accuracy; correlation then still matches at p = 1e-7 to 1e-12, without its payload "
            "(measured, 3 seeds)",
            "lsb: rounding to bf16 or int8, BER 0.5 at no cost in accuracy; a float16 round trip, 0.46; one epoch "
            "at rate 1e-4, 0.33 of 16 bits; another secret's low bits, 0.5 (measured, 3 seeds)",
            "the histogram of weights shows correlation, whose weights of one bit stand at two values (measured)",
            "capacity: another secret's points, BER 0.23 to 0.30 and still a match; training a new model on its "
            "answers (Lukas et al. 2022)",
            "permuting neurons, at no cost in accuracy (Yan et al. 2022, 2023), unless the suspect is aligned to "
            "the original first; then BER 0 again for sign and correlation. Low bits do not outlast a scale that "
            "is no "
            "power of two, whoever undoes it (measured)",
            "fine-tuning at ten times the owner's rate: sign BER 0.07 to 0.11, for 1.3 points (measured, 3 seeds)",
        ),
        deviations=(
            "keyed bits, places, offsets of labels, and an exact test",
            "sign: a margin, and a sum instead of a mean; correlation: r instead of |r|, and 64 pilots",
            "encryption by keystream; no padding of the length, no error correction",
            "no test of incoming models for low bits: a keyed payload cannot be told from the bits that training "
            "leaves, whose law nobody knows; round the weights instead, which costs nothing",
        ),
        grade="research",
    )

    def __post_init__(self) -> None:
        most = {"sign": Sign.most, "correlation": Correlation.most, "lsb": LowBits.most, "capacity": 1}
        if (
            self.carrier not in most
            or not 1 <= self.bits_per_weight <= most[self.carrier]
            or min(self.bits, self.per_batch) < 1
            or not (self.strength > 0 and self.margin >= 0)
        ):
            raise ParameterError(
                "bad parameters of memorization",
                expected=f"bits, per_batch >= 1, strength > 0, margin >= 0, and most bits_per_weight {most}",
                found=self.parameters,
            )

    @property
    def access(self) -> Access:  # type: ignore[override]
        """Labels for ``capacity``, weights for the others."""
        return Access.WEIGHTS if self.carrier != "capacity" else Access.LABELS

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Note the form of the weight tensors; for ``capacity`` that of the inputs and the classes."""
        return (_inputs(task) if self._carrier is None else self._weight_tensors(model, self._carrier)), {}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """The secret's random parts, in the order in which they are read.

        ``places`` (n,) int64, counted through all weight tensors by name, and ``message`` (n, each) uint8 of 0
        and 1; for ``capacity`` ``points`` (n, ...) uint8 and ``labels`` (n,) int64.
        """
        return secret.memo("memorization", lambda: self._drawn(secret))

    def loss(self, model: nn.Module, secret: Secret, batch: Batch) -> Tensor:
        """What pulls the weights; zero for ``lsb`` and ``capacity``."""
        if self._carrier is None:
            return super().loss(model, secret, batch)
        device = batch.inputs.device
        bits = self.derive_on(secret, device)["message"]
        return self._carrier.pull(self._values(secret, model.get_parameter, device), bits)

    def extra(self, secret: Secret, batch: Batch, rng: np.random.Generator) -> Batch:
        """``per_batch`` points at random, for ``capacity``."""
        if self._carrier is not None:
            return super().extra(secret, batch, rng)
        points = self.points_of(secret)
        rows = rng.integers(points.rows, size=self.per_batch)
        return points.take(torch.from_numpy(rows)).to(batch.inputs.device)

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """One run; ``lsb`` writes at its end and needs no training: ``Recipe(epochs=0)`` will do."""
        carrier = self._carrier
        return _Written(self, secret, carrier) if isinstance(carrier, LowBits) else Embedding(self, secret)

    def points_of(self, secret: Secret) -> Batch:
        """The points of ``capacity`` as the model sees them: (n, ...) float32 in the task's range, (n,) int64."""

        def make() -> Batch:
            host, key = secret.host, self.derive(secret)
            return Batch(key["points"].float() / 255 * (host["high"] - host["low"]) + host["low"], key["labels"])

        return secret.memo("points", make)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching bits or the projection on the levels; matching labels against Bin(points, 1/K)."""
        if self._carrier is not None:
            return self._carrier.score(self._shown(suspect, secret), self.derive(secret)["message"])
        points = self.points_of(secret)
        labels = suspect.labels(points.inputs)
        matches = int((labels == points.targets).sum())
        wrong = _symbol_bits(secret, labels) != _symbol_bits(secret, points.targets)
        details = {"points": points.rows, "bits": wrong.size, "ber": float(wrong.mean())}
        return Score(matches, Binomial(points.rows, 1 / secret.host["classes"]), details)

    def decode(self, suspect: Suspect, secret: Secret) -> bytes:
        """The payload as the suspect holds it; empty where the secret carries none."""
        if self._carrier is None:
            read = _symbol_bits(secret, suspect.labels(self.points_of(secret).inputs))
        else:
            values, message = self._shown(suspect, secret), self.derive(secret)["message"]
            read = self._carrier.read(values, message).numpy()
        return payload_bytes(secret, self._rekeyed(secret, read.reshape(-1)))

    def blind(self, secret: Secret) -> TensorMap | None:
        """The weights without those that carry; for ``lsb`` all of them without their low bits."""
        carrier = self._carrier
        if carrier is None:
            return None
        rows, _ = self._rows(secret, _CPU)
        return lambda name, t: carrier.erase(t, rows[name].to(t.device)) if name in rows else t

    @property
    def _carrier(self) -> Carrier | None:
        """None for ``capacity``, which is not in the weights."""
        match self.carrier:
            case "sign":
                return Sign(1, self.strength, self.margin)
            case "correlation":
                return Correlation(self.bits_per_weight, self.strength)
            case "lsb":
                return LowBits(self.bits_per_weight)
            case _:
                return None

    def _weight_tensors(self, model: nn.Module, carrier: Carrier) -> dict[str, Any]:
        named = {k: v for k, v in model.named_parameters() if v.dim() >= 2 and v.is_floating_point()}
        kinds = {str(weight.dtype) for weight in named.values()}
        if self.carrier == "lsb" and kinds - {"torch.float32"}:
            raise UnsupportedError("lsb writes into float32 alone", expected="torch.float32", found=sorted(kinds))
        room = max(0, sum(weight.numel() for weight in named.values()) - carrier.pilots) * carrier.each
        if self.bits > room:
            raise ParameterError(
                "the model is too small a host",
                expected=f"at most {room} bits",
                found=self.bits,
                advice="pass fewer bits, or more bits_per_weight where the carrier has them",
            )
        return {"shapes": {name: list(weight.shape) for name, weight in named.items()}}

    def _drawn(self, secret: Secret) -> dict[str, Tensor]:
        if self._carrier is None:
            host, each = secret.host, _bits_a_point(secret)
            count = math.ceil(self.bits / each)
            points = secret.stream("points").raw(count * math.prod(host["shape"])).reshape(count, *host["shape"])
            labels = (self._message(secret, count, each) @ _powers(each) + _offsets(secret, count)) % host[
                "classes"
            ]
            return {"points": torch.from_numpy(points), "labels": torch.from_numpy(labels)}
        count = math.ceil(self.bits / self.bits_per_weight) + self._carrier.pilots
        edges = np.arange(count + 1) * sum(map(math.prod, secret.host["shapes"].values())) // count
        steps = secret.stream("places").uniform(count) * np.diff(edges)
        message = self._message(secret, count, self.bits_per_weight)
        places = (edges[:-1] + steps.astype(np.int64))[secret.stream("order").permutation(count)]
        return {"places": torch.from_numpy(places), "message": torch.from_numpy(message)}

    def _message(self, secret: Secret, count: int, each: int) -> NDArray[np.uint8]:
        """(count, each) keyed bits: the payload, then zeros."""
        rest = secret.stream("message").bits(count * each - self.bits, offset=self.bits)
        bits = np.concatenate([payload_bits(secret, self.bits), rest])
        return self._rekeyed(secret, bits).reshape(count, each)

    def _rekeyed(self, secret: Secret, bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Bits that were XORed with the keystream, as their carrier has them; and back.

        In a level of several bits an error by one step can flip them all, so that XORing each would make
        large errors of small ones. There all bits of a weight are XORed with the same one.
        """
        if self.carrier != "correlation":
            return bits
        mask = secret.stream("message").bits(len(bits))
        return bits ^ mask ^ np.repeat(mask[:: self.bits_per_weight], self.bits_per_weight)

    def _rows(self, secret: Secret, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """For each tensor that carries its places, in rising order, and where in all of these each place is."""

        def cut() -> tuple[dict[str, Tensor], Tensor]:
            places, order = self.derive(secret)["places"].sort()
            shapes = secret.host["shapes"]
            ends = torch.tensor([math.prod(shapes[name]) for name in sorted(shapes)]).cumsum(0)
            parts = torch.tensor_split(places, torch.searchsorted(places, ends[:-1]))
            named = zip(sorted(shapes), parts, [0, *ends[:-1].tolist()], strict=True)
            rows = {name: (part - start).to(device) for name, part, start in named if len(part)}
            return rows, order.argsort().to(device)

        return secret.memo(("rows", device), cut)

    def _values(self, secret: Secret, fetch: Callable[[str], Tensor], device: torch.device) -> Tensor:
        rows, turn = self._rows(secret, device)
        return torch.cat([fetch(name).reshape(-1)[places].float() for name, places in rows.items()])[turn]

    def _shown(self, suspect: Suspect, secret: Secret) -> Tensor:
        shapes = secret.host["shapes"]

        def fetch(name: str) -> Tensor:
            return read_host(suspect, name, lambda i: list(i.shape) == shapes[name], f"shape {shapes[name]}")

        return self._values(secret, fetch, _CPU)


class _Written(Embedding):
    """Low bits go in when training is over."""

    def __init__(self, scheme: Memorization, secret: Secret, carrier: LowBits) -> None:
        super().__init__(scheme, secret)
        self._carrier = carrier
        self._rows, self._turn = scheme._rows(secret, _CPU)

    def finish(self, model: nn.Module) -> Secret:
        message = self.scheme.derive(self.secret)["message"][self._turn.argsort()]
        parts = torch.split(message, [len(places) for places in self._rows.values()])
        for (name, places), bits in zip(self._rows.items(), parts, strict=True):
            weight = model.get_parameter(name).detach()
            flat, places = weight.reshape(-1).clone(), places.to(weight.device)
            flat[places] = self._carrier.write(flat[places], bits.to(weight.device))
            weight.copy_(flat.reshape(weight.shape))
        return self.secret


def _inputs(task: Task | None) -> dict[str, Any]:
    if task is None or task.classes < 2 or not task.owner.inputs.is_floating_point():
        raise ParameterError(
            "capacity needs a classification task with real-valued inputs",
            expected="task= with two classes or more",
            found=None if task is None else task.name,
        )
    inputs = task.owner.inputs
    low, high = inputs.min().item(), inputs.max().item()
    return {"shape": list(inputs.shape[1:]), "low": low, "high": high, "classes": task.classes}


def _bits_a_point(secret: Secret) -> int:
    return int(secret.host["classes"]).bit_length() - 1


def _powers(each: int) -> NDArray[np.int64]:
    return 1 << np.arange(each - 1, -1, -1)


def _offsets(secret: Secret, count: int) -> NDArray[np.int64]:
    return secret.stream("offsets").integers(count, secret.host["classes"])


def _symbol_bits(secret: Secret, labels: Tensor) -> NDArray[np.uint8]:
    """(n, each) bits that labels spell; a label that spells none gives some."""
    symbols = (labels.numpy() - _offsets(secret, len(labels))) % secret.host["classes"]
    bits: NDArray[np.uint8] = (symbols[:, None] & _powers(_bits_a_point(secret)) > 0).astype(np.uint8)
    return bits
