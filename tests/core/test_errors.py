"""The error tree: what a message says, which exit code it leads to, and that the drawing is true."""

from __future__ import annotations

import re

import pytest

from sealmark.core import errors
from sealmark.core.errors import (
    ArtifactError,
    CallerError,
    ParameterError,
    PolicyError,
    SealmarkError,
    ServiceError,
    UnknownNameError,
)

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, SealmarkError)]


def test_a_message_without_details_is_the_sentence_itself() -> None:
    assert str(SealmarkError("the disk is gone")) == "the disk is gone"


def test_a_message_says_what_was_expected_and_what_was_found() -> None:
    assert str(SealmarkError("bad rate", expected="0 to 1", found=2)) == "bad rate: expected 0 to 1, found 2"


def test_a_found_zero_is_shown_because_only_none_means_nothing() -> None:
    assert str(SealmarkError("no rows", found=0)) == "no rows: found 0"


def test_advice_becomes_a_sentence_with_one_full_stop() -> None:
    assert str(SealmarkError("it broke.", advice="try again.")) == "it broke. Try again."


def test_every_class_has_a_code_of_its_own() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize(
    ("family", "exit_code"), [(CallerError, 2), (ArtifactError, 3), (PolicyError, 1), (ServiceError, 4)]
)
def test_the_family_decides_the_exit_code(family: type[SealmarkError], exit_code: int) -> None:
    members = [cls for cls in CLASSES if issubclass(cls, family)]
    assert {cls.exit_code for cls in members} == {exit_code}


def test_every_error_but_the_base_belongs_to_one_family() -> None:
    families = (CallerError, ArtifactError, PolicyError, ServiceError)
    for cls in set(CLASSES) - {SealmarkError}:
        assert sum(issubclass(cls, family) for family in families) == 1, cls


def test_ordinary_handlers_catch_bad_values_and_unknown_names() -> None:
    assert issubclass(ParameterError, ValueError)
    assert issubclass(UnknownNameError, LookupError)


def test_the_drawing_in_the_docstring_is_the_class_tree() -> None:
    drawn: dict[str, tuple[str, str]] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"( *[│├└─ ]*)(\w+Error)\b(?:.*exit (\d))?", line)
        if match:
            depth = len(match[1])
            above[depth] = match[2]
            parents = [d for d in above if d < depth]
            drawn[match[2]] = (above[max(parents)] if parents else "Exception", match[3] or "")
    found = {cls.__name__: cls.__bases__[0].__name__ for cls in CLASSES}
    assert {name: parent for name, (parent, _) in drawn.items()} == found
    for cls in CLASSES:
        exit_code = drawn[cls.__name__][1]
        assert exit_code in ("", str(cls.exit_code))
        assert bool(exit_code) == (cls.__bases__[0] is SealmarkError)
