"""Where averaging pays: a small convolutional network on real images, over several seeds.

`experiment` trains and compares, `in_keras` and `in_torch` are the two makers of a run, and
`tables` shows the results of both.
"""
