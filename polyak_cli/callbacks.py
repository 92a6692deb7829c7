"""Keras callbacks that average: one saves checkpoints, the other keeps a mean in memory.

>>> from polyak_cli.callbacks import PolyakCheckpoint                          # doctest: +SKIP
>>> model.fit(x, y, callbacks=[PolyakCheckpoint("ckpts", "latest.h5")])        # doctest: +SKIP

Importing it imports keras, because a callback is a subclass of Keras's; so no other module of the
package imports it.
"""

from polyak_cli.pipeline.callback import PolyakCheckpoint as PolyakCheckpoint
from polyak_cli.pipeline.callback import Settings as Settings
from polyak_cli.pipeline.swa import StochasticWeightAveraging as StochasticWeightAveraging

__all__ = ["PolyakCheckpoint", "Settings", "StochasticWeightAveraging"]
