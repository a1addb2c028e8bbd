"""What hf_xet leaves in a local content-addressed store: which xet hash holds which SHA-256."""

import struct
from pathlib import Path

BLOCK = 48
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30


def hash_hex(raw: bytes) -> str:
    """A xet hash is written as four little-endian words."""
    return "".join(raw[start : start + 8][::-1].hex() for start in range(0, 32, 8))


def stored_files(store: Path) -> dict[str, str]:
    """SHA-256 -> xet hash of every file that the store's shards describe."""
    shards = (store / "xet" / "xorbs" / "shards").glob("*.mdb")
    return {sha256: xet for shard in shards for sha256, xet in files_of_shard(shard.read_bytes())}


def files_of_shard(shard: bytes) -> list[tuple[str, str]]:
    """(SHA-256, xet hash) of a shard's files; they follow its header and end with a block of ones."""
    found, at = [], BLOCK
    while shard[at : at + 32] != b"\xff" * 32:
        xet = hash_hex(shard[at : at + 32])
        flags, entries = struct.unpack_from("<II", shard, at + 32)
        at += BLOCK * (1 + entries * (2 if flags & HAS_VERIFICATION else 1))
        if flags & HAS_METADATA:
            found.append((hash_hex(shard[at : at + 32]), xet))
            at += BLOCK
    return found
