"""Fingerprint mixing: users put their credentials together to pass for somebody else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sealmark.attacks.ambiguity._climbing import Aim, climb
from sealmark.attacks.ambiguity._stolen import stolen_rows
from sealmark.core.attack import Resources
from sealmark.core.card import AttackCard
from sealmark.core.errors import ParameterError, UnsupportedError
from sealmark.core.impersonation import Impersonation, Spoils


@dataclass(frozen=True)
class FingerprintMixing(Impersonation):
    """The mean of all images, entries from this one and that, or those driven to what a credential answers.

    A splice takes an entry from the same credential in all images, so that what all images of a user share
    at that place stays.

    Whoever holds two credentials of one scheme sees what they share, which is what the model asks for. So the
    model's own rule often lets a mixture in; to be taken for a certain other user takes what was drawn for him.

    Args:
        strategy: ``blend``, ``splice``, or ``search``: a splice, from which answers climb to the class and the
            confidence of the credentials.
        queries: budget of ``search``, for all rows together, beside one answer for each row of each credential.

    Raises:
        ParameterError: another strategy, or no queries.
    """

    strategy: Literal["blend", "splice", "search"] = "splice"
    queries: int = 2000

    card = AttackCard(
        title="Fingerprints mixed from stolen ones: blended, spliced, or searched by answers",
        citation="M. Xue, Z. Wu, C. He, J. Wang, W. Liu, Active DNN IP Protection: A Novel User Fingerprint "
        "Management and DNN Authorization Control Technique, TrustCom 2020 (forged fingerprints); the mixtures are "
        "ours",
        goal="be served as somebody who is not among the colluders",
        knowledge="the credentials of two or more users, and the service's probabilities",
        level=3,
        needs_data=False,
        copies=2,
        parameters="strategy blend, splice or search; queries 500 to 10,000",
    )

    def __post_init__(self) -> None:
        if self.strategy not in ("blend", "splice", "search") or self.queries < 1:
            raise ParameterError(
                "bad parameters of fingerprint_mixing",
                expected="strategy blend, splice or search, queries >= 1",
                found=self.parameters,
            )

    def pretend(self, spoils: Spoils, resources: Resources, rng: np.random.Generator) -> Tensor:
        """See `Impersonation.pretend`.

        Raises:
            ParameterError: queries carry the credential and there are no rows to ask, or the budget does not
                suffice for one answer a row.
            UnsupportedError: inputs to blend or to search among are whole numbers, such as words.
        """
        shown = stolen_rows(spoils, resources)
        count = min(len(rows) for rows in shown)
        stack = torch.stack([rows[:count] for rows in shown])
        if self.strategy == "blend":
            if not stack.is_floating_point():
                raise UnsupportedError("only real numbers blend", expected="real inputs", found=stack.dtype)
            return stack.double().mean(0).to(stack.dtype)
        source = torch.from_numpy(rng.integers(0, len(stack), stack.shape[2:]))
        spliced = stack.gather(0, source.expand(stack.shape[1:])[None])[0]
        if self.strategy == "splice":
            return spliced
        answers = spoils.service.probabilities(stack.flatten(0, 1)).double()
        label = int(answers.mean(0).argmax())
        aim = Aim(label, float(answers[:, label].median()))
        return climb(spoils.service, spliced, aim, queries=self.queries, rng=rng)
