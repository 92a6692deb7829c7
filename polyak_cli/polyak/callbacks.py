"""`polyak.callbacks`: the Keras callbacks of `polyak_cli.callbacks` under the short name."""

from polyak_cli.callbacks import PolyakCheckpoint as PolyakCheckpoint
from polyak_cli.callbacks import Settings as Settings
from polyak_cli.callbacks import StochasticWeightAveraging as StochasticWeightAveraging

__all__ = ["PolyakCheckpoint", "Settings", "StochasticWeightAveraging"]
