"""Fold slabs of many checkpoints into slabs of one or several outputs, in bounded memory.

Knows no format, no scheme and no header: it gets tables of extents and a matrix of coefficients.
The modules, from the bottom up, are `timing`, `slabs`, `float8`, `numpy_kernel`, `compiled_kernel`
(its C code is `_kernel.c`), `kernel`, `products`, `inputs`, `folding`, `executors`, `shares` and
`clusters`; tools that only look at tensors use `reading`.
"""
