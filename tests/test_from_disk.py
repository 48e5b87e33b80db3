"""Kernels from disk compute what they compute in the process that compiled them.

There a call from one part of a kernel to another may reach a copy compiled by itself; from disk it reaches
the one compiled with its callers, in which LLVM once took a single key's bias of another dtype for -inf.
"""

import os
import subprocess
import sys

PROGRAM = """
import hashlib, itertools
import numpy as np
from nbattn import hard_attention, scaled_dot_product_attention

rng = np.random.default_rng(0)
digest = hashlib.sha256()
features = [{}, {"is_causal": True}, {"softcap": 3.0}, {"alibi_slopes": [0.1, 0.2]}, {"sinks": [0.5, 1.0]}]
features += [{"bias": dtype} for dtype in ("float16", "float32", "float64")] + [{"mask": "bool"}]
for queries, keys, options in itertools.product((1, 3, 70), (1, 2, 17, 130), features):
    q, k, v = (rng.standard_normal((1, 2, n, 9), np.float32) for n in (queries, keys, keys))
    options = {
        name: rng.standard_normal((queries, keys)).astype(x) if isinstance(x, str) else x
        for name, x in options.items()
    }
    got, exact = (
        scaled_dot_product_attention(q, k, v, backend=backend, **options) for backend in ("cpu", "reference")
    )
    np.testing.assert_allclose(got, exact, rtol=0, atol=2e-5, err_msg=f"{queries} {keys} {options}")
    digest.update(got.tobytes())
    if "sinks" not in options:
        for mode in ("argmax", "sample"):
            call = {"mode": mode, "rng": 0, **options}
            got, exact = (hard_attention(q, k, v, backend=b, **call) for b in ("cpu", "reference"))
            np.testing.assert_array_equal(got.index, exact.index, err_msg=f"{queries} {keys} {call}")
print(digest.hexdigest())
"""


def test_same_bits_from_disk(tmp_path):
    environment = {**os.environ, "NBATTN_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        for _ in ("compiles", "loads")
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    assert runs[0].stdout == runs[1].stdout
