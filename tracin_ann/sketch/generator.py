"""Random numbers of the sketches: Philox streams with keys (seed, checkpoint, parameter, role).

The generator is counter-based, so any position of a stream can be read directly. The numbers are generated on
the CPU by numpy's Philox4x64-10 (Salmon et al., SC 2011) and copied to the device, so all devices use the same numbers.
The raw output of this generator is the same in all numpy versions. The key is a hash of its parts; seeds are not added.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tracin_ann.types import Float32, Int64

_WORDS_PER_COUNTER = 4
_BITS_PER_WORD = 64


@dataclass(frozen=True)
class Stream:
    """A stream of random numbers with a key; equal keys give equal numbers."""

    seed: int
    checkpoint: int
    parameter: str
    role: str

    def words(self, start: int, count: int) -> npt.NDArray[np.uint64]:
        """Return raw 64-bit words, uint64 [count], from position `start`."""
        first, skip = divmod(start, _WORDS_PER_COUNTER)
        name = "\x1f".join((str(self.seed), str(self.checkpoint), self.parameter, self.role))
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16, person=b"tracin_ann").digest(), "little")
        generator = np.random.Philox(key=key, counter=first)
        return generator.random_raw(skip + count)[skip:]

    def signs(self, start: int, count: int) -> npt.NDArray[np.int8]:
        """Return independent signs ±1, int8 [count], from position `start`; each uses one bit of the stream."""
        first, skip = divmod(start, _BITS_PER_WORD)
        n_words = -(-(skip + count) // _BITS_PER_WORD)
        packed = self.words(first, n_words).astype("<u8", copy=False).view(np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[skip : skip + count]
        return (bits.astype(np.int8) << 1) - 1

    def gaussians(self, start: int, count: int) -> Float32:
        """Return independent N(0, 1), float32 [count], from position `start` (Box and Muller, 1958)."""
        first, skip = divmod(start, 2)
        pairs = -(-(skip + count) // 2)
        raw = self.words(2 * first, 2 * pairs)
        uniform = ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[0::2]))
        angle = 2.0 * np.pi * uniform[1::2]
        normal = np.empty(2 * pairs)
        normal[0::2] = radius * np.cos(angle)
        normal[1::2] = radius * np.sin(angle)
        return normal[skip : skip + count].astype(np.float32)

    def integers(self, start: int, count: int, bound: int) -> Int64:
        """Return independent integers in [0, bound), int64 [count], from position `start`: each a word modulo bound."""
        return (self.words(start, count) % np.uint64(bound)).astype(np.int64)

    def integer(self, bound: int) -> int:
        """Return one integer in [0, bound): the first word of the stream modulo bound."""
        return int(self.integers(0, 1, bound)[0])
