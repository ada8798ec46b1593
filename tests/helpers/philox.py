"""Philox 4x32 in plain Python (Salmon, Moraes, Dror and Shaw 2011)."""

from __future__ import annotations

WORD = 2**32


def philox(counter: tuple[int, int, int, int], key: int, rounds: int) -> tuple[int, int, int, int]:
    """Four words of 32 bits of a counter of four and a key of 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key % WORD, key // WORD
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b // WORD ^ c1 ^ k0, b % WORD, a // WORD ^ c3 ^ k1, a % WORD
        k0, k1 = (k0 + 0x9E3779B9) % WORD, (k1 + 0xBB67AE85) % WORD
    return c0, c1, c2, c3
