"""asv: softmax, log_softmax and logsumexp. Seconds, memory, error and the share of a copy's rate."""

from __future__ import annotations

from contextlib import suppress

from .suite import Suite

with suppress(ImportError):  # commits before these names have no results
    import ml_dtypes

    import nbattn
    from nbattn.cpu import runtime

    from . import cases

LENGTH = 1024


class Functions(Suite):
    params = (-1, 0)
    param_names = ("axis",)

    def setup(self, axis: int) -> None:
        self.x = cases.Softmax(LENGTH).inputs()
        self.time_softmax(axis)
        self.time_log_softmax(axis)
        self.time_logsumexp(axis)

    def time_softmax(self, axis: int) -> None:
        nbattn.softmax(self.x, axis)

    def time_log_softmax(self, axis: int) -> None:
        nbattn.log_softmax(self.x, axis)

    def time_logsumexp(self, axis: int) -> None:
        nbattn.logsumexp(self.x, axis)


class Dtypes(Suite):
    params = ("float32", "float64", "float16", "bfloat16")
    param_names = ("dtype",)

    def setup(self, dtype: str) -> None:
        self.x = cases.Softmax(LENGTH).inputs().astype(cases.numpy_dtype(dtype))
        self.result = nbattn.softmax(self.x)

    def time_softmax(self, dtype: str) -> None:
        nbattn.softmax(self.x)

    def track_error(self, dtype: str) -> float:
        """In units of the last place of the largest result."""
        _, relative = cases.largest_error(self.result, cases.Softmax(LENGTH).exact(self.x))
        return relative / float(ml_dtypes.finfo(dtype).eps)

    track_error.unit = "ulp"  # type: ignore[attr-defined]


class Out(Suite):
    """Into memory that is in use already."""

    params = (-1, 0)
    param_names = ("axis",)

    def setup(self, axis: int) -> None:
        self.case = cases.Softmax(LENGTH, axis, out=True)
        self.x = self.case.inputs()
        self.run = self.case.ours(self.x).run
        self.run()

    def time_softmax(self, axis: int) -> None:
        self.run()

    def track_share_of_copy(self, axis: int) -> float:
        return cases.share_of_limit(self.case, self.x, self.run, runtime.threads())

    track_share_of_copy.unit = "1"  # type: ignore[attr-defined]


class Memory(Suite):
    """Of the process: a call's own is the difference to the baseline."""

    def setup(self) -> None:
        self.x = cases.Softmax(LENGTH).inputs()
        nbattn.softmax(self.x[:1])

    def peakmem_baseline(self) -> None:
        pass

    def peakmem_softmax(self) -> None:
        nbattn.softmax(self.x)
