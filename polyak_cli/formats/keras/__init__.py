"""What Keras 3 saves beside plain HDF5 files, and the names that it gives."""
