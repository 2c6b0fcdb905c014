"""The errors that sealmark raises, by who must act.

    SealmarkError
    ├── CallerError               the call is wrong: change the arguments         exit 2
    │   ├── ParameterError        an unknown parameter, or a value out of range
    │   ├── UnknownNameError      no such scheme, attack, task, user or layer
    │   ├── AccessError           the suspect does not offer what the scheme must touch
    │   ├── UnsupportedError      this scheme, or this model, cannot do that
    │   ├── BudgetError           the query budget is spent
    │   └── MarkFailedError       embedding ran and the mark did not take
    ├── ArtifactError             a file or a secret is bad: get the right one    exit 3
    │   ├── FormatError           not this format, truncated, oversized, wrong kind
    │   ├── TamperedError         authentication failed: changed bytes
    │   ├── ForgedSecretError     a secret that does not re-derive from its seed
    │   └── ModelMismatchError    made for another model
    ├── PolicyError               refused by rule: ask the owner                  exit 1
    │   ├── WrongKeyError         this key does not open this artifact
    │   ├── UntrustedError        signed by nobody whom the caller trusts
    │   ├── DeviceMismatchError   granted to other devices than this one
    │   ├── ClockRollbackError    the clock was set back
    │   ├── NotYetValidError      before its time of validity
    │   ├── ExpiredError          after its time of validity
    │   ├── StaleListError        a revocation list older than one already seen
    │   └── RevokedError          the user was revoked
    └── ServiceError              a service or the machine failed: try again      exit 4

Every message says what was expected, what was found and what to do, and holds no secret.
"""

from __future__ import annotations

from typing import ClassVar


class SealmarkError(Exception):
    """Base of every error that sealmark raises on purpose.

    Args:
        what: one sentence on what went wrong.
        expected: what would have been right.
        found: what was there.
        advice: what to do next.

    Example:
        >>> str(CallerError("bad rate", expected="0 to 1", found=2, advice="pass 0.5"))
        'bad rate: expected 0 to 1, found 2. Pass 0.5.'
    """

    code: ClassVar[str] = "ERROR"
    exit_code: ClassVar[int] = 4

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        found: object = None,
        advice: str = "",
    ) -> None:
        details = [
            f"{label} {value}" for label, value in (("expected", expected), ("found", found)) if value is not None
        ]
        message = f"{what}: {', '.join(details)}" if details else what
        if advice:
            message = f"{message.rstrip('.')}. {advice[0].upper()}{advice[1:].rstrip('.')}."
        super().__init__(message)


class CallerError(SealmarkError):
    """The call is wrong; the caller must change it."""

    code = "CALLER"
    exit_code = 2


class ParameterError(CallerError, ValueError):
    """An unknown parameter, or a value out of its range."""

    code = "BAD_PARAMETER"


class UnknownNameError(CallerError, LookupError):
    """No scheme, attack, task, user or layer of that name."""

    code = "UNKNOWN_NAME"


class AccessError(CallerError):
    """The suspect does not offer the access that the scheme needs."""

    code = "ACCESS"


class UnsupportedError(CallerError):
    """The scheme, or the model at hand, cannot do what was asked."""

    code = "UNSUPPORTED"


class BudgetError(CallerError):
    """The suspect's query budget is spent."""

    code = "BUDGET"


class MarkFailedError(CallerError):
    """Embedding ran to its end and the mark cannot be read back: give it more strength or time."""

    code = "MARK_FAILED"


class ArtifactError(SealmarkError):
    """A file, a secret or a model is bad; another one is needed."""

    code = "ARTIFACT"
    exit_code = 3


class FormatError(ArtifactError):
    """Not this format: truncated, oversized, of another kind or version."""

    code = "BAD_FORMAT"


class TamperedError(ArtifactError):
    """Authentication failed: bytes were changed, cut, added or moved."""

    code = "TAMPERED"


class ForgedSecretError(ArtifactError):
    """A secret whose parts do not re-derive from its committed seed."""

    code = "FORGED_SECRET"


class ModelMismatchError(ArtifactError):
    """The artifact was made for another model."""

    code = "MODEL_MISMATCH"


class PolicyError(SealmarkError):
    """Refused by a rule, not by a fault; the owner or authority must act."""

    code = "POLICY"
    exit_code = 1


class WrongKeyError(PolicyError):
    """The key does not open this artifact."""

    code = "WRONG_KEY"


class UntrustedError(PolicyError):
    """Signed, but by nobody among the caller's trust anchors."""

    code = "UNTRUSTED"


class DeviceMismatchError(PolicyError):
    """Granted to other devices than this one."""

    code = "DEVICE_MISMATCH"


class ClockRollbackError(PolicyError):
    """This machine's clock shows less than it, or a signed document, showed before."""

    code = "CLOCK_ROLLBACK"


class NotYetValidError(PolicyError):
    """Used before its time of validity."""

    code = "NOT_YET_VALID"


class ExpiredError(PolicyError):
    """Used after its time of validity."""

    code = "EXPIRED"


class StaleListError(PolicyError):
    """A list of the revoked that is older than one already seen, or than the caller allows."""

    code = "STALE_LIST"


class RevokedError(PolicyError):
    """The user or the credential was revoked."""

    code = "REVOKED"


class ServiceError(SealmarkError):
    """A service, the disk or the network failed; trying again may help."""

    code = "SERVICE"
    exit_code = 4
