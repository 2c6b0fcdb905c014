"""What stolen credentials show."""

from __future__ import annotations

from torch import Tensor

from sealmark.core.attack import Resources
from sealmark.core.impersonation import Spoils


def stolen_rows(spoils: Spoils, resources: Resources) -> list[Tensor]:
    """The rows of each credential, (R, ...): its images, or the attacker's own rows as its user would send them.

    Raises:
        ParameterError: queries carry the credential, and the attacker has no rows of his own.
    """
    own = resources.rows.inputs if resources.rows.rows else None
    return [spoils.mark.present(credential, own) for credential in spoils.credentials]
