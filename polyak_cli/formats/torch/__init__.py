"""PyTorch's zip archives and the pickles in them.

Neither torch nor Python's unpickler has a part in reading them.
"""
