"""How a Hopper kernel of grouped products is cut: its output's tiles, and what feeds them."""

import dataclasses

from pallas_kernels.flash_attention.gpu_tiles import SHARED

CONSUMERS = 2  # warpgroups that multiply
DEPTH = 64  # of a product between two tiles: as many 16-bit numbers as shared memory swizzles
SUMS = 128 * 256  # of an output tile that the consumers' registers hold


@dataclasses.dataclass(frozen=True)
class Cut:
    """Sizes of one kernel.

    Attributes:
      block_m: rows of an output tile, 64 or 128 for each of the two warpgroups that multiply.
      block_n: columns of an output tile: 64, 128 or 256.
      stages: pairs of tiles in shared memory at once, 3 or more: one is multiplied, one is about to
        be, and with fewer whoever loads would wait for what waits for him.
      pieces: parts of 64 columns in which a finished tile is on its way out at once.
      panel: tiles above each other that are worked on before the next column of tiles, so that
        what they read stays in L2.

    Raises:
      ValueError: sizes that the kernels are not made for.
    """

    block_m: int = 128
    block_n: int = 256
    stages: int = 4
    pieces: int = 2
    panel: int = 16

    def __post_init__(self):
        if self.block_m not in (128, 256) or self.block_n not in (64, 128, 256):
            raise ValueError(
                f"An output tile has 128 or 256 rows and 64, 128 or 256 columns, not "
                f"{self.block_m} and {self.block_n}."
            )
        if self.block_m * self.block_n > SUMS:
            raise ValueError(
                f"Registers hold the sums of 128 rows and 256 columns, not of {self.block_m} and "
                f"{self.block_n}: halve one of them."
            )
        if self.stages < 3 or self.panel < 1:
            raise ValueError(
                f"There must be at least 3 stages and a panel of 1, not {self.stages} and "
                f"{self.panel}."
            )
        if self.pieces not in (1, 2, 4) or self.pieces * 64 > self.block_n:
            raise ValueError(
                f"{self.block_n} columns leave in 1, 2 or 4 pieces of 64, not {self.pieces}."
            )
        if self.shared > SHARED:
            raise ValueError(
                f"{self.stages} stages of tiles of {self.block_m} and {self.block_n} with "
                f"{self.pieces} pieces take {self.shared} bytes of shared memory, of which there "
                f"are {SHARED}: use fewer."
            )

    @property
    def rows(self) -> int:
        """Rows of an output tile that one warpgroup multiplies."""
        return self.block_m // CONSUMERS

    @property
    def shared(self) -> int:
        """Bytes of shared memory: the ring, the pieces, barriers."""
        ring = self.stages * DEPTH * (self.block_m + self.block_n)
        return 2 * (ring + self.pieces * 64 * self.block_m) + 1024
