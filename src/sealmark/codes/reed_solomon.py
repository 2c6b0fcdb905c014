"""Reed-Solomon over bytes: a message that reads right although some of its bytes are wrong or missing."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

from reedsolo import ReedSolomonError, RSCodec

from sealmark.core.errors import FormatError, ParameterError

BLOCK = 255  # bytes that one codeword over GF(256) can have
RESERVE = 2  # check bytes that correct nothing: else a codeword that is lost would often look like another


def encode(message: bytes, size: int) -> bytes:
    """The message, followed by as many check bytes as fill ``size``.

    With e wrong bytes at places that nobody knows and d that are known to be missing it reads right while
    ``2 e + d`` is at most ``size - len(message) - 2`` (Reed and Solomon, SIAM J. 8, 1960). Above 255 bytes it
    is several such codewords of nearly equal size, a byte of each in turn, and that holds for each of them.

    Raises:
        ParameterError: the message does not fit.

    Example:
        >>> word = encode(b"sealmark", 16)
        >>> word[:8], decode(b"SEA" + word[3:], 8)
        (b'sealmark', b'sealmark')
    """
    if len(message) > size:
        raise ParameterError("message too long", expected=f"at most {size} bytes", found=len(message))
    word = bytearray(message.ljust(size, b"\0"))
    for block, part in _blocks(len(message), size):
        if part and len(word[block]) > part:
            word[block] = _codec(len(word[block]) - part).encode(word[block][:part])
    return bytes(word)


def decode(word: bytes, count: int, missing: Collection[int] = ()) -> bytes:
    """The message of ``count`` bytes in what was read of its codeword.

    With too many wrong bytes another message comes out with chance about 2**-16 at most, by the two check
    bytes that are kept back for that. Somebody who changes bytes on purpose can bring it about: a code
    corrects, it does not authenticate.

    Args:
        word: as long as the codeword was.
        count: length of the message.
        missing: places of bytes in ``word`` that could not be read, whatever stands there.

    Raises:
        ParameterError: ``count`` or a place is outside the word.
        FormatError: more is wrong than can be corrected.
    """
    if not 0 <= count <= len(word) or not all(0 <= place < len(word) for place in missing):
        raise ParameterError("bad codeword", expected=f"count and places in 0 .. {len(word)}", found=count)
    corrected, lost = bytearray(word), set(missing)
    for block, part in _blocks(count, len(word)):
        read = corrected[block]
        gone = [place for place in range(len(read)) if block.start + place * block.step in lost]
        if part and (gone or len(read) > part):
            corrected[block] = _corrected(read, len(read) - part, gone)
    return bytes(corrected[:count])


def _corrected(read: bytearray, check: int, gone: list[int]) -> bytearray:
    if not gone and _codec(check).encode(read[:-check]) == read:
        return read  # much faster than to find that no byte is wrong
    if len(gone) <= check - RESERVE:
        try:
            right = bytearray(_codec(check).decode(read, erase_pos=gone)[1])
        except ReedSolomonError:
            right = bytearray(byte ^ 1 for byte in read)  # as if all of it had been wrong
        places = set(range(len(read))) - set(gone)
        if 2 * sum(read[place] != right[place] for place in places) + len(gone) <= check - RESERVE:
            return right
    raise FormatError(
        "too many wrong bytes in a codeword",
        expected=f"2 wrong + missing <= {max(0, check - RESERVE)}",
        found=f"{len(gone)} missing, and more wrong than that leaves room for",
        advice="read the mark from a less damaged copy",
    )


def _blocks(count: int, size: int) -> list[tuple[slice, int]]:
    """Which bytes make up each codeword, and how many of them belong to the message."""
    number = max(1, -(-size // BLOCK))
    return [(slice(first, size, number), len(range(first, count, number))) for first in range(number)]


@cache
def _codec(check: int) -> RSCodec:
    return RSCodec(check)
