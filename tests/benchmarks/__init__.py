"""What averaging costs, measured beside what people would use instead; run by `make bench`.

Nothing here is collected by pytest.  The process that measures imports the standard library only:
on Linux a child inherits the peak memory of the process that started it, so numpy, h5py and
matplotlib live in processes of their own, or are imported when all is measured.
"""
