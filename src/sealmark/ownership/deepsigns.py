"""Darvish Rouhani et al. 2019, DeepSigns: bits in the mean activation of a few classes, or memorized noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.codes.payload import payload_bits, payload_bytes
from sealmark.core.activations import activations, tapped
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import (
    ForgedSecretError,
    MarkFailedError,
    ModelMismatchError,
    ParameterError,
    UnknownNameError,
)
from sealmark.core.evidence import Basis, Score
from sealmark.core.modes import device_of, evaluating
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.stats.nulls import Binomial, score_of_bits

_POOL = 16  # classes that carriers are drawn from: a thousand would swell the secret
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class DeepSigns(Watermark):
    """The owner's signature in the distribution of activations, or in rarely explored inputs.

    **White-box.** A center mu_i is learned for each carrier class i. It is pulled to where the sign of
    ``mu_i A`` spells the class's bits (L2, a sum of BCEs), and the class's activations are pulled to it
    (L1): ``loss += pull * mean |f(x) - mu_i|^2``, while mu minimizes ``pull * L1 + fit * L2`` at its own
    ``rate``. What counts is never mu but the suspect: its mean activation on the secret's own inputs,
    times A. A and the bits are drawn after those inputs were committed to, so that matching bits are
    exactly Bin(carriers * bits, 1/2) on any suspect made without the secret.

    **Black-box.** Keyed noise gets keyed labels and is trained on beside the data. Kept are those that
    the unmarked model got wrong and the marked one gets right, at most ``keys`` in order. That choice
    looks at models, and natural labels are easier to teach, so matches among the kept are *not*
    Bin(kept, 1/C) on an innocent suspect, for C classes. But they never exceed the matches among all
    candidates, which are Bin(candidates, 1/C): hence few candidates, and that law as a bound. It holds
    whatever was kept and why, even by a claimant who saw the suspect; for ground seeds there is ``tries=``.

    Args:
        mode: where the mark is put and read.
        layer: name of the module whose output carries the bits; empty for the widest linear or
            convolutional one before the head, of several the last. Positions of a map are averaged.
        carriers: s, classes that carry bits.
        bits: N, bits a class; at most the layer's width.
        inputs: rows of each carrier class that the secret holds.
        pull: lambda_1.
        fit: lambda_2.
        rate: of the centers' own optimizer (Adam).
        keys: K of the black-box mode.
        candidates: K' > K.
        per_batch: candidates beside each batch.
    """

    mode: Literal["white-box", "black-box"] = "white-box"
    layer: str = ""
    carriers: int = 2
    bits: int = 32
    inputs: int = 10
    pull: float = 0.003
    fit: float = 0.03
    rate: float = 0.1
    keys: int = 30
    candidates: int = 40
    per_batch: int = 16

    card = Card(
        title="Bits in class-mean activations (white-box), or memorized noise (black-box)",
        citation="B. Darvish Rouhani, H. Chen, F. Koushanfar, DeepSigns: An End-to-End Watermarking Framework "
        "for Ownership Protection of Deep Neural Networks, ASPLOS 2019",
        function=("ownership",),
        scenario="white-box",
        mechanism="statistics of activations; in black-box mode a trigger set of noise",
        capacity="multi-bit; zero-bit in black-box mode",
        type="passive watermark",
        target_models="classifiers",
        needs_training=True,
        needs_data=True,
        needs_trained=True,
        reported="BER 0 with a few bits a class, and 20 to 30 black-box keys, on MNIST and CIFAR-10; survives "
        "compression, fine-tuning and overwriting (sizes from memory, not checked against the paper)",
        reproduced="digits, 3 seeds, into trained models. White-box, 64 bits in fc1: BER 0, p = 1e-19, accuracy "
        "within 0.2 points; BER 0 after pruning 50 %, int8, and 20 epochs of fine-tuning at the owner's rate "
        "0.05 and at 0.1; at most 0.05 after overwriting. Black-box: 30 of 30 keys, p = 3e-22, the same after "
        "pruning, int8 and fine-tuning at the owner's rate; 20 to 25 after 0.1, 23 to 28 after overwriting; "
        "accuracy within 0.6 points; 12 independent models matched 0 to 6. A step takes 1.4 and 1.2 times as "
        "long. ResNet-9 on CIFAR-10, one seed: with a pull of 0.001 and a fit of 0.01 BER 0.08 at 0.1 points; "
        "with the defaults 0.03 at 4 to 5 points (experiments)",
        broken_by=(
            "permuting the layer's units, at no cost in accuracy (Lukas et al. 2022): BER 0.39 to 0.53, and 0 "
            "again with original=, the model before marking; to a marked original it cannot be aligned",
            "black-box: 20 epochs of fine-tuning at 4 times the owner's rate left 3 to 10 of 30 keys, at no cost; "
            "white-box at 8 times the rate: BER 0.16 to 0.23, for 1 point of accuracy",
            "overwriting by the same scheme at the owner's rate for 20 epochs: BER 0.13 to 0.20, one seed of "
            "three under "
            "the usual level, at no cost (docs/results/ownership-whitebox.md)",
            "a fresh start of the marked layer and the head: BER 0.44 to 0.48, at the accuracy of a model trained "
            "on the thief's rows alone",
            "large messages are fragile (DICTION, Bellafqira and Coatrieux 2022)",
            "black-box: rejecting queries that look unlike the task, as uniform noise does; training a new model "
            "on its answers (Lukas et al. 2022)",
        ),
        deviations=(
            "carriers, A and bits are drawn after the inputs were committed to; two-sided exact test, not BER = 0",
            "A is divided by the root of M and the centers learn fast, so that bits are spelled with a margin. "
            "With A as in the paper, lambda_1 = 1 and a slow mu, BER was 0, and 0.4 to 0.6 after fine-tuning at "
            "the owner's rate",
            "no term that pushes the carriers' centers off the others: it has no lower bound and no gradient in "
            "the model",
            "reads the layer's output before its activation function: after ReLU, BER was up to 0.06 after "
            "fine-tuning and 0.28 after overwriting, where it was up to 0.05 and 0.16",
            "the carriers' rows pass through the model once more, in evaluation mode, as they are read",
            "black-box: few candidates, and a law that bounds any choice among them; the released verifier counts "
            "matches as mismatches",
            "black-box: uniform noise as in the released code, without a test of density",
        ),
        patents=(
            "US 11,972,408 B2 (application US 2021/0019605, continuation US 2024/0242191, WO2019190886A1), "
            "Digital watermarking of machine learning models, University of California",
        ),
        max_drop=0.01,
    )

    def __post_init__(self) -> None:
        counts = (self.carriers, self.bits, self.inputs, self.keys, self.per_batch)
        weights = (self.pull, self.fit, self.rate)
        if self.mode not in ("white-box", "black-box"):
            raise ParameterError("unknown mode of deepsigns", expected="white-box or black-box", found=self.mode)
        if min(counts) < 1 or min(weights) <= 0 or self.carriers > _POOL or self.candidates < self.keys:
            raise ParameterError(
                "bad parameters of deepsigns",
                expected=f"all positive, carriers <= {_POOL}, candidates >= keys",
                found=self.parameters,
            )

    @property
    def access(self) -> Access:  # type: ignore[override]
        """Activations in white-box mode, labels in black-box mode."""
        return Access.MODULE if self.mode == "white-box" else Access.LABELS

    @property
    def carries_payload(self) -> bool:  # type: ignore[override]
        """In white-box mode."""
        return self.mode == "white-box"

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """White-box: the layer, and rows of each class that may carry. Black-box: the form of inputs and labels."""
        if task is None or task.classes < 2 or task.owner.targets.ndim != 1:
            raise ParameterError(
                "deepsigns needs a classification task",
                expected="task= with two classes or more",
                found=None if task is None else task.name,
            )
        return self._bind_labels(task) if self.mode == "black-box" else self._bind_layer(model, task.owner)

    def _bind_layer(self, model: nn.Module, rows: Batch) -> tuple[dict[str, Any], dict[str, Tensor]]:
        layer = self.layer or _widest(model, rows.inputs[:2])
        modules = dict(model.named_modules())
        if layer not in modules:
            raise UnknownNameError("no such layer", expected=f"one of {sorted(modules)[1:]}", found=layer)
        axis = _axis(modules[layer])
        width = _features(activations(model, layer, rows.inputs[:2]), axis).shape[1]
        labels, counts = torch.unique(rows.targets, return_counts=True)
        pool = labels[counts >= self.inputs][:_POOL]
        if self.bits > width or self.carriers > len(pool):
            raise ParameterError(
                "deepsigns has too little to carry the bits",
                expected=f"at most {width} bits (width of {layer}), {len(pool)} carriers ({self.inputs} rows each)",
                found=(self.bits, self.carriers),
                advice="choose a wider layer, fewer bits or fewer carriers",
            )
        keys = torch.stack([rows.inputs[rows.targets == label][: self.inputs] for label in pool])
        return {"layer": layer, "axis": axis, "width": width, "pool": pool.tolist()}, {"keys": keys}

    def _bind_labels(self, task: Task) -> tuple[dict[str, Any], dict[str, Tensor]]:
        inputs = task.owner.inputs
        if not inputs.is_floating_point():
            raise ParameterError("deepsigns needs real-valued inputs", expected="float32", found=inputs.dtype)
        span = {"low": inputs.min().item(), "high": inputs.max().item()}
        return {"shape": list(inputs.shape[1:]), "classes": task.classes, **span}, {}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """White-box: ``carriers`` (s,) in the pool, ``projection`` A (M, N), ``message`` b (s, N) of 0 and 1.

        Black-box: ``inputs`` (K', ...) float32 in the task's range, ``labels`` (K',) int64.
        A is standard normal over the root of M, so that logits have the size of activations.
        """
        return secret.memo("deepsigns", lambda: self._bits(secret) if self.carries_payload else self._noise(secret))

    def _bits(self, secret: Secret) -> dict[str, Tensor]:
        width, pool = int(secret.host["width"]), len(secret.host["pool"])
        projection = torch.from_numpy(secret.stream("projection").normal(width * self.bits)).float()
        message = torch.from_numpy(payload_bits(secret, self.carriers * self.bits)).float()
        return {
            "carriers": torch.from_numpy(secret.stream("carriers").permutation(pool)[: self.carriers]),
            "projection": projection.reshape(width, self.bits) / math.sqrt(width),
            "message": message.reshape(self.carriers, self.bits),
        }

    def _noise(self, secret: Secret) -> dict[str, Tensor]:
        host = secret.host
        raw = secret.stream("inputs").raw(self.candidates * math.prod(host["shape"]))
        noise = torch.from_numpy(raw).float().reshape(self.candidates, *host["shape"]) / 255
        labels = secret.stream("labels").integers(self.candidates, host["classes"])
        return {
            "inputs": noise * (host["high"] - host["low"]) + host["low"],
            "labels": torch.from_numpy(labels),
        }

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """The centers and their optimizer, or the candidates and the choice among them."""
        return _Centers(self, secret, model) if self.carries_payload else _Candidates(self, secret, model)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """White-box: matching bits, two-sided. Black-box: matching labels among the kept, against the bound."""
        if not self.carries_payload:
            return self._score_labels(suspect, secret)
        total = self.carriers * self.bits
        wrong = int((self._read(suspect, secret) != self.derive(secret)["message"]).sum())
        return score_of_bits(total - wrong, total)

    def decode(self, suspect: Suspect, secret: Secret) -> bytes:
        """The payload as the suspect holds it; empty where the secret carries none."""
        read = self._read(suspect, secret)
        return payload_bytes(secret, read.reshape(-1).numpy().astype(np.uint8))

    def _read(self, suspect: Suspect, secret: Secret) -> Tensor:
        means = self.means(cast("WhiteBox", suspect).model, secret)
        return (means @ self.derive(secret)["projection"] > 0).float()

    def means(self, model: nn.Module, secret: Secret) -> Tensor:
        """The mean activation of each carrier class on the secret's inputs: (s, M) float32 on the CPU."""
        host = secret.host
        pool = secret.tensors.get("keys", torch.empty(0))
        if len(pool) != len(host["pool"]):
            raise ForgedSecretError("bad inputs", expected=f"some of {len(host['pool'])} classes", found=len(pool))
        keys = pool[self.derive(secret)["carriers"]]
        seen = _features(activations(model, host["layer"], keys.flatten(0, 1)), host["axis"])
        if seen.shape[1] != host["width"]:
            raise ModelMismatchError(
                "the suspect has another form", expected=f"{host['width']} features", found=seen.shape[1]
            )
        return seen.reshape(*keys.shape[:2], -1).mean(1)

    def _score_labels(self, suspect: Suspect, secret: Secret) -> Score:
        noise = self.derive(secret)
        named = secret.tensors.get("kept", torch.arange(self.candidates)).flatten().tolist()
        kept = [place for place in range(self.candidates) if place in named]
        if not kept or len(kept) != len(named):  # a key named twice would count twice
            raise ForgedSecretError("bad choice of keys", expected=f"some of {self.candidates}, each once")
        matches = int((suspect.labels(noise["inputs"][kept]) == noise["labels"][kept]).sum())
        null = AnySubset(self.candidates, 1 / secret.host["classes"], most=max(self.keys, len(kept)))
        return Score(matches, null, {"keys": len(kept), "key_accuracy": matches / len(kept)})


@dataclass(frozen=True)
class AnySubset(Binomial):
    """Matches within a subset of n keyed symbols, whoever chose it and why: never more than within all n.

    Args:
        most: size of the subset.

    Example:
        >>> law = AnySubset(40, 0.1, most=30)
        >>> law.log_p(16) == Binomial(40, 0.1).log_p(16), law.floor == law.log_p(30)
        (True, True)
    """

    most: int = 1
    basis = Basis.BOUND

    def __str__(self) -> str:
        return f"at most {super().__str__()}, whatever was kept"

    @property
    def floor(self) -> float:
        """Log p of the whole subset matching."""
        return self.log_p(self.most)


class _Centers(Embedding):
    """The carriers' centers, which learn the bits, and the pull of the activations to them."""

    def __init__(self, scheme: DeepSigns, secret: Secret, model: nn.Module) -> None:
        super().__init__(scheme, secret)
        self.mark, self.host, device = scheme, secret.host, device_of(model)
        key = scheme.derive(secret)
        self.classes = torch.tensor(self.host["pool"])[key["carriers"]].to(device)
        self.projection, self.message = key["projection"].to(device), key["message"].to(device)
        self.centers = nn.Parameter(scheme.means(model, secret).to(device))
        self.optimizer = torch.optim.Adam([self.centers], scheme.rate)

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        hits = batch.targets[:, None] == self.classes
        rows, places = hits.nonzero(as_tuple=True)
        if len(rows) == 0:
            return batch.inputs.new_zeros(())
        # as verification will read it, and without a trace in the running statistics
        with evaluating(model), torch.enable_grad(), tapped(model, self.host["layer"]) as tap:
            model(batch.inputs[rows])
        seen = _features(tap.output, self.host["axis"])
        self._learn(seen.detach(), places)
        return self.mark.pull * _spread(seen, self.centers.detach()[places])

    def _learn(self, seen: Tensor, places: Tensor) -> None:
        logits = self.centers @ self.projection
        bits = functional.binary_cross_entropy_with_logits(logits, self.message, reduction="sum")
        loss = self.mark.pull * _spread(seen, self.centers[places]) + self.mark.fit * bits
        (self.centers.grad,) = torch.autograd.grad(loss, [self.centers])
        self.optimizer.step()


class _Candidates(Embedding):
    """The noise and its labels beside each batch; what the unmarked model got wrong is known beforehand."""

    def __init__(self, scheme: DeepSigns, secret: Secret, model: nn.Module) -> None:
        super().__init__(scheme, secret)
        noise = scheme.derive(secret)
        self.mark, self.rows = scheme, Batch(noise["inputs"], noise["labels"])
        self.wrong = ~self._right(model)

    def extra(self, batch: Batch, rng: np.random.Generator) -> Batch:
        count = self.mark.candidates
        places = (int(rng.integers(count)) + torch.arange(self.mark.per_batch)) % count
        return self.rows.take(places).to(batch.inputs.device)

    def finish(self, model: nn.Module) -> Secret:
        kept = (self.wrong & self._right(model)).nonzero()[: self.mark.keys, 0]
        if len(kept) < self.mark.keys:
            raise MarkFailedError(
                "deepsigns: too few keys were learned",
                expected=self.mark.keys,
                found=len(kept),
                advice="train longer, or pass more candidates or fewer keys",
            )
        return self.secret.with_learned({"kept": kept})

    def _right(self, model: nn.Module) -> Tensor:
        return WhiteBox(model).labels(self.rows.inputs) == self.rows.targets


def _spread(seen: Tensor, centers: Tensor) -> Tensor:
    return (seen - centers).square().sum(1).mean()


def _features(output: Tensor, axis: int) -> Tensor:
    """One vector a row, averaged over positions: (N, ..., M, ...) to (N, M) float32."""
    return output.movedim(axis, 1).flatten(2).mean(2).float() if output.ndim > 2 else output.float()


def _widest(model: nn.Module, inputs: Tensor) -> str:
    """The widest linear or convolutional layer that runs before the last one; of several the last."""
    ran: list[tuple[int, nn.Module]] = []

    def note(module: nn.Module, _: object, output: Tensor) -> None:
        ran.append((output.shape[_axis(module)], module))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, _LAYERS)]
    try:
        with evaluating(model) as device:
            model(inputs.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    if len(ran) < 2:
        raise ParameterError("no hidden layer", expected="two linear or convolutional layers", found=len(ran))
    widest = max(reversed(ran[:-1]), key=lambda pair: pair[0])[1]
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[widest]


def _axis(module: nn.Module) -> int:
    """Where a layer's output has its features."""
    return -1 if isinstance(module, nn.Linear) else 1
