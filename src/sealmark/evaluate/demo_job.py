"""What the demo does, step by step; each step leaves its figures in the summary and its files on disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sealmark.core import registry
from sealmark.core.errors import TamperedError
from sealmark.core.evidence import Evidence
from sealmark.core.files import atomic_write
from sealmark.core.identity import Accusation, UserMark
from sealmark.core.integrity import WeightSeal
from sealmark.core.lock import Lock
from sealmark.core.ownership import embed_all
from sealmark.core.secret import Secret
from sealmark.core.suspect import WhiteBox
from sealmark.core.training import OnEpoch, train_task
from sealmark.core.weights import save_model, weights_of
from sealmark.crypto.signing import SigningKey
from sealmark.evaluate.artifacts import environment
from sealmark.evaluate.steps import (
    Marks,
    attack_figures,
    flip_bit,
    generator,
    lock_figures,
    new_marks,
    owner_recipe,
    refuses,
    same_bits,
    sealed_figures,
    verify,
)
from sealmark.formats.envelope import sign_document
from sealmark.formats.evidence import SuspectRecord, sign_evidence
from sealmark.formats.secret import write_secret
from sealmark.formats.times import utc_now, utc_text

USERS = ("Aster Bank", "Borealis Labs", "Cobalt Health", "Delta Motors", "Ember Media")
LONE, COLLUDERS = USERS[2], (USERS[0], USERS[3], USERS[4])
MARKS = ("uchida", "adi")


@dataclass(frozen=True)
class Judgment:
    """What the owner finds in a suspect: a verdict of each watermark, and who leaked it."""

    evidence: dict[str, Evidence]
    accusation: Accusation

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "ownership": {name: found.as_dict() for name, found in self.evidence.items()},
            "accusation": self.accusation.as_dict(),
        }


class Job:
    """The demo under way. The steps are taken in the order in which they stand here.

    Args:
        folder: for everything that is written.
        seed: of everything that is drawn, secrets included: a demo is to be repeated.
        device: where models are trained.

    Attributes:
        summary: the figures so far, as plain JSON.
    """

    plain: nn.Module
    marked: nn.Module
    marks: Marks
    scheme: UserMark
    secret: Secret
    copies: dict[str, nn.Module]
    leaks: list[nn.Module]

    def __init__(self, folder: Path, seed: int, device: torch.device) -> None:
        self.folder, self.seed, self.device = folder, seed, device
        self.task = registry.task("digits")
        self.signer = SigningKey(generator(seed, "signer").bytes(32))
        self.summary: dict[str, Any] = {
            "created": utc_text(utc_now()),
            "seed": seed,
            "device": str(device),
            "task": self.task.name,
            "chance": self.task.chance,
            "users": list(USERS),
            "environment": environment(),
        }
        for name in ("copies", "leaks", "secrets", "evidence"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def train(self, on_epoch: OnEpoch) -> str:
        """A plain model, to compare with."""
        recipe = owner_recipe(self.task)
        rng = generator(self.seed, "plain")
        self.plain = train_task(self.task, rng=rng, recipe=recipe, device=self.device, on_epoch=on_epoch)
        accuracy = self.task.score(self.plain)
        self.summary["plain"] = {
            "accuracy": accuracy,
            "epochs": recipe.epochs,
            "rows": self.task.owner.rows,
            "tests": self.task.test.rows,
        }
        return f"accuracy {accuracy:.1%}"

    def mark(self, on_epoch: OnEpoch) -> str:
        """The owner's model, from the same start, with a white-box and a black-box watermark in one run."""
        task, seed = self.task, self.seed
        fresh = task.model(generator(seed, "plain")).to(self.device)
        self.marks = new_marks(MARKS, fresh, task, seed, self.signer.verify_key.raw.hex())
        self.marked, _ = embed_all(
            list(self.marks.values()),
            fresh,
            task,
            rng=generator(seed, "embed"),
            recipe=owner_recipe(task),
            on_epoch=on_epoch,
        )
        found = {name: evidence.as_dict() for name, evidence in verify(self.marks, self.marked).items()}
        self.summary["marked"] = {"accuracy": task.score(self.marked), "ownership": found}
        for name, (_, secret) in self.marks.items():
            self._keep(name, secret)
        save_model(self.marked, self.folder / "model.safetensors")
        return f"accuracy {self.summary['marked']['accuracy']:.1%}, both marks read back"

    def lock(self, _: OnEpoch) -> str:
        """Two locks on the marked model: one on what it computes, one on its file."""
        neural = cast("Lock", registry.scheme("chaotic_weights"))
        locked = neural.lock(self.marked, self.task, rng=generator(self.seed, f"key {neural.name}"))
        save_model(locked.model, self.folder / "locked.safetensors")
        self._keep(neural.name, locked.key)
        figures = lock_figures(neural, self.marked, self.task, self.seed)
        sealed = cast("Lock", registry.scheme("sealed"))
        source, target = self.folder / "model.safetensors", self.folder / "model.sealed"
        file_figures, key = sealed_figures(sealed, source, target, self.seed)
        self._keep(sealed.name, key)
        self.summary["locks"] = {neural.name: asdict(figures), sealed.name: asdict(file_figures)}
        return f"{max(figures.wrong_keys):.1%} at most with a wrong key; the sealed file refuses"

    def issue(self, _: OnEpoch) -> str:
        """A copy with a mark of its own for each user."""
        self.scheme = cast("UserMark", registry.scheme("spread_spectrum"))
        self.secret = self.scheme.enroll(self.marked, self.task, rng=generator(self.seed, "secret users"))
        self._keep(self.scheme.name, self.secret)
        self.copies = {user: self.scheme.issue(self.marked, self.secret, user).model for user in USERS}
        for user, copy in self.copies.items():
            save_model(copy, self.folder / "copies" / f"{user.lower().replace(' ', '-')}.safetensors")
        scores = {user: {"accuracy": self.task.score(copy)} for user, copy in self.copies.items()}
        self.summary["copies"] = scores
        return f"accuracy {min(entry['accuracy'] for entry in scores.values()):.1%} or more"

    def leak(self, _: OnEpoch) -> str:
        """One user's copy, fine-tuned and pruned; and the average of three users' copies."""
        task, seed, plain = self.task, self.seed, self.summary["plain"]["accuracy"]
        tuned = attack_figures(registry.modification("fine_tune"), self.copies[LONE], task, plain, seed)
        pruned = attack_figures(registry.modification("prune"), tuned.model, task, plain, seed)
        copies = [self.copies[user] for user in COLLUDERS]
        mixed = attack_figures(registry.modification("average"), copies, task, plain, seed)
        rows = task.attacker.rows
        self.leaks = [pruned.model, mixed.model]
        self.summary["leaks"] = [
            {
                "title": "Leak 1",
                "story": f"{LONE}'s copy, fine-tuned on {rows} rows, then half of its weights pruned",
                "culprits": [LONE],
                "accuracy": pruned.accuracy,
                "scratch": tuned.scratch,
                "rows": rows,
                "seconds": tuned.cost.cpu_seconds + pruned.cost.cpu_seconds,
            },
            {
                "title": "Leak 2",
                "story": f"the average of the copies of {', '.join(COLLUDERS[:-1])} and {COLLUDERS[-1]}",
                "culprits": list(COLLUDERS),
                "accuracy": mixed.accuracy,
                "scratch": mixed.scratch,
                "rows": 0,
                "seconds": mixed.cost.cpu_seconds,
            },
        ]
        for number, model in enumerate(self.leaks, 1):
            save_model(model, self.folder / "leaks" / f"leak-{number}.safetensors")
        return f"accuracy {pruned.accuracy:.1%} and {mixed.accuracy:.1%}"

    def judge(self, _: OnEpoch) -> str:
        """Both watermarks and the trace on each leak, signed."""
        with atomic_write(self.folder / "evidence" / "verify-key.txt") as file:
            file.write(f"{self.signer.verify_key}\n".encode())
        named = []
        for number, (model, entry) in enumerate(zip(self.leaks, self.summary["leaks"], strict=True), 1):
            judgment = self._judgment(self.marks, self.secret, model)
            entry |= judgment.as_dict()
            self._sign(judgment, model, f"leak-{number}", f"{entry['title']}: {entry['story']}")
            named.append(", ".join(found.user for found in judgment.accusation.accused) or "nobody")
        return "; ".join(named)

    def doubt(self, _: OnEpoch) -> str:
        """What must not match does not: another model, wrong secrets, a changed bit."""
        task, seed = self.task, self.seed
        independent = train_task(task, rng=generator(seed, "independent"), recipe=owner_recipe(task))
        others = new_marks(MARKS, self.marked, task, seed + 1)
        other = self.scheme.enroll(self.marked, task, rng=generator(seed + 1, "secret users"))
        controls = {
            "An independent model, trained on the same rows": self._judgment(self.marks, self.secret, independent),
            "Leak 1 under wrong secrets": self._judgment(others, other, self.leaks[0]),
            "The marked model before it was issued": self._judgment({}, self.secret, self.marked),
        }
        self.summary["controls"] = [{"title": title} | judgment.as_dict() for title, judgment in controls.items()]
        self.summary["integrity"] = self._integrity()
        return f"{len(controls)} innocent suspects; one flipped bit in {self.summary['integrity']['flipped_in']}"

    def _integrity(self) -> dict[str, Any]:
        scheme = cast("WeightSeal", registry.scheme("reversible"))
        sealed = scheme.seal(self.marked, self.task, rng=generator(self.seed, "seal"))
        save_model(sealed.model, self.folder / "sealed-against-change.safetensors")
        self._keep(scheme.name, sealed.secret)
        changed, tensor = flip_bit(sealed.model, generator(self.seed, "flip"))
        return {
            "accuracy": self.task.score(sealed.model),
            "intact": scheme.check(sealed.model, sealed.secret).as_dict(),
            "tampered": scheme.check(changed, sealed.secret).as_dict(),
            "flipped_in": tensor,
            "restore_refused": refuses(lambda: scheme.restore(changed, sealed.secret), TamperedError),
            "restored": same_bits(scheme.restore(sealed.model, sealed.secret), self.marked),
        }

    def _judgment(self, marks: Marks, secret: Secret, model: nn.Module) -> Judgment:
        accusation = self.scheme.trace(WhiteBox(model), secret, USERS, original=self.marked)
        return Judgment(verify(marks, model), accusation)

    def _sign(self, judgment: Judgment, model: nn.Module, stem: str, story: str) -> None:
        digest = weights_of(model).digest()
        record = SuspectRecord(digest, story)
        documents = {name: sign_evidence(found, record, self.signer) for name, found in judgment.evidence.items()}
        body = {
            "type": "accusation",
            "evidence": judgment.accusation.as_dict(),
            "suspect": {"digest": digest, "description": story},
            "issued": utc_text(utc_now()),
        }
        documents["trace"] = sign_document("evidence", body, self.signer)
        for name, data in documents.items():
            with atomic_write(self.folder / "evidence" / f"{stem}-{name}.json") as file:
                file.write(data)

    def _keep(self, name: str, secret: Secret) -> None:
        write_secret(secret, self.folder / "secrets" / f"{name}.secret")
