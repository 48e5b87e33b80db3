"""Numba kernels for the CPU.

What a door calls has the door's name: `attention`, `hard`, `additive`, `luong`, `linear`, `decode`, `append`
and `softmax`, and for the layers `matvec` (a few rows times a matrix), `products` (many rows) and `rowwise`,
fill the parameters of a kernel (through `records`) and choose the threads. Below them, from what is shared to
what one kernel alone needs:

- `runtime` compiles and keeps kernels, and `team` runs them on several threads, which `handover` reaches
  without Python and `sleeping` puts to sleep; `repeats` makes short calls again, and `arrays` looks at their
  inputs; `emitters` write LLVM code, and `simd` makes intrinsics of them;
- many queries, whose lanes are queries: `blocks` is the kernel, `hard` has its own, and `layout` says where
  they keep things; `queries` is what comes before the softmax, of which `tiles` and `amx` are the products,
  `panels` reads and writes memory for them, and `scores` (with `masks`) makes scores of them; `outputs` is
  how a block ends; `mods` compiles the user's functions, which `functions` translates and `elementary`
  gives their arithmetic;
- `hidden` is the kernel of additive attention, with queries in its lanes too, `recurrence` that of linear
  attention, with columns of values, and `exponentials` that of softmax;
- `quantise` is what `append` makes of a token's rows for caches of 8 and 4 bits;
- few queries over long keys, whose lanes are numbers of a head: `chunks` is the kernel; `dots` are its
  products, `octets` those of int8 and `nibbles` of int4, of what `kinds` reads; for both of these `turned`
  has keys as lanes. `sweeps` says which product takes what, `lookup` finds rows in pages, `rows` sets the
  queries up, `seen` is what `scores` is for the others, `weights` comes after it (and `rounded`, of int4),
  and `aside` is for values that are not finite.
"""
