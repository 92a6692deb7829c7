"""Slabs of many checkpoints -> slabs of one or several outputs, in processes and flat memory.

Knows no format, no scheme and no header: it gets tables of extents and a matrix of coefficients.
The modules, from the bottom up: `timing`, `slabs`, `kernel`, `inputs`, `folding`, `executors`; and
`reading` for tools that only look.
"""
