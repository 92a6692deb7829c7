"""Options of the stages around an average: health, recalibration, and a whole model for weights.

Knows which options contradict one another.  Does not know how a stage is carried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from polyak_cli import checkpoints
from polyak_cli.averaging import options as averaging_options
from polyak_cli.averaging import schemes
from polyak_cli.averaging.options import Settings, Source
from polyak_cli.averaging.planning import Plan
from polyak_cli.errors import UsageError

if TYPE_CHECKING:  # what knows of Keras is imported where it is asked for
    from polyak_cli.evaluation.data import Split
    from polyak_cli.evaluation.recalibration import Gathering
    from polyak_cli.evaluation.user_code import Maker


class Options(averaging_options.Options, total=False):
    """The options of `plan`, `average` and `watch`; every one may be left out.

    Attributes:
        on_unhealthy: "fail" or "skip": `check` the chosen checkpoints first, and refuse them if
            anything is wrong, or average only those that are healthy; None (the default): do not.
        recalibrate: rows on which the average's BatchNorm statistics are computed again; see the
            function `recalibrate`.
        batch_size: the largest number of these rows in a batch; 256.
        trust_code: to recalibrate, run the code that the model carries in a Lambda layer.
        model: the architecture of checkpoints that hold weights only, to recalibrate their average;
            as for `evaluate`.  Without ``recalibrate``, a ``.keras`` of the same model, which an
            output in ``.keras`` is like.
        device: to recalibrate, where PyTorch runs a module; by default a GPU where there is one.
    """

    on_unhealthy: Literal["fail", "skip"] | None
    recalibrate: Split | None
    batch_size: int | None
    trust_code: bool
    model: Maker | None
    device: str | None


@dataclass(frozen=True, slots=True)
class Stages:
    """What happens around an average; its fields hold the only defaults."""

    on_unhealthy: Literal["fail", "skip"] | None = None
    recalibrate: Split | None = None
    batch_size: int = 256  # rows that a model is run on at a time
    trust_code: bool = False
    model: Maker | None = None  # whose layers run the average of weights
    device: str | None = None

    @property
    def architecture(self) -> str | None:
        """Return the model as a text, which may name a file or a function."""
        if self.model is None:
            return None
        from polyak_cli.evaluation import user_code

        return user_code.name_source(self.model)

    @property
    def gathering(self) -> Gathering | None:
        """Return how BatchNorm's statistics are gathered; None if they are not."""
        if self.recalibrate is None:
            return None
        from polyak_cli.evaluation.recalibration import Gathering

        return Gathering(
            self.recalibrate, self.batch_size, self.trust_code, self.architecture, self.device
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """What a plan keeps for its stages: their options, and what an error's advice comes from."""

    stages: Stages
    sources: Source | Sequence[Source] | checkpoints.Selection
    chosen: checkpoints.Selection
    can_skip: bool  # --on-unhealthy skip can be added to the options


def parse_options(options: Options) -> tuple[Settings, Stages]:
    """Check options by themselves, before there is a checkpoint, and return them in parts.

    Raises:
        TypeError: there is no such option.
        UsageError: names the option and what it takes.
    """
    own = {one.name for one in fields(Stages)}
    core: Any = {key: value for key, value in options.items() if key not in own}
    settings = averaging_options.parse(core)
    averaging_options.check_whole_numbers(options, ["batch_size"])
    averaging_options.check_choice(options, "on_unhealthy", ("fail", "skip"))
    stages = averaging_options.fill(Stages, options)
    if stages.on_unhealthy and settings.tensors.use_ema:
        raise UsageError(
            "--on-unhealthy checks the model's own tensors, not the EMAs of --use-ema; leave out "
            "one of the two"
        )
    if stages.on_unhealthy and schemes.takes_running_means(settings.weighting.scheme):
        raise UsageError(
            f"--on-unhealthy examines the weights of a run, and --scheme {options['scheme']} takes "
            "running means of them; leave out one of the two"
        )
    for key in ("batch_size", "trust_code", "device"):
        if options.get(key) and stages.recalibrate is None:
            raise UsageError(
                f"--{key.replace('_', '-')} belongs to --recalibrate, which is missing"
            )
    return settings, stages


def stages_of(plan: Plan) -> Stages:
    """Return the options of the stages; a plan that was made without any has the defaults."""
    return plan.stages.stages if isinstance(plan.stages, Planned) else Stages()
