"""Read and write what Keras 3 saves besides plain HDF5 files, and explain its names."""
