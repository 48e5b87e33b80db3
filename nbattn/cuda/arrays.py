"""NumPy's arrays on a GPU for the time of a call."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device import DeviceArray
from . import launch


class Copies(ExitStack):
    """NumPy arrays on a GPU for the time of one call: sent there, and results fetched.

    On the current GPU unless another is named.
    """

    def __init__(self, ordinal: int | None = None) -> None:
        super().__init__()
        self.device = launch.device(launch.current_device() if ordinal is None else ordinal)
        self.stream = 0
        self._results: list[tuple[NDArray[Any], DeviceArray]] = []

    def __enter__(self) -> Copies:
        super().__enter__()
        self.enter_context(self.device.current())
        return self

    def send(self, array: Any) -> Any:
        """A copy of the array on the GPU; axes that are broadcast stay so. What is there already, and None,
        are themselves.
        """
        if array is None or type(array) is DeviceArray:
            return array
        once = array[tuple(slice(1 if stride == 0 else None) for stride in array.strides)]
        once = np.ascontiguousarray(once).reshape(once.shape)
        there = self._room(once)
        if once.size:
            launch.ask("cuMemcpyHtoDAsync_v2", there.address, once.ctypes.data, once.nbytes, self.stream)
        strides = tuple(0 if s == 0 else t for s, t in zip(array.strides, once.strides, strict=True))
        return DeviceArray(
            there.address, array.shape, strides, array.dtype, self.device.ordinal, self.stream, once
        )

    def receive(self, array: NDArray[Any] | None) -> Any:
        """Room on the GPU for what `array` is to hold when the call ends. None for None."""
        if array is None:
            return None
        there = self._room(np.empty(array.shape, array.dtype))
        self._results.append((array, there))
        return there

    def _room(self, like: NDArray[Any]) -> DeviceArray:
        address = self.enter_context(launch.room(self.device, like.nbytes, self.stream))
        return DeviceArray(address, like.shape, like.strides, like.dtype, self.device.ordinal, self.stream)

    def __exit__(self, *error: Any) -> Any:
        try:
            if error[0] is None:
                self._fetch()
        finally:
            super().__exit__(*error)

    def _fetch(self) -> None:
        here = [(array, np.empty(array.shape, array.dtype), there) for array, there in self._results]
        for _, copy, there in here:
            if copy.size:
                launch.ask("cuMemcpyDtoHAsync_v2", copy.ctypes.data, there.address, copy.nbytes, self.stream)
        launch.ask("cuStreamSynchronize", self.stream)
        for array, copy, _ in here:
            array[...] = copy
