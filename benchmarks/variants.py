"""asv: users' functions, block masks, additive, Luong, hard and linear attention. Seconds, memory, error."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np

from .suite import Suite

with suppress(ImportError):  # commits before these names have no results
    import nbattn
    from nbattn.cpu import runtime

    from . import cases
    from .variants_cases import Hard, Linear, Modified, Scored, Sparse

with suppress(ImportError):  # by itself: younger than the others
    from nbattn import scores

RULES = ("linear", "gated", "delta", "gated delta")


class Functions(Suite):
    """A score_mod that changes nothing, or a BlockMask."""

    params = ("plain", "causal", "document", "window")
    param_names = ("feature",)

    def setup(self: Any, feature: str) -> None:
        self.case = Modified(8, 1024, feature=feature)
        self.inputs = self.case.inputs()
        self.run = self.case.ours(self.inputs).run
        self.result = self.run()

    def time_attention(self, feature: str) -> None:
        self.run()


class Errors(Suite):
    """How far they are from exact."""

    params = ("window", "softcap", "relative")
    param_names = ("feature",)
    setup = Functions.setup

    def track_error(self: Any, feature: str) -> float:
        """In units of the last place of the largest result."""
        error = cases.largest_error(self.result, self.case.exact(self.inputs))[1]
        return error / float(np.finfo(np.float32).eps)

    track_error.unit = "ulp"  # type: ignore[attr-defined]


class Blocks(Suite):
    """A tenth of the blocks, and a window in a long sequence."""

    params = ("blocks", "window")
    param_names = ("kind",)

    def setup(self, kind: str) -> None:
        self.case = Sparse(1, 16384, window=True) if kind == "window" else Sparse(8, 2048)
        self.run = self.case.ours(self.case.inputs()).run
        self.run()

    def time_attention(self, kind: str) -> None:
        self.run()

    def time_block_mask(self, kind: str) -> None:
        _ = self.case.mask


class Scores(Suite):
    """The score_mods that `nbattn.scores` makes, each made anew: its kernel is found again."""

    def setup(self) -> None:
        rng = np.random.default_rng(1)
        self.x = rng.standard_normal((3, 1, 8, 1024, 64), np.float32)
        self.slopes = 2.0 ** -np.arange(1, 9, dtype=np.float32)
        self.distances = rng.standard_normal((8, 257), np.float32)
        self.buckets = rng.standard_normal((32, 8), np.float32)
        for warm in (self.time_alibi, self.time_relative_position, self.time_t5_bias, self.time_softcap):
            warm()

    def attend(self, score_mod: Any) -> None:
        nbattn.scaled_dot_product_attention(*self.x, score_mod=score_mod)

    def time_alibi(self) -> None:
        self.attend(scores.alibi(self.slopes))

    def time_relative_position(self) -> None:
        self.attend(scores.relative_position(self.distances))

    def time_t5_bias(self) -> None:
        self.attend(scores.t5_bias(self.buckets))

    def time_softcap(self) -> None:
        self.attend(scores.softcap(20.0))


class Additive(Suite):
    """Bahdanau's score."""

    def setup(self) -> None:
        case = Scored(8, 512)
        self.run = case.ours(case.inputs()).run
        self.run()

    def time_attention(self) -> None:
        self.run()


class Luong(Suite):
    params = ("general", "concat")
    param_names = ("score",)

    def setup(self, score: str) -> None:
        case = Scored(8, 512, score=score)
        self.run = case.ours(case.inputs()).run
        self.run()

    def time_attention(self, score: str) -> None:
        self.run()


class OneKey(Suite):
    """Hard attention: the value of the best key."""

    def setup(self) -> None:
        case = Hard(8, 1024)
        self.run = case.ours(case.inputs()).run
        self.run()

    def time_attention(self) -> None:
        self.run()


class _Rules(Suite):
    params = RULES
    param_names = ("rule",)

    def setup(self, rule: str) -> None:
        self.case = Linear(8, 4096, rule=rule)
        self.inputs = self.case.inputs()
        self.run = self.case.ours(self.inputs).run
        self.run()


class Limits(_Rules):
    """How near linear attention is to the processor's rate of multiply-adds."""

    def setup(self, rule: str) -> None:
        cases.check_limits()
        super().setup(rule)

    def track_share_of_peak(self, rule: str) -> float:
        return cases.share_of_limit(self.case, self.inputs, self.run, runtime.threads())

    track_share_of_peak.unit = "1"  # type: ignore[attr-defined]


class LinearAttention(_Rules):
    """A long prompt, and one token after it."""

    def setup(self, rule: str) -> None:
        super().setup(rule)
        *_, decay, beta = token = [None if x is None else x[:, :, :1].copy() for x in self.inputs]
        self.token, self.gates = token[:3], {"decay": decay, "beta": beta}
        _, self.state = nbattn.linear_attention(*self.token, **self.gates, return_state=True)
        self.out = np.empty_like(token[0])

    def time_prompt(self, rule: str) -> None:
        self.run()

    def time_token(self, rule: str) -> None:
        nbattn.linear_attention(
            *self.token, **self.gates, state=self.state, return_state=True, out=(self.out, self.state)
        )


class Memory(Suite):
    """Of the process: a call's own is the difference to the baseline. NumPy's additive formula takes 1 GB."""

    params = ("additive", "linear")
    param_names = ("kind",)

    def setup(self, kind: str) -> None:
        if kind == "linear":
            small, case = Linear(1, 8), Linear(8, 4096)
        else:
            small, case = Scored(1, 8), Scored(8, 512)
        small.ours(small.inputs()).run()
        self.run = case.ours(case.inputs()).run

    def peakmem_baseline(self, kind: str) -> None:
        pass

    def peakmem_attention(self, kind: str) -> None:
        self.run()
