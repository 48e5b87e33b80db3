"""What a user would pick instead for the variants: methods for the libraries in `rivals.py`."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cases import SOFTCAP, WINDOW, Call
from .variants_cases import CHUNK, Hard, Linear, LinearInputs, Modified, ModInputs, Scored, ScoreInputs

SPINS = 0.12
"""Seconds that OpenBLAS's threads spin."""


class FlexVariants:
    """`flex_attention`, compiled ahead for each row, which takes a minute; then it is found in a cache."""

    def modified(self: Any, case: Modified, inputs: ModInputs) -> dict[str, Call]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        extra = self.tensor(inputs.extra)
        middle = case.length - 1
        mod = {
            "alibi": lambda score, b, h, i, j: score + extra[h] * (j - i),
            "softcap": lambda score, b, h, i, j: SOFTCAP * self.torch.tanh(score / SOFTCAP),
            "relative": lambda score, b, h, i, j: score + extra[j - i + middle],
        }.get(case.feature)
        see = {
            "causal": lambda b, h, i, j: j <= i,
            "window": lambda b, h, i, j: (j <= i) & (i - j < WINDOW),
            "document": lambda b, h, i, j: extra[i] == extra[j],
        }.get(case.feature)
        options: dict[str, Any] = {} if mod is None else {"score_mod": mod}
        if see is not None:
            options["block_mask"] = create_block_mask(see, None, None, case.length, case.length, device="cpu")
        self.torch.compiler.reset()
        compiled = self.torch.compile(flex_attention, dynamic=False)
        return {self.name: Call(partial(compiled, *map(self.tensor, inputs[:3]), **options), self.array)}


class TorchVariants:
    """The formulas in PyTorch's operations; linear attention chunk by chunk."""

    def scored(self: Any, case: Scored, inputs: ScoreInputs) -> dict[str, Call]:
        q, k, value, (w_query, w_key), v = map(self.tensor, inputs)

        def attend() -> Any:
            if case.score == "general":
                scores = q @ (k @ w_key.T).transpose(-1, -2)
            else:
                hidden = (q @ w_query.T)[:, :, :, None] + (k @ w_key.T)[:, :, None]
                scores = hidden.tanh_() @ v
            return scores.softmax(-1) @ value

        return {self.name: Call(attend, self.array)}

    def hard(self: Any, case: Hard, inputs: ModInputs) -> dict[str, Call]:
        q, k, v = map(self.tensor, inputs[:3])

        def attend() -> Any:
            best = (q @ k.transpose(-1, -2)).argmax(-1, keepdim=True)
            return v.gather(2, best.expand(*best.shape[:3], v.shape[3]))

        return {self.name: Call(attend, self.array)}

    def linear(self: Any, case: Linear, inputs: LinearInputs) -> dict[str, Call]:
        """What can be done for all chunks at once is; only the states go one by one, where they must."""
        torch, n = self.torch, min(CHUNK, case.length)
        if case.length % n:
            return {}
        q, k, v, decay, beta = (
            None if x is None else self.tensor(x[0]).unflatten(1, (-1, n)) for x in inputs
        )  # (H, chunks, n, ...)
        lower, eye = torch.ones(n, n).tril(), torch.eye(n)
        scale = case.head_dim**-0.5

        def attend() -> Any:
            mine = (q * scale) @ k.transpose(-1, -2) * lower
            reading, writing, adding, keep = q * scale, k, v, None
            if decay is not None:
                total = decay.cumsum(-1)
                ratio = (total[..., None] - total[..., None, :]).clamp(max=0).exp_()
                mine = mine * ratio
                reading = reading * total.exp()[..., None]
                writing = k * ratio[..., -1, :, None]
                keep = total[..., -1].exp()
            if beta is not None:  # the WY form: what is added is `adding - replacing @ state`
                overlap = (k * beta[..., None]) @ k.transpose(-1, -2)
                asked = k
                if decay is not None:
                    overlap, asked = overlap * ratio, k * total.exp()[..., None]
                rates = beta[..., None]
                both = torch.cat((rates * v, rates * asked), -1)
                solved = torch.linalg.solve_triangular(
                    overlap.tril(-1) + eye, both, upper=False, unitriangular=True
                )
                adding, replacing = solved.split([v.shape[-1], k.shape[-1]], -1)
            if beta is None and decay is None:
                each = writing.transpose(-1, -2) @ adding
                states = each.cumsum(1) - each
            else:
                state, kept, writes = torch.zeros(len(k), k.shape[-1], v.shape[-1]), [], []
                for c in range(k.shape[1]):
                    kept.append(state)
                    new = adding[:, c] if beta is None else adding[:, c] - replacing[:, c] @ state
                    writes.append(new)
                    old = state if keep is None else keep[:, c, None, None] * state
                    state = torch.baddbmm(old, writing[:, c].transpose(-1, -2), new)
                states, adding = torch.stack(kept, 1), torch.stack(writes, 1)
            return (mine @ adding + reading @ states).flatten(1, 2)[None]

        return {self.name: Call(attend, self.array)}


class NumPyVariants:
    """The formulas by broadcasting; linear attention token by token."""

    def scored(self: Any, case: Scored, inputs: ScoreInputs) -> dict[str, Call]:
        q, k, value, (w_query, w_key), v = inputs

        def attend() -> NDArray[Any]:
            if case.score == "general":
                scores = q @ (k @ w_key.T).swapaxes(-1, -2)
            else:
                scores = np.tanh((q @ w_query.T)[:, :, :, None] + (k @ w_key.T)[:, :, None]) @ v
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            return weights @ value / weights.sum(axis=-1, keepdims=True)

        return {self.name: Call(attend, np.asarray, settle=SPINS)}

    def hard(self: Any, case: Hard, inputs: ModInputs) -> dict[str, Call]:
        q, k, v = inputs[:3]

        def attend() -> NDArray[Any]:
            best = (q @ k.swapaxes(-1, -2)).argmax(axis=-1)
            return np.take_along_axis(v, best[..., None], axis=2)

        return {self.name: Call(attend, np.asarray, settle=SPINS)}

    def linear(self: Any, case: Linear, inputs: LinearInputs) -> dict[str, Call]:
        q, k, v, decay, beta = (None if x is None else x[0] for x in inputs)
        scale = np.float32(case.head_dim**-0.5)

        def attend() -> NDArray[Any]:
            state = np.zeros((case.heads, case.head_dim, case.head_dim), np.float32)
            out = np.empty_like(q)
            kept = None if decay is None else np.exp(decay)[..., None, None]
            for t in range(case.length):
                if kept is not None:
                    state *= kept[:, t]
                new = v[:, t, None]
                if beta is not None:
                    new = beta[:, t, None, None] * (new - k[:, t, None] @ state)
                state += k[:, t, :, None] * new
                out[:, t] = (q[:, t, None] @ state)[:, 0]
            return (out * scale)[None]

        return {self.name: Call(attend, np.asarray, settle=SPINS)}
