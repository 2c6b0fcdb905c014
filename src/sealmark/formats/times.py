"""Points in time as documents hold them: UTC, to the second, ``2031-05-17T09:30:00Z``."""

from __future__ import annotations

from datetime import UTC, datetime

from sealmark.core.errors import FormatError, ParameterError

_FORM = "%Y-%m-%dT%H:%M:%SZ"


def utc_now() -> datetime:
    """Now, by this machine's clock, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


def utc_text(time: datetime) -> str:
    """ISO 8601 text of a time; fractions of a second are cut.

    Raises:
        ParameterError: the time has no zone, so it could be any of 24 hours.

    Example:
        >>> utc_text(datetime(2031, 5, 17, 9, 30, tzinfo=UTC))
        '2031-05-17T09:30:00Z'
    """
    if time.tzinfo is None:
        raise ParameterError("a time without a zone", expected="an aware datetime", found=time, advice="use UTC")
    return time.astimezone(UTC).strftime(_FORM).zfill(20)


def parse_utc(text: object) -> datetime:
    """Read what `utc_text` wrote, and nothing else.

    Raises:
        FormatError: another form, or no such time.
    """
    try:
        time = datetime.strptime(str(text), _FORM).replace(tzinfo=UTC)
    except ValueError:
        time = None
    if time is None or utc_text(time) != text:
        raise FormatError("bad time", expected="UTC like 2031-05-17T09:30:00Z", found=repr(text)[:40])
    return time
