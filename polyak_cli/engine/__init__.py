"""Fold slabs of many checkpoints into slabs of one or several outputs, in bounded memory.

Knows no format, no scheme and no header: it gets tables of extents and a matrix of coefficients.
The modules, from the bottom up, are `timing`, `slabs`, `constants`, `float8`, `numpy_kernel`,
`compiled_kernel` (its C code is `_kernel.c`), `kernel`, `samples`, `pairs`, `sums`, `inputs`,
`folding`, `sinks`, `shares`, `pools`, `spawned`, `executors` and `clusters`.  `grams` takes inner
products of the same slabs, `running` adds up checkpoints that are in memory, and tools that only
look at tensors use `reading`.
"""
