"""Where averaging pays: a small convolutional network on real images, over several seeds.

`experiment` trains and compares, `in_keras` makes a run, and `tables` shows the results.
"""
