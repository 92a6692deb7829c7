"""Run work in forked children: with limits, and with JSON as the only thing they send back.

Knows no checkpoint and no tensor.
"""
