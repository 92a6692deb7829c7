"""Open, read and write the bytes of files; publish outputs whole or not at all.

Knows no format and no tensor.
"""
