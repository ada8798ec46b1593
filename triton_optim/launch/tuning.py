"""How the update kernel is cut into programs, by GPU architecture; made with `perf/tune.py`."""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """How one launch is cut into programs."""

    block_size: int  # elements that a program holds at once
    num_warps: int
    blocks: int = 1  # that a program updates, one after the other
    num_stages: int = 1  # loads of how many blocks are in flight at once
    eviction: str = ""  # the cache's policy for gradients and state

    @property
    def chunk(self) -> int:
        """Elements that a program updates."""
        return self.block_size * self.blocks


class Pair(NamedTuple):
    """Configs for one architecture."""

    wide: Config
    half: Config  # where parameters, gradients and state are all of 16 bits


# A thread updates 8 elements: more take too many registers. Blocks of 16-bit tensors are larger, so
# that a program moves enough bytes beside its share of the tables.
DEFAULT = Pair(wide=Config(1024, 4), half=Config(2048, 8))
DEFAULT_64_LANES = Pair(wide=Config(1024, 2), half=Config(2048, 4))
# Of launches over gradients alone: longer chunks, because each leaves a partial sum.
GRADS = Pair(wide=Config(1024, 4, blocks=16), half=Config(2048, 8, blocks=8))
GRADS_64_LANES = Pair(wide=Config(1024, 2, blocks=16), half=Config(2048, 4, blocks=8))
# By architecture, such as "sm_90" or "gfx942". On an H100 the wide default was the fastest.
TUNED: dict[str, Pair] = {}


def config(architecture: str, *, half: bool) -> Config:
    """The config of a launch; `half` if everything that it updates is of 16 bits."""
    default = DEFAULT_64_LANES if architecture.startswith("gfx9") else DEFAULT
    pair = TUNED.get(architecture, default)
    return pair.half if half else pair.wide


def grad_config(architecture: str, *, half: bool) -> Config:
    """The config of a launch over gradients alone, of 16 bits or not."""
    pair = GRADS_64_LANES if architecture.startswith("gfx9") else GRADS
    return pair.half if half else pair.wide


PROGRAMS = 2048  # of a launch over rows: some 16 on each of a large GPU's processors
MAX_ROW_BLOCKS = 16
ROW_ELEMENTS = 1024  # of a program with 4 warps of 32 threads, 8 a thread
MAX_BLOCK_ROWS = 128
MAX_ROW_BYTES = 16384  # in the dtype of arithmetic: 4,096 float32, 8 a thread of 16 warps


class RowConfig(NamedTuple):
    """How a launch over rows is cut into programs."""

    block_rows: int  # that a program holds at once
    num_warps: int

    def chunk(self, count: int) -> int:
        """Rows of gradients that a program sums, of `count` in a launch.

        Long chunks leave few partial sums of rows in several chunks; short ones make programs
        enough. It depends on nothing but the count: so does the order of additions.
        """
        blocks = count // (self.block_rows * PROGRAMS)
        return self.block_rows * min(max(blocks, 1), MAX_ROW_BLOCKS)


def row_config(architecture: str, columns: int, *, wide: bool) -> RowConfig:
    """The config of a launch over rows.

    Args:
        architecture: such as "sm_90" or "gfx942".
        columns: the least power of two that is no less than the elements of a row.
        wide: whether elements are loaded several at a time; alone, and of several rows, each takes
            registers of its own.
    """
    elements = ROW_ELEMENTS if wide or columns >= ROW_ELEMENTS else ROW_ELEMENTS // 2
    block_rows = min(max(elements // columns, 1), MAX_BLOCK_ROWS)
    num_warps = min(max(4, 4 * block_rows * columns // elements), 16)
    return RowConfig(block_rows, num_warps // 2 if architecture.startswith("gfx9") else num_warps)
