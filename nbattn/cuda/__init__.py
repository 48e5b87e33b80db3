"""CUDA kernels for NVIDIA GPUs: attention of prompts, packed sequences and caches, and softmax.

`attention`, `decode`, `append` and `softmax` are what the doors call; they fill a kernel's parameters and
start it. `compiler` makes machine code of kernels and keeps it, `launch` has the driver load and start them.
`exchange` takes and gives arrays of other libraries, `arrays` copies NumPy's there and back.

The kernels: `rows` is that of softmax, `plain` that of attention with every feature and dtype; `numbers`
reads and writes dtypes. `mma` says what goes to tensor cores: to `mma_kernel` with its parts `mma_products`,
`mma_split` (products of float32), `mma_scores` and `mma_mend`, cut as `mma_tiles` says, in instructions of
`ptx`; `hopper` and its parts are the same for Hopper GPUs, in those of `ptx_hopper` too. `decode` likewise
says what are few queries over many keys, for `decode_kernel` with its parts `decode_products`,
`decode_bytes` and `decode_merge`, cut as `decode_tiles` says; `workspace` is the memory that its blocks
share. `token_kernels` move tokens into caches and out.
"""
