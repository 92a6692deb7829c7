"""Read and write HDF5 files of Keras; nothing here is imported before it is needed."""

import os

# A file may name a filter plugin, which libhdf5 would then load and run: this turns plugins off.
# It is read when the library starts; here it stands before every import of h5py.
os.environ.setdefault("HDF5_PLUGIN_PRELOAD", "::")
