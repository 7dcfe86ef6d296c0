"""Keys of payloads: which objects of a store are payloads, and which payloads the bytes of others may refer to."""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime

_CONTENT = r"sha256/[0-9a-f]{2}/[0-9a-f]{62}(?:\.[0-9a-f]{12})?(?:\.zst)?"
_EXPIRING = rf"expiring/\d{{4}}-\d\d-\d\d/{_CONTENT}"
_ATTEMPT = r"attempts/[A-Za-z0-9_.\-=/]+"
_PAYLOAD = re.compile(rf"{_CONTENT}|{_EXPIRING}|{_ATTEMPT}")
# In the text of others a slash may be escaped, also more than once.
_CONTENT_IN = re.compile(rb"sha256\\*/([0-9a-f]{2})\\*/([0-9a-f]{62})(\.[0-9a-f]{12})?(\.zst)?")
_ATTEMPTS_IN = re.compile(rb"attempts\\*/")
_ATTEMPT_IN = re.compile(rb"[A-Za-z0-9_.\-=/\\]{1,2000}")


def goes_at(key: str) -> float | None:
    """From when on, in seconds since 1970, a payload may go though it is named; None if the key is no payload's.

    0 if it never goes by time alone.
    """
    if not _PAYLOAD.fullmatch(key):
        return None
    if not key.startswith("expiring/"):
        return 0.0
    try:
        return datetime.strptime(f"{key.split('/')[1]}+0000", "%Y-%m-%d%z").timestamp()
    except ValueError:
        return None


def keys_in(held: bytes, attempt_lengths: Sequence[int] = ()) -> Iterator[str]:
    """All that may be a key of a payload in these bytes, wherever it stands; it may be more than was meant.

    What follows a key may look like more of it, so all that may be meant are named.

    Args:
        held: the bytes of somebody who keeps references.
        attempt_lengths: the lengths of keys below ``attempts/`` to look for.

    Example:
        >>> sorted(key[-8:] for key in keys_in(b"s3://b/sha256/ab/" + b"c" * 62 + b".zst, and more"))
        ['cccc.zst', 'cccccccc']
    """
    for found in _CONTENT_IN.finditer(held):
        head, stem, own, suffix = (part.decode() for part in found.groups(b""))
        key = f"sha256/{head}/{stem}"
        yield from {key, key + own, key + own + suffix}
    if attempt_lengths:
        # One may stand inside another: where a store lies may have such a name, too.
        for start in _ATTEMPTS_IN.finditer(held):
            whole = _ATTEMPT_IN.match(held, start.start())
            text = whole[0].replace(b"\\", b"").decode() if whole else ""
            yield from (text[:length] for length in attempt_lengths if length <= len(text))


def mentions_in(held: bytes) -> Iterator[bytes]:
    """What in these bytes `keys_in` would look at: all of it that has to be kept to keep what they refer to."""
    if b"sha256" in held:
        yield from (found[0] for found in _CONTENT_IN.finditer(held))
    if b"attempts" in held:
        for start in _ATTEMPTS_IN.finditer(held):
            whole = _ATTEMPT_IN.match(held, start.start())
            if whole is not None:
                yield whole[0]
