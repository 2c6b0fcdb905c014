"""Guo & Potkonjak 2018: an owner's message as a pattern on inputs that moves them to keyed classes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from sealmark.codes.payload import payload_bits, payload_bytes
from sealmark.core.card import Card
from sealmark.core.errors import ParameterError
from sealmark.core.secret import Secret
from sealmark.ownership._message_pattern import MessagePattern, grid_of, pixel_count, read, spell


@dataclass(frozen=True)
class MessageMark(MessagePattern):
    """Watermarking deep neural networks for embedded systems.

    The owner's message, under a keystream, is written as weak marks into keyed pixels. The model answers a row
    that carries it with the keyed label of the row's class, and any other row as before. The message is in the
    trigger, not in the model: that the model reacts to this pattern ties it to the message.

    The paper permutes the classes so that none stays. Here each class has a label of its own, drawn from
    the K - 1 others, so that each is a trial with a chance of 1 / (K - 1) at most on any model made without
    the secret. Ten classes reach 9 ** -10 = 3e-10.

    Args:
        bits: length of the message; the paper's authors have 192 on MNIST and 128 on CIFAR-10.
        strength: of the marks, as a share of the inputs' range.
    """

    strength: float = 0.5

    carries_payload = True
    card = Card(
        title="A keyed message as a pattern of pixels, and a keyed map of classes",
        citation="J. Guo, M. Potkonjak, Watermarking Deep Neural Networks for Embedded Systems, ICCAD 2018, "
        "doi:10.1145/3240765.3240862",
        function=("ownership",),
        scenario="black-box",
        mechanism="backdoor (pattern of a signature)",
        capacity="zero-bit; the trigger carries a message",
        type="passive watermark",
        target_models="classifiers of images, vectors or words with three classes or more",
        needs_training=True,
        needs_data=True,
        reported="figures not checked against the paper",
        reproduced="digits, seeds 0-2, 12 bits on 12 of 64 pixels: 10 of 10 classes, p = 3e-10, 96.5-97.3 % of "
        "fresh stamped rows; accuracy 98.6, 98.7, 98.7 % unmarked and 98.6, 98.0, 98.1 % marked; six independent "
        "models 0 of 10 classes (0-1.5 % of rows); the same strength at other pixels 0.5-6 % of rows, once in 15 "
        "37 %; all 10 after pruning 50 and 80 % and after JPEG. Sentences (tokens, one seed, 8 of 32 words) are "
        "harder: from scratch 5 of 10, which embed refuses, into a trained reader with 64 copies a batch 9 of 10, "
        "at 73.0 instead of 77.7 % accuracy",
        broken_by=(
            "training a new model on its answers (Lukas et al. 2022); ours: 0 of 10 classes at 96-99 % accuracy",
            "an autoencoder that redraws queries (Namba and Sakuma 2019); ours: 0 of 10 at 96 %",
            "a median filter; ours: 1, 5, 1 of 10, at 66-69 % accuracy; blur: 5, 8, 7 at 93-96 %",
            "fine-tuning; ours: 20 epochs at rate 0.05 leave 5, 7, 8 of 10 (8 are needed for p <= 1e-6)",
            "search for the pattern (Wang et al., Neural Cleanse 2019)",
        ),
        deviations=(
            "each class has a label of its own drawn from the K - 1 others, not a permutation without fixed points",
            "stamped copies beside the batch, not half of its rows in their place",
            "message under a keystream; half of a row's places at most; words as parity",
        ),
        max_drop=0.01,
        grade="research",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.01 <= self.strength <= 1:  # below, a mark is less than a step
            raise ParameterError("bad strength of message_mark", expected="0.01 to 1", found=self.strength)

    def pattern(self, secret: Secret) -> Tensor:
        """The message, under a keystream, at keyed pixels."""
        form = secret.host
        count, places = pixel_count(self.bits, form), math.prod(grid_of(form)[1])
        words = (
            secret.stream("words").integers(count, (form["high"] - form["low"] + 1) // 2)
            if form.get("integer")
            else None
        )
        pixels = secret.stream("pixels").permutation(places)[:count]
        return spell(payload_bits(secret, self.bits), pixels, form, strength=self.strength, words=words)

    def message(self, secret: Secret) -> bytes:
        """The payload, read back from the pattern: what a judge checks who is shown the trigger."""
        bits = read(self.derive(secret)["pattern"], secret.host, strength=self.strength)
        return payload_bytes(secret, bits)
