"""Wang & Kerschbaum 2021: a learned extractor reads the mark, a critic keeps the weights inconspicuous."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sealmark.codes.payload import payload_bits, payload_bytes
from sealmark.core.card import Card
from sealmark.core.embedding import Embedding
from sealmark.core.errors import ParameterError
from sealmark.core.evidence import Score
from sealmark.core.hosts import choose_host, filter_length, mean_filter, read_mean_filter, without_mean_filter
from sealmark.core.modes import device_of, seeded, torch_generator
from sealmark.core.ownership import Watermark
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect
from sealmark.core.task import Batch, Task
from sealmark.core.weights import TensorMap
from sealmark.ownership._extractors import Extractor, clean_nets, score_bits


@dataclass(frozen=True)
class Riga(Watermark):
    """Bits in a layer's mean filter w that a learned extractor E reads, hidden from a critic D.

    Beside the model two nets are trained: E on w towards the message and on clean nets' w towards a fixed
    random string each, and D on sorted weights towards telling clean ones from marked ones (Wasserstein,
    with clipped weights). The model's loss gains ``strength * sum_j BCE(E(w)_j, b_j) - covertness * D(w)``.

    E is slow on purpose: a fast one learns w by heart, and then calls many a clean net marked.

    Args:
        layer: name of the weight tensor; empty for the one with the longest mean filter.
        bits: T, the length of the message.
        strength: lambda1.
        covertness: lambda2; 0 for no critic, as the authors' code runs.
        hidden: units of the extractor.
        rate: learning rate of the extractor.
        pool: clean nets that extractor and critic learn from.
        held_out: clean nets that they never see, for the null; 19 or more can reach p = 0.05.
        epochs: for which clean nets are trained.
    """

    layer: str = ""
    bits: int = 64
    strength: float = 0.02
    covertness: float = 0.03
    hidden: int = 128
    rate: float = 1e-5
    pool: int = 12
    held_out: int = 20
    epochs: int = 3

    access = Access.WEIGHTS
    carries_payload = True
    card = Card(
        title="Bits in a layer's mean filter, read by a learned extractor and hidden from a critic",
        citation="T. Wang, F. Kerschbaum, RIGA: Covert and Robust White-Box Watermarking of Deep Neural Networks, "
        "WWW 2021, doi 10.1145/3442381.3450000",
        function=("ownership",),
        scenario="white-box",
        mechanism="learned extractor, adversarial hiding",
        capacity="multi-bit",
        type="passive watermark",
        target_models="any network with a convolutional or linear layer",
        needs_training=True,
        needs_data=True,
        reported="no loss of accuracy; covertness and robustness significantly above earlier marks (abstract)",
        reproduced="digits, seeds 0 to 2: 0, 0 and 1 of 64 bits wrong (5 more seeds: 0), p = 0.048, the floor of"
        " 20 held-out nets; accuracy .9862 to .9855 in the mean; no held-out net below BER .25 (.34 to .69), 48 to"
        " 59 effective bits; the same bits after fine-tuning (20 epochs, rate .05), pruning 50 % and int8; KS"
        " distance to clean weights .03 to .08, std .92 to .95 of theirs (clean nets .02 to .06; Uchida .37 to .40"
        " and 6.7). With a fast extractor (rate 1e-3, a prototype) 2 and 0 of 30 clean nets fell below BER .25",
        broken_by=(
            "overwriting by the same scheme with another secret: BER .38, .53, .42 (measured), no accuracy lost",
            "training an extractor after the fact, for any model and any bits: BER 0; the commitment alone refuses",
            "permuting the input channels of the layer, or dummy neurons, at no cost in accuracy "
            "(Yan et al. 2022, 2023), unless the suspect is aligned to the original first",
            "training a new model on its answers (Lukas et al. 2022)",
        ),
        deviations=(
            "each clean net has one fixed random string, where the code draws fresh bits at each step",
            "extractor without biases, with tanh and standardized input, and slow",
            "mean filter of linear layers too, where the code takes all weights",
            "a p-value from held-out clean nets instead of BER = 0",
        ),
        max_drop=0.01,
        grade="research",
    )

    def __post_init__(self) -> None:
        counts = (self.bits, self.hidden, self.pool, self.epochs, self.held_out - 1)
        if min(counts) < 1 or min(self.strength, self.rate) <= 0 or self.covertness < 0:
            raise ParameterError(
                "bad parameters of riga",
                expected="bits, hidden, pool, epochs >= 1, held_out >= 2, strength, rate > 0, covertness >= 0",
                found=(*counts[:-1], self.held_out, self.strength, self.rate, self.covertness),
            )

    def bind(
        self,
        model: nn.Module,
        task: Task | None,
        chosen: Mapping[str, Tensor],
        rng: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Choose the layer and note its form."""
        layer, info = choose_host(model, self.layer, room=filter_length, need=self.bits)
        return {"layer": layer, "length": filter_length(info)}, {}

    def derive(self, secret: Secret) -> dict[str, Tensor]:
        """``message`` b: (T,) float32 of 0 and 1."""
        return secret.memo("riga", lambda: {"message": torch.from_numpy(payload_bits(secret, self.bits)).float()})

    def embedding(self, model: nn.Module, secret: Secret, task: Task | None, rng: np.random.Generator) -> Embedding:
        """A run that trains the extractor and the critic beside the model.

        Raises:
            UnsupportedError: there is no task to train clean nets for.
        """
        return _Run(self, secret, model, task)

    def score(self, suspect: Suspect, secret: Secret) -> Score:
        """Matching bits, ranked among the held-out nets."""
        clean = secret.tensors.get("clean", torch.empty(0))
        return score_bits(self._read(suspect, secret), self.derive(secret)["message"], clean)

    def blind(self, secret: Secret) -> TensorMap:
        """The layer without its mean filter, which is all that is read of it."""
        return without_mean_filter(secret.host["layer"])

    def decode(self, suspect: Suspect, secret: Secret) -> bytes:
        """The payload as the suspect holds it; empty where the secret carries none."""
        return payload_bytes(secret, (self._read(suspect, secret) >= 0).numpy().astype(np.uint8))

    def _read(self, suspect: Suspect, secret: Secret) -> Tensor:
        layer, length = secret.host["layer"], secret.host["length"]
        extractor = Extractor.of(secret, length, self.bits)
        host = read_mean_filter(suspect, layer, length)
        with torch.no_grad():
            return extractor(host)


class _Run(Embedding):
    """Extractor and critic, one step of each at each step of the model."""

    noise = 1.0  # added to the extractor's rows, in units of their own spread

    def __init__(self, scheme: Riga, secret: Secret, model: nn.Module, task: Task | None) -> None:
        super().__init__(scheme, secret)
        self._riga, self._layer, device = scheme, secret.host["layer"], device_of(model)
        nets = clean_nets(task, model, scheme.pool + scheme.held_out, scheme.epochs)
        hosts = torch.stack([mean_filter(net.get_parameter(self._layer).float()) for net in nets]).to(device)
        self._pool, self._held_out = hosts[: scheme.pool], hosts[scheme.pool :]
        strings = secret.stream("strings").bits(scheme.pool * scheme.bits).reshape(scheme.pool, scheme.bits)
        self._message = scheme.derive(secret)["message"].to(device)
        # the marked net counts as much as the whole pool
        marked = self._message.expand(scheme.pool, -1)
        self._targets = torch.cat([marked, torch.from_numpy(strings).float().to(device)])
        sizes = (hosts.shape[1], scheme.hidden, scheme.bits)
        self._extractor = Extractor.fresh(secret.stream("extractor"), sizes, scheme.rate, device)
        # of the secret and not of the caller's generator, so that the order of rows stays as without a mark
        rng = np.random.default_rng(int.from_bytes(secret.key("training")))
        self._critic, self._noise = _Critic(self._pool, rng), torch_generator(rng)

    def term(self, model: nn.Module, batch: Batch) -> Tensor:
        """``lambda1 * BCE(E(w), b) - lambda2 * D(w)``, after a step of E and of D."""
        host = mean_filter(model.get_parameter(self._layer).float())
        rows = torch.cat([host.detach().expand(len(self._pool), -1), self._pool])
        noise = torch.randn(rows.shape, generator=self._noise).to(rows.device)
        self._extractor.teach(rows + self.noise * rows.std(1, keepdim=True) * noise, self._targets)
        bits = functional.binary_cross_entropy_with_logits(self._extractor(host), self._message, reduction="sum")
        if not self._riga.covertness:
            return self._riga.strength * bits
        self._critic.learn(host.detach())
        return self._riga.strength * bits - self._riga.covertness * self._critic(host)

    def finish(self, model: nn.Module) -> Secret:
        """Keep the extractor and what it says of the held-out nets."""
        with torch.no_grad():
            return self.secret.with_learned(self._extractor.learned(self._extractor(self._held_out)))


class _Critic:
    """How clean a host looks: a net on its sorted weights, in units of the clean ones' spread."""

    units, rate, steps = 128, 1e-3, 2
    clip = 0.01  # of its weights, as in the first Wasserstein GAN; the code's 0.1 overshoots here

    def __init__(self, clean: Tensor, rng: np.random.Generator) -> None:
        with seeded(rng):
            layers = [nn.Linear(clean.shape[1], self.units), nn.LeakyReLU(0.2), nn.Linear(self.units, 1)]
        self._net, self._spread = nn.Sequential(*layers).to(clean.device), clean.std()
        self._optimizer = torch.optim.RMSprop(self._net.parameters(), self.rate)
        self._clean = clean

    def __call__(self, hosts: Tensor) -> Tensor:
        """(..., M) to a scalar; higher is cleaner. Sorting passes gradients to the weights."""
        rating: Tensor = self._net((hosts / self._spread).sort(-1).values).mean()
        return rating

    def learn(self, marked: Tensor) -> None:
        """Rate clean hosts higher than the marked one."""
        for _ in range(self.steps):
            self._optimizer.zero_grad()  # also drops what the model's own loss left here
            (self(marked) - self(self._clean)).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            with torch.no_grad():
                for weight in self._net.parameters():
                    weight.clamp_(-self.clip, self.clip)
