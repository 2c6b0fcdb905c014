"""Bellafqira & Coatrieux 2022: a projector, learned beside the model, reads bits from activations on noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.codes.payload import payload_bits, payload_bytes
from sealmark.core.activations import activations, tapped
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ModelMismatchError, ParameterError
from sealmark.core.evidence import Score
from sealmark.core.hosts import choose_host
from sealmark.core.modes import device_of, evaluating, torch_generator
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.core.weights import TensorInfo
from sealmark.ownership._extractors import Extractor, clean_nets, score_bits


@dataclass(frozen=True)
class Diction(Watermark):
    """Bits that a projector P reads from a layer's activations on Gaussian noise, averaged over triggers.

    P learns to say the message b of the model being marked, and a string of its own, at distance T/2 from
    b, of each clean net: of the unmarked original, as in the paper, and of nets from other seeds. The
    model's loss gains ``strength * BCE(P(activations), b)`` on fresh noise at each step. The model is in
    evaluation mode for that, as it is when the mark is read. P is stepped on detached activations, before
    the model and by its own loss alone; the authors' code lets P's loss into the model's gradient too.

    P is slow on purpose: a fast one learns "marked or not", which is one bit.

    Args:
        layer: name of a module with a weight; empty for the linear layer with the most units. Activations
            of more than two dimensions are averaged over their second, the channels.
        bits: T, even.
        features: how many of the layer's features are read; a keyed choice without repetition.
        strength: lambda.
        triggers: noise inputs that are read.
        mean: of the noise.
        std: of the noise.
        hidden: units of the projector.
        rate: learning rate of the projector.
        pool: clean nets that the projector learns from, besides the original.
        held_out: clean nets that it never sees, for the null; 19 or more can reach p = 0.05.
        epochs: for which clean nets are trained.
    """

    layer: str = ""
    bits: int = 64
    features: int = 96
    strength: float = 20.0
    triggers: int = 64
    mean: float = 0.0
    std: float = 1.0
    hidden: int = 256
    rate: float = 1e-5
    pool: int = 12
    held_out: int = 20
    epochs: int = 3

    access = Access.MODULE
    carries_payload = True
    card = Card(
        title="Bits in a layer's activations on noise, read by a learned projector",
        citation="R. Bellafqira, G. Coatrieux, DICTION: DynamIC robusT whIte bOx watermarkiNg scheme, "
        "arXiv 2210.15745, 2022",
        function=("ownership",),
        scenario="white-box",
        mechanism="learned projector of activations on noise triggers",
        capacity="multi-bit",
        type="passive watermark",
        target_models="any network with floating-point inputs and a linear or convolutional layer",
        needs_training=True,
        needs_data=True,
        needs_trained=True,
        reported="256 to 512 bits; more capacity than DeepSigns at the same accuracy and robustness (abstract)",
        reproduced="digits, seeds 0 to 2: 64 bits at BER 0 (5 more seeds: 1 bit wrong in two), p = 0.048, the floor"
        " of 20 held-out nets; accuracy .9862 to .9844 in the mean; no held-out net below BER .25 (.30 to .73),"
        " 27 to 51 effective bits; BER 0 after fine-tuning (20 epochs, rate .05), pruning 50 % and int8. With one"
        " string for all clean nets and the paper's projector (a prototype) they all decode at BER .5 exactly: one"
        " effective bit. At rate 1e-3, strength 1 and 64 features, 1 or 2 of 20 held-out nets fell below BER .25",
        broken_by=(
            "overwriting by the same scheme with another secret: BER .44 to .48 (measured), no accuracy lost; "
            "at the paper's rate 1e-3 BER .06 in one run",
            "training a projector after the fact, for any model and any bits: BER 0; the commitment alone refuses",
            "permuting the units of the layer, or dummy neurons, at no cost in accuracy "
            "(Yan et al. 2022, 2023), unless the suspect is aligned to the original first",
            "training a new model on its answers (Lukas et al. 2022)",
        ),
        deviations=(
            "clean nets beside the original, each with its own string, and a null from held-out ones",
            "projector without biases, with tanh and standardized input, and slow",
            "noise alone, where the code adds it to training images and stamps a square",
            "features drawn without repetition; evaluation mode; the task's SGD for the model",
        ),
        max_drop=0.01,
        grade="research",
    )

    def __post_init__(self) -> None:
        counts = (self.bits, self.features, self.triggers, self.hidden, self.pool, self.epochs)
        whole = min(counts) >= 1 and self.bits % 2 == 0 and self.features >= 2 and self.held_out >= 2
        if not whole or min(self.strength, self.std, self.rate) <= 0:
            raise ParameterError(
                "bad parameters of diction",
                expected="bits even; features, held_out >= 2; other counts >= 1; strength, std, rate > 0",
                found=(*counts, self.held_out, self.strength, self.std, self.rate),
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Choose the layer, count its features and note the shape of inputs."""
        if task is None or not task.owner.inputs.is_floating_point():
            raise ParameterError(
                "diction needs a task whose inputs can be noise",
                expected="a task with floating-point inputs",
                found="none" if task is None else task.owner.inputs.dtype,
            )
        name, _ = choose_host(model, self.layer and f"{self.layer}.weight", room=_units, need=0)
        others = () if self.layer else (n for n, m in reversed([*model.named_modules()]) if hasattr(m, "weight"))
        inputs = task.owner.inputs[:1]
        for layer in (name.rpartition(".")[0], *others):  # a net of convolutions has its output alone for linear
            count = _flat(activations(model, layer, inputs)).shape[1]
            if count >= self.features:
                return {"layer": layer, "count": count, "shape": list(inputs.shape[1:])}, {}
        raise ParameterError(f"{layer} has too few features", expected=f"at most {count}", found=self.features)

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """Message, strings, features and triggers.

        ``message`` b: (T,) and ``strings``: (1 + pool, T) at distance T/2 from it, float32 of 0 and 1;
        ``features``: (features,) int64; ``triggers``: (triggers, ...) float32.
        """

        def draw() -> dict[str, Tensor]:
            shape = (self.triggers, *secret.host["shape"])
            noise = torch.from_numpy(secret.stream("triggers").normal(math.prod(shape))).float()
            features = secret.stream("features").permutation(secret.host["count"])[: self.features]
            message = payload_bits(secret, self.bits)
            order = np.stack([secret.stream(f"string {i}").permutation(self.bits) for i in range(1 + self.pool)])
            return {
                "message": torch.from_numpy(message).float(),
                "strings": torch.from_numpy(message ^ (order < self.bits // 2)).float(),
                "features": torch.from_numpy(features.copy()),
                "triggers": self.mean + self.std * noise.reshape(shape),
            }

        return secret.memo("diction", draw)

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """A run that trains the projector beside the model.

        Raises:
            UnsupportedError: there is no task to train clean nets for.
        """
        return _Run(self, secret, model, task)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching bits, ranked among the held-out nets."""
        read = self._read(suspect, secret)
        return score_bits(read, self.derive(secret)["message"], secret.tensors["clean"])

    def decode(self, suspect: Suspect, secret: Secret) -> bytes:
        """The payload as the suspect holds it; empty where the secret carries none."""
        return payload_bytes(secret, (self._read(suspect, secret) >= 0).numpy().astype(np.uint8))

    def seen(self, model: nn.Module, secret: Secret, inputs: Tensor) -> Tensor:
        """The features that are read: (N, ...) inputs to (N, features) on the CPU, in evaluation mode.

        Raises:
            ModelMismatchError: the model has no such layer, or one of another form.
        """
        flat = _flat(activations(model, secret.host["layer"], inputs))
        if flat.shape[1] != secret.host["count"]:
            raise ModelMismatchError(
                "the suspect has another form",
                expected=f"{secret.host['layer']} with {secret.host['count']} features",
                found=flat.shape[1],
                advice="pass original= to align the suspect, or use a scheme that reads answers",
            )
        return flat[:, self.derive(secret)["features"]].float()

    def _read(self, suspect: Suspect, secret: Secret) -> Tensor:
        projector = Extractor.of(secret, self.features, self.bits)
        model = cast("WhiteBox", suspect).model
        return _say(projector, self.seen(model, secret, self.derive(secret)["triggers"]))


class _Run(Embedding):
    """The projector, one step of it at each step of the model."""

    rows = 32  # of the model being marked, of the original and of the pool each, at each step
    noise = 256  # inputs on which the clean nets are looked at once

    def __init__(self, scheme: Diction, secret: Secret, model: nn.Module, task: Task | None) -> None:
        super().__init__(scheme, secret)
        self._diction, self._device = scheme, device_of(model)
        nets = clean_nets(task, model, scheme.pool + scheme.held_out, scheme.epochs)
        self._held_out = nets[scheme.pool :]
        # of the secret and not of the caller's generator, so that the order of rows stays as without a mark
        self._rng = torch_generator(np.random.default_rng(int.from_bytes(secret.key("training"))))
        inputs = self._draw(self.noise)
        self._clean = torch.stack([scheme.seen(net, secret, inputs) for net in [model, *nets[: scheme.pool]]])
        key = scheme.derive(secret)
        self._features, self._strings = key["features"].to(self._device), key["strings"]
        self._message = key["message"].to(self._device).expand(self.rows, -1)
        sizes = (scheme.features, scheme.hidden, scheme.bits)
        self._projector = Extractor.fresh(secret.stream("projector"), sizes, scheme.rate, self._device)

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        """``strength * BCE(P(activations of fresh noise), b)``, after a step of P."""
        with evaluating(model), torch.enable_grad(), tapped(model, self.secret.host["layer"]) as tap:
            model(self._draw(self.rows).to(self._device))
            seen = _flat(tap.output).float()[:, self._features]
        clean, strings = self._sample()
        self._projector.teach(torch.cat([seen.detach(), clean]), torch.cat([self._message, strings]))
        value = functional.binary_cross_entropy_with_logits(self._projector(seen), self._message)
        return self._diction.strength * value

    def finish(self, model: nn.Module) -> Secret:
        """Keep the projector and what it says of the held-out nets."""
        triggers = self._diction.derive(self.secret)["triggers"]
        layers = Extractor(self._projector.inner.detach().cpu(), self._projector.outer.detach().cpu())
        said = [_say(layers, self._diction.seen(net, self.secret, triggers)) for net in self._held_out]
        return self.secret.with_learned(layers.learned(torch.stack(said)))

    def _draw(self, count: int) -> Tensor:
        scheme = self._diction
        return scheme.mean + scheme.std * torch.randn((count, *self.secret.host["shape"]), generator=self._rng)

    def _sample(self) -> tuple[Tensor, Tensor]:
        """Rows of the original and, as many, of the pool; and what is to be said of each."""
        others = torch.randint(1, len(self._clean), (self.rows,), generator=self._rng)
        who = torch.cat([torch.zeros_like(others), others])
        which = torch.randint(0, self.noise, who.shape, generator=self._rng)
        return self._clean[who, which].to(self._device), self._strings[who].to(self._device)


def _say(projector: Extractor, seen: Tensor) -> Tensor:
    """(K, features) to (T,): the mean probability of each bit over the triggers, above 1/2."""
    with torch.no_grad():
        return projector(seen).sigmoid().mean(0) - 0.5


def _flat(output: Tensor) -> Tensor:
    return output if output.dim() == 2 else output.mean(1).flatten(1)


def _units(info: TensorInfo) -> int:
    return info.shape[0] if len(info.shape) == 2 else 0
