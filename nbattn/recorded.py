"""What launches of CUDA graphs read on the GPU of a `PagedKVCache`: their sequences' pages and lengths."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device import DeviceArray
from .store import Places

NOBODY: frozenset[int] = frozenset()


class Recorded(Places):
    """Where the sequences of a launch lie, in memory of a GPU that stays where it is.

    How many there are is fixed, and how many pages each may have; which ones is what was told last. A length
    of -1 is that of nobody: the launch writes nothing, and its outputs are NaN.
    """

    def __init__(self, count: int, width: int, module: ModuleType, stream: int) -> None:
        super().__init__(np.zeros((count, 0), np.int64))
        self.module, self.width = module, width
        # Lengths, then the table's rows.
        self._bytes = np.zeros(count * (8 + 4 * width), np.uint8)
        self._lengths: NDArray[Any] = self._bytes[: 8 * count].view(np.int64)
        self._rows = self._bytes[8 * count :].view(np.int32).reshape(count, width)
        self._memory = memory = module.empty(self._bytes.shape, np.dtype(np.uint8))
        place = memory.device, 0, memory.owner
        self.there = DeviceArray(memory.address, (count,), (8,), np.dtype(np.int64), *place)
        shape, at = (count, width), memory.address + 8 * count
        table = DeviceArray(at, shape, (4 * width, 4), np.dtype(np.int32), *place)
        self.table = table  # type: ignore[assignment]
        self.sequences = NOBODY  # that launches are for now
        self.most = 0  # new positions that a launch writes
        self._known: tuple[tuple[int, ...], int] | None = None  # whose table the GPU has, as of which change
        self.take_back(stream)

    def take_back(self, stream: int) -> None:
        """Have launches be nobody's until `tell`."""
        self._lengths[:] = -1
        self.module.write(self._lengths, self._memory, stream)
        self.sequences = NOBODY

    def tell(
        self,
        handles: tuple[int, ...],
        changes: int,
        table: NDArray[np.int64],
        lengths: NDArray[np.int64],
        stream: int,
    ) -> None:
        """Say whose the next launches are; `table` is as of so many changes of any."""
        known, self._known = self._known, None  # where the copy fails
        self._lengths[:] = lengths
        new = self._lengths
        if known != (handles, changes):
            width, new = min(self.width, table.shape[1]), self._bytes
            self._rows[:, :width] = table[:, :width]
        self.module.write(new, self._memory, stream)
        self._known, self.sequences = (handles, changes), frozenset(handles)
