"""CUDA kernels for NVIDIA GPUs: attention of prompts and packed sequences, and softmax.

`attention` and `softmax` are what the doors call; they fill the parameters of a kernel and start it. `arrays`
says where arrays lie on which GPU, `launch` compiles, keeps, loads and starts kernels. The kernels: `rows` is
that of softmax, `plain` that of attention with every feature and dtype; `numbers` reads and writes dtypes.
`mma` takes float16 and bfloat16 to tensor cores, by the instructions in `ptx`.
"""
