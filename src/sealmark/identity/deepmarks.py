"""DeepMarks (Chen et al. 2019): every user's copy carries a word of a collusion-resistant code in one layer."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2
from torch import Tensor, nn
from torch.nn import functional

from sealmark.codes.bibd import BlockCode
from sealmark.core.card import Card
from sealmark.core.errors import MarkFailedError, ParameterError
from sealmark.core.evidence import DEFAULT_ALPHA
from sealmark.core.hosts import choose_host, filter_length, mean_filter, read_mean_filter
from sealmark.core.identity import Issued, Suspicion, UserMark, check_model
from sealmark.core.secret import Secret
from sealmark.core.suspect import Access, Suspect, WhiteBox
from sealmark.core.task import Batch, Task
from sealmark.core.training import train
from sealmark.core.weights import Weights, weights_of

_TAU = 0.85  # of the paper: a symbol over it is a 1


@dataclass(frozen=True)
class Deepmarks(UserMark):
    """A user's fingerprint ``f_j = U b_j`` is trained into the secret projection ``X w`` of a layer.

    w is the layer's weight averaged over its output filters; X has v rows of standard normals, U is a
    uniform rotation, and b_j, of -1 and +1, is the user's word of an AND code (`BlockCode`): v words of v
    bits, each with k zeros. Issuing fine-tunes the model with ``strength * mean((X w - f_j)^2)`` added to
    the loss. The symbols ``U' X w`` of a copy are its user's word; of an average of copies, the average.

    Ours: the paper accuses whoever's zeros are all among the zeros that are read, which on an unmarked model
    is everybody, and on a noisy one somebody innocent. Here a user is accused by how badly the symbols are
    explained without him, by anybody else (`BlockCode.scores`): a proven bound for whatever up to k - 1
    colluders make of their copies. Larger coalitions go free as a rule. The paper's reading stands beside
    it, as ``decoded``, where there is a mark at all.

    Args:
        layer: name of the weight tensor; empty for the one with the most inputs a filter.
        block: k; 4, 6, 8 or 12 give 13, 31, 57 or 133 users, and codes for coalitions of k - 1.
        strength: gamma. The paper's 0.1 leaves no mark in small networks.
        epochs: of fine-tuning a copy; the same for all users, or averages do not average the marks.
        rate: of fine-tuning.
    """

    layer: str = ""
    block: int = 6
    strength: float = 10.0
    epochs: int = 10
    rate: float = 0.01

    access = Access.WEIGHTS
    card = Card(
        title="DeepMarks: a collusion-resistant word in each user's copy, by fine-tuning",
        citation="H. Chen, B. D. Rouhani, C. Fu, J. Zhao, F. Koushanfar, DeepMarks: A Secure Fingerprinting "
        "Framework for Digital Rights Management of Deep Learning Models, ICMR 2019",
        function=("identity",),
        scenario="white-box",
        mechanism="weight regularizer, AND code of a block design, secret random projection",
        capacity="31 users, coalitions of 5 that average or mix their copies",
        type="active watermark",
        target_models="any network with a convolutional or linear layer of 31 inputs a filter or more",
        needs_training=True,
        needs_data=True,
        reported="unique words, up to 5 colluders found, robust to fine-tuning and pruning (abstract); gamma 0.1, "
        "tau 0.85 (from memory, not checked against the paper)",
        reproduced="digits, 3 seeds, 31 users, layer fc1: symbols within 0.001 of -1 and +1, accuracy 0.990 to "
        "0.991 on average; p, corrected for 31 users, under 1e-89 for a copy, 1e-59 after fine-tuning (all layers, "
        "the owner's rate, 20 epochs), 1e-39 after pruning 50 %, 1e-75 in int8, 1e-13 after overwriting with "
        "another secret; averages of 2 to 5 copies name all of them at 1e-65, medians of 3 at 1e-10; nobody "
        "innocent in any case, nobody on the base, 9 independent models and with 3 wrong secrets. The paper's "
        "subset test names all 31 on the base, and innocents on 2 of 3 overwritten copies",
        broken_by=(
            "the minority's vote of three copies, at no cost in accuracy: 2 of 9 coalitions lost a member, of four "
            "or five none; the majority's vote of five: none (docs/results/identity.md)",
            "their average marked again by deepmarks with another secret: nobody was named in 3 of 3 seeds",
            "the elementwise minimum or maximum, for at most 1.5 points of accuracy: of three copies 9 and 7 of 9 "
            "coalitions lost a member, of four 0 and 1, of five none (docs/results/identity.md)",
            "permuting the layer's inputs, or dummy neurons, at no cost in accuracy (Yan et al. 2022, 2023), "
            "unless the suspect is aligned to the original first",
            "more than 5 colluders: of eight nobody is named, unless whole layers are taken (measured; by the "
            "paper's subset test 44.8 % of the coalitions of 6 frame somebody)",
            "training a new model on its answers (Lukas et al. 2022)",
        ),
        deviations=(
            "gamma 10 instead of 0.1",
            "a proven bound by the least favorable coalition beside the paper's subset test",
            "X, U and the assignment of words derived from the committed secret",
        ),
        max_drop=0.01,
        needs_trained=True,
    )

    def __post_init__(self) -> None:
        if self.strength <= 0 or self.epochs < 1 or self.rate <= 0:
            raise ParameterError(
                "bad parameters of deepmarks",
                expected="strength > 0, epochs >= 1, rate > 0",
                found=(self.strength, self.epochs, self.rate),
            )
        BlockCode(self.block)

    @property
    def code(self) -> BlockCode:
        """The code of the users' words."""
        return BlockCode(self.block)

    @property
    def places(self) -> int:  # type: ignore[override]
        """v: users that a secret has room for."""
        return self.code.length

    def enroll(
        self,
        model: nn.Module,
        task: Task | None = None,
        *,
        users: Sequence[str] = (),
        owner: str = "",
        rng: np.random.Generator | None = None,
    ) -> Secret:
        """See `UserMark.enroll`: the roster is committed, and who has which word follows from the secret.

        Raises:
            ParameterError: no users, more than there are words, a name that is empty or stands twice, or a
                layer with too few inputs a filter.
            UnknownNameError: no such layer.
        """
        roster = list(users)
        if not 1 <= len(roster) <= self.places or len(set(roster)) < len(roster) or not all(roster):
            raise ParameterError(
                "bad list of users",
                expected=f"1 to {self.places} names, each once",
                found=f"{len(roster)}, {len(set(roster))} of them distinct",
                advice="name everyone who may get a copy; a larger block has more words",
            )
        layer, info = choose_host(model, self.layer, room=filter_length, need=self.places)
        host = {"layer": layer, "length": filter_length(info), "users": roster}
        return self.new_secret(weights_of(model), host=host, owner=owner, rng=rng)

    def issue(self, model: nn.Module, secret: Secret, user: str, *, task: Task | None = None) -> Issued:
        """See `UserMark.issue`.

        Raises:
            ParameterError: also where the user is not on the roster.
            MarkFailedError: the word cannot be read back.
        """
        self.check_secret(secret)
        check_model(weights_of(model), secret)
        word = self._word(secret, user)
        if task is None:
            raise ParameterError("deepmarks trains each copy", expected="a task", found=None, advice="pass task=")
        target = torch.from_numpy(self._rotation(secret) @ self.code.signs[word]).float()
        layer = secret.host["layer"]

        def term(model: nn.Module, _: Batch) -> Tensor:
            weight = model.get_parameter(layer)
            projection, wanted = secret.memo(
                ("deepmarks", user, weight.device),
                lambda: tuple(part.to(weight.device) for part in (self._projection(secret), target)),
            )
            return self.strength * functional.mse_loss(projection @ mean_filter(weight).float(), wanted)

        result = copy.deepcopy(model)
        train(
            result,
            task.owner,
            loss=task.loss,
            recipe=dataclasses.replace(task.recipe, epochs=self.epochs, rate=self.rate),
            rng=np.random.default_rng(int.from_bytes(secret.key(f"issue/{user}"))),
            terms=[term],
        )
        off = float(np.abs(self.symbols(WhiteBox(result), secret) - self.code.signs[word]).max())
        if not off < 1 - _TAU:
            raise MarkFailedError(
                "deepmarks: the mark did not take",
                expected=f"symbols within {1 - _TAU:.2f} of -1 and +1",
                found=f"one off by {off:.2f}",
                advice="raise the strength or the epochs, or choose a larger layer",
            )
        return Issued(user, result.train(model.training))

    def suspicion(
        self, suspect: Suspect, secret: Secret, users: Sequence[str], original: Weights | None
    ) -> Suspicion:
        """See `BlockCode.scores`; the original is not needed, but to align the suspect.

        Raises:
            ParameterError: a user is not on the roster.
            ModelMismatchError: the suspect has no such layer.
        """
        words = [self._word(secret, user) for user in users]
        symbols, length = self._read(suspect, secret)
        scores = self.code.scores(symbols)
        power = float(symbols @ symbols)
        # X is normal and independent of a suspect made without the secret: |X w|^2 / |w|^2 is chi-squared
        present = math.isfinite(power) and length > 0 and chi2.sf(power / length**2, self.places) <= DEFAULT_ALPHA
        details: dict[str, Any] = {
            "bits": self.places,
            "level": round(math.sqrt(power / self.places), 4) if math.isfinite(power) else None,
            "decoded": self._decoded(symbols, secret) if present else [],
        }
        if present and scores.max() < math.log(self.places / DEFAULT_ALPHA):
            details["nobody"] = (
                f"a mark is there, and no {self.code.colluders} users or fewer explain it well enough"
            )
        return Suspicion(scores[words], self.code.null, details)

    def symbols(self, suspect: Suspect, secret: Secret) -> NDArray[np.float64]:
        """``U' X w`` of the suspect, (v,): -1 and +1 as issued, smaller where there is no mark.

        Raises:
            ModelMismatchError: the suspect has no such layer.
        """
        return self._read(suspect, secret)[0]

    def _read(self, suspect: Suspect, secret: Secret) -> tuple[NDArray[np.float64], float]:
        """The symbols, and the length of w."""
        layer, length = secret.host["layer"], secret.host["length"]
        host = read_mean_filter(suspect, layer, length).double()
        projected = (self._projection(secret).double() @ host).numpy()
        return self._rotation(secret).T @ projected, float(host.norm())

    def _decoded(self, symbols: NDArray[np.float64], secret: Secret) -> list[str]:
        """Whom the paper's subset test accuses."""
        names = {self._word(secret, user): user for user in secret.host["users"]}
        covered = self.code.covered(self.code.read(symbols, _TAU)).nonzero()[0]
        return sorted(names.get(int(word), "nobody") for word in covered)

    def _word(self, secret: Secret, user: str) -> int:
        roster = secret.host["users"]
        if user not in roster:
            raise ParameterError(
                "not on the roster",
                expected="a name that enroll was given",
                found=repr(user),
                advice="the list of users is committed; enroll again with everyone who may get a copy",
            )
        order = secret.memo("words", lambda: secret.stream("words").permutation(self.places))
        return int(order[roster.index(user)])

    def _projection(self, secret: Secret) -> Tensor:
        """X: (v, N) float32 of standard normals; a uniform [0, 1) X would see every network alike."""

        def draw() -> Tensor:
            length = int(secret.host["length"])
            normals = secret.stream("projection").normal(self.places * length)
            return torch.from_numpy(normals).float().reshape(self.places, length)

        return secret.memo("projection", draw)

    def _rotation(self, secret: Secret) -> NDArray[np.float64]:
        """U: (v, v), uniform among the orthonormal matrices."""

        def draw() -> NDArray[np.float64]:
            normals = secret.stream("rotation").normal(self.places**2).reshape(self.places, self.places)
            basis, triangle = np.linalg.qr(normals)
            return basis * np.sign(np.diag(triangle))

        return secret.memo("rotation", draw)
