"""TensorFlow's checkpoints: an index that is a table of strings, and shards of bytes.

TensorFlow has no part in reading them.
"""
