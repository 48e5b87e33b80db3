"""CUDA kernels for NVIDIA GPUs: attention of prompts, packed sequences and caches, and softmax.

`attention`, `decode`, `append` and `softmax` are what the doors call; they fill a kernel's parameters and
start it. `compiler` makes machine code of kernels and keeps it, `launch` has the driver load and start them.
`exchange` takes and gives arrays of other libraries, `arrays` copies NumPy's there and back, and `sending`
what a cache's calls have on the host, as lengths and page tables.

The kernels:

- `rows` is that of softmax; `plain` that of attention with every feature and dtype, of which `mods` compiles
  the user's functions; `token_kernels` move tokens into caches and out; `numbers` reads and writes dtypes;
- `mma` says which prompts go to tensor cores: to `mma_kernel`, cut as `mma_tiles` says. Its parts are the
  products (`mma_products`, of float32 `mma_split`), `mma_scores` between them, `mma_mend` for values that are
  not finite, and `mma_rows`, which Hopper's has too;
- `hopper` says which of them take a Hopper GPU's own path: `hopper_kernel`, cut as `hopper_tiles` says, with
  its parts `hopper_scores` and `hopper_mend`;
- `decode` says what are few queries over many keys: for `decode_kernel`, cut as `decode_tiles` says. Its
  parts are the products (`decode_products`, of int8 `decode_bytes`, of int4 `decode_nibbles`, of float32
  `decode_floats`) and `decode_merge`; `workspace` is the memory that its blocks share. `decode_steps` makes
  later calls of a cache short.

The last three are written in instructions of `ptx`, with those for bytes of `ptx_bytes`, and of `ptx_hopper`.
`ptx_lines` makes functions of them.
"""
