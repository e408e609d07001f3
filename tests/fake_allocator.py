"""The allocator of a GPU that is not there, after torch's own."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment; those of one segment are linked."""

    pool: list[tuple[int, int, Block]]  # of the free ones: size, address
    address: int
    nbytes: int
    before: Block | None = None
    after: Block | None = None
    is_free: bool = False


class Allocator:
    """torch's caching allocator: the free block that fits best, cut from a segment of 2 MiB, 20 MiB or what is needed.

    Source: c10/cuda/CUDACachingAllocator.cpp, without its options.
    """

    def __init__(self) -> None:
        self.allocated = self.peak = 0
        self.reserved = self.reserved_peak = 0
        self.pools: tuple[list[tuple[int, int, Block]], list[tuple[int, int, Block]]] = [], []
        self._addresses = 0

    def allocate(self, nbytes: int) -> Block:
        """Take a block: of whole 512 bytes, and up to 1 MiB more in a segment of large ones."""
        nbytes = -(-nbytes // 512) * 512
        is_small = nbytes <= 1 << 20
        pool = self.pools[0 if is_small else 1]
        place = bisect.bisect_left(pool, nbytes, key=lambda entry: entry[0])
        if place < len(pool):
            block = pool.pop(place)[2]
        else:
            segment = 2 << 20 if is_small else 20 << 20 if nbytes < 10 << 20 else -(-nbytes // (2 << 20)) * (2 << 20)
            block = Block(pool, self._addresses, segment)
            self._addresses += segment
            self.reserved += segment
            self.reserved_peak = max(self.reserved_peak, self.reserved)
        block.is_free = False
        left = block.nbytes - nbytes
        if left >= 512 if is_small else left > 1 << 20:
            rest = Block(pool, block.address + nbytes, left, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.nbytes, block.after = nbytes, rest
            self._keep(rest)
        self.allocated += block.nbytes
        self.peak = max(self.peak, self.allocated)
        return block

    def free(self, block: Block) -> None:
        """Give a block back; it becomes one with what is free on either side."""
        self.allocated -= block.nbytes
        first, second = block.before, block.after
        if second is not None and second.is_free:
            self._join(block, second)
        if first is not None and first.is_free:
            self._join(first, block)
            block = first
        self._keep(block)

    def release(self) -> None:
        """Give segments back that are free: `torch.cuda.empty_cache()`."""
        for pool in self.pools:
            whole = [entry for entry in pool if entry[2].before is None and entry[2].after is None]
            pool[:] = [entry for entry in pool if entry not in whole]
            self.reserved -= sum(nbytes for nbytes, _, _ in whole)

    def pop_peak(self) -> int:
        """Return the most bytes allocated since this was last asked, as `torch.cuda.max_memory_allocated` counts."""
        peak, self.peak = self.peak, self.allocated
        return peak

    @contextlib.contextmanager
    def private_pool(self) -> Iterator[None]:
        """Take blocks from segments of their own meanwhile, as a CUDA graph does."""
        pools, self.pools = self.pools, ([], [])
        try:
            yield
        finally:
            self.pools = pools

    def _join(self, block: Block, following: Block) -> None:
        for one in (block, following):
            if one.is_free:
                one.pool.remove((one.nbytes, one.address, one))
        block.nbytes += following.nbytes
        block.after = following.after
        if block.after is not None:
            block.after.before = block

    def _keep(self, block: Block) -> None:
        block.is_free = True
        bisect.insort(block.pool, (block.nbytes, block.address, block))
