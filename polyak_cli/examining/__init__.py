"""Tools that look at checkpoints without a model: inspect, diff, check, geometry and verify.

Each module here is one tool or one part that several of them share.  None of them runs a model,
and none writes anything except the scratch copy that `verify` compares with.
"""
