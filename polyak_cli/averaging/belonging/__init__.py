"""Decide what belongs together: which checkpoints are of one run, which tensors are like with like.

Each module has one subject.  What they know is refused, and what they suspect is said; none of them
opens a file or reads a value itself.
"""
