"""The one stable key hash: event key to partition, map key to reducer.

CRC-32 over the key's UTF-8 bytes, modulo the partition count: the same choice as librdkafka's ``consistent``
partitioner, in C in the standard library, and the same on every platform and in every process.
"""

from zlib import crc32

Key = str | int | bytes
"""What may be a key. An integer hashes as its decimal text, so ``7`` and ``"7"`` share a partition."""


def stable_hash(key: Key) -> int:
    """The key's unsigned 32-bit hash, stable for ever.

    Example:
        >>> stable_hash("user-1") == stable_hash(b"user-1")
        True
    """
    if isinstance(key, bytes):
        return crc32(key)
    return crc32(str(key).encode())


def partition_of(key: Key, partitions: int) -> int:
    """The partition (0-based) that holds ``key`` among ``partitions``.

    Example:
        >>> partition_of(7, 16) == partition_of("7", 16)
        True
    """
    return stable_hash(key) % partitions
