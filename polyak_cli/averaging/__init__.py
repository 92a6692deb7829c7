"""Average checkpoints: options, plan, fates of tensors, writing, and the record of it.

Opens no model and knows no file format; nothing here imports a framework.
"""
