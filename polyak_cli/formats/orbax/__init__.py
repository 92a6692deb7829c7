"""Checkpoints of Orbax, which JAX and Keras's `OrbaxCheckpoint` write.

`ocdbt` reads the database that holds the values, `zarr` how each array is cut and stored in it,
`contents` decompresses, and `checkpoint` is the format.
"""
