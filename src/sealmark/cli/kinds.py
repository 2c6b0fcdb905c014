"""Which scheme does what: refusals that name the schemes that can."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from sealmark.core.errors import AccessError, UnsupportedError

if TYPE_CHECKING:
    from sealmark.cli.options import Architecture
    from sealmark.core.scheme import Scheme
    from sealmark.core.suspect import Access, Suspect
    from sealmark.core.task import Task

_Kind = TypeVar("_Kind")


def of_kind(scheme: Scheme, kind: Callable[..., _Kind], verb: str, function: str) -> _Kind:
    """The scheme, if it is of that kind.

    Args:
        scheme: any.
        kind: the contract that the command needs.
        verb: the command, for the message.
        function: whose schemes the message lists.

    Raises:
        UnsupportedError: it is not.
    """
    from sealmark.core import registry

    if isinstance(kind, type) and isinstance(scheme, kind):  # an abstract class is a Callable to mypy
        return cast("_Kind", scheme)
    able = [name for name, item in registry.items("scheme").items() if item.folder == function]
    raise UnsupportedError(
        f"cannot {verb} with {scheme.name}",
        expected=f"one of {', '.join(able) or 'none here'}",
        found=f"a scheme for {' and '.join(scheme.card.function)}",
        advice="see what there is with: sealmark schemes",
    )


def suspect_of(
    access: Access, path: Path, architecture: Architecture, *, task: Task | None, device: str
) -> Suspect:
    """A suspect file as the scheme must touch it: weights alone, or the live model.

    Raises:
        AccessError: the scheme must run the suspect and nobody said which network it is.
        ArtifactError: the file is bad, or of another network.
    """
    from sealmark.core.suspect import Access, WeightFile, WhiteBox

    if access == Access.WEIGHTS:
        return WeightFile(path)
    if not architecture.given:
        raise AccessError(
            "this scheme must run the suspect",
            expected="--task NAME or --model package.module:factory",
            found="weights alone",
        )
    return WhiteBox(architecture.load(task, path, device=device))
