"""Run work in other processes: forked children with limits, which send back nothing but JSON.

Modules of the package can be started in processes of their own too (`modules`).  Knows no
checkpoint and no tensor.
"""
