"""Options of the commands: classes that extend click, and options that several commands share.

Knows how options look on the command line.  What their values mean, the tools know.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from polyak_cli.cli.lists import expand_lists
from polyak_cli.errors import redact, shown

if TYPE_CHECKING:  # its module imports numpy, which --help does not need
    from polyak_cli.averaging.schemes import Parameter

#: Exit codes; besides these, 3 for what failed and 2 for wrong usage: see `polyak_cli.cli`.
DONE, ANSWER_IS_NO = 0, 1

# --- extensions of click --------------------------------------------------------------------------


class GroupedOption(click.Option):
    """An option that stands under a heading of the help text."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


#: How alike two names are, from 0 to 1, if one may be a slip of the other: ``--lsat``, ``--last``.
_CLOSE = 0.75

#: How a help text ends: a line to paste, and the page of the guide.
EXAMPLE = "\b\nExample:\n  {}\n\n{}"


class Command(click.Command):
    """A command whose help has headings, its formats, an example to paste, and its guide page.

    Attributes:
        serves: which formats and frameworks it serves; one of `serving`.
        guide: the topic of the page, for `polyak guide TOPIC`.
    """

    #: The key of the command line in the context's meta data.
    LINE = "polyak_cli.command_line"

    def __init__(self, *args: Any, example: str, serves: str, guide: str, **kwargs: Any) -> None:
        self.serves, self.guide = serves, guide
        last = EXAMPLE.format(example, f"Guide: polyak guide {guide}")
        kwargs["epilog"] = f"Formats: {serves}\n\n{last}"
        kwargs.setdefault("context_settings", {"show_default": True, "max_content_width": 100})
        super().__init__(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the command line, to be written into a report, and parse it; replace URLs."""
        ctx.meta[self.LINE] = redact(shlex.join([*ctx.command_path.split(), *args]))
        rest = self._parse_args(ctx, args)
        for parameter in self.params:
            name, value = parameter.name or "", ctx.params.get(parameter.name or "")
            if isinstance(parameter.type, click.Path) and isinstance(value, tuple):
                ctx.params[name] = tuple(_enter(parameter, path) for path in value)
            elif isinstance(parameter.type, click.Path):
                ctx.params[name] = _enter(parameter, value)
        return rest

    def _parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; an unknown option names one that exists only if it is very close."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from difflib import get_close_matches  # only a mistaken option needs it

            near = get_close_matches(error.option_name, error.possibilities or (), 1, _CLOSE)
            raise click.NoSuchOption(error.option_name, possibilities=near, ctx=ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, a section for each group, in the order of declaration."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "group", "Help"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


class Readable(click.Path):
    """The name of something that is read, which may be a URL; other paths must be local."""


class Writable(click.Path):
    """The name of something that is written, which may be a URL; its tool resolves it."""


def _enter(parameter: click.Parameter, path: Any) -> Any:
    """Return the local name of what a URL names; what is none is not looked at closely."""
    if not isinstance(path, str) or ":/" not in path or isinstance(parameter.type, Writable):
        return path
    from polyak_cli import checkpoints  # imports numpy, which --help does not need

    if isinstance(parameter.type, Readable):
        return checkpoints.enter(path)
    checkpoints.refuse_url(path, parameter.get_error_hint(click.get_current_context(silent=True)))
    return path


class Size(click.ParamType[Any]):
    """A number of bytes as people write it: 64MB, 1GiB, 1000000."""

    name = "SIZE"
    units: Mapping[str, int] = {
        "": 1, "b": 1,
        "k": 10**3, "kb": 10**3, "kib": 1 << 10,
        "m": 10**6, "mb": 10**6, "mib": 1 << 20,
        "g": 10**9, "gb": 10**9, "gib": 1 << 30,
    }  # fmt: skip

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        unit = text.lstrip("0123456789.")
        try:
            return int(float(text[: len(text) - len(unit)]) * self.units[unit.strip()])
        except (KeyError, ValueError, OverflowError):
            self.fail(f"{shown(value)} is not a size; write it like 64MB or 1GiB", param, ctx)


class Numbers(click.ParamType[Any]):
    """Numbers with commas between them."""

    name = "A,B,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Return the numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"{shown(value)} is not a list of numbers; write it like 0.5,0.3,0.2", param, ctx
            )


class Gate(click.ParamType[Any]):
    """A metric and the minimum that it must reach."""

    name = "METRIC=VALUE"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, float]:
        """Return the metric and the value."""
        if isinstance(value, tuple):
            return value
        name, _, number = str(value).partition("=")
        try:
            least = float(number)
        except ValueError:
            least = math.nan
        if not name.strip() or not math.isfinite(least):
            self.fail(
                f"{shown(value)} is not a metric with its minimum; write it like accuracy=0.8",
                param,
                ctx,
            )
        return name.strip(), least


def under(group: str, *declared: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[Any], Any]:
    """Return a decorator that adds options under one heading."""

    def decorate(function: Any) -> Any:
        for names, settings in reversed(declared):
            function = click.option(*names, cls=GroupedOption, group=group, **settings)(function)
        return function

    return decorate


def option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Declare an option, as `click.option` would, to be put under a heading."""
    return names, settings


# --- options of several commands ------------------------------------------------------------------

SOURCES = click.argument(
    "sources",
    nargs=-1,
    required=True,
    metavar="SOURCE...",
    type=Readable(),
    callback=expand_lists,
)
LAST = option("--last", type=int, metavar="N", help="Use only the N newest.  [default: all]")
FROM = option("--from", "from_epoch", type=int, metavar="EPOCH", help="The first epoch to use.")
TO = option("--to", "to_epoch", type=int, metavar="EPOCH", help="The last epoch to use.")
EXCLUDE = option(
    "--exclude",
    multiple=True,
    metavar="GLOB",
    help="Leave out these file names; may be repeated.",
)
EPOCH_PATTERN = option(
    "--epoch-pattern",
    metavar="REGEX",
    help="Where the epoch is in unusual names or in paths: the group 'epoch', or the first group.",
)
ORDER = option(
    "--order",
    type=click.Choice(["epoch", "given"]),
    help="Sort files named one by one by their epoch, or keep them as given, oldest first.  "
    "[default: epoch, where it is clear]",
)
MATCH = option(
    "--match",
    type=click.Choice(["name", "order"]),
    default="name",
    help="How to pair tensors: by name, or by their place in the model, for layers that Keras "
    "renumbered or renamed.",
)
ALLOW = option(
    "--allow",
    multiple=True,
    type=click.Choice(["two-runs", "scaled-integers", "averages", "other-assets"]),
    help="Average anyway what is refused for this reason; may be repeated.",
)
STRIP_PREFIX = option(
    "--strip-prefix",
    multiple=True,
    metavar="PREFIX",
    help="Ignore this prefix of tensor names, such as module. of DDP, when tensors are paired; the "
    "output has the names of the newest checkpoint.  May be repeated.",
)
KEY = option(
    "--key",
    metavar="KEY",
    help="Average this part of PyTorch or Orbax checkpoints, such as state_dict or model/net.  The "
    "rest is copied from the newest, or left out of an output of another format.",
)
DATA = option(
    "--data",
    required=True,
    metavar="DATA",
    help="The data: blobs, FILE.npz with x and y, FILE.csv, or MODULE.py:FUNCTION that returns x "
    "and y.",
)
ARCHITECTURE = option(
    "--model",
    "architecture",
    metavar="ARCH",
    help="The model of files that hold weights only: MODULE.py:FUNCTION or "
    "package.module:FUNCTION, your code, which runs and returns a torch.nn.Module, or (module, "
    "loss), or a Keras model; for Keras's files also a .keras, .h5 or .json file.  A function of "
    "one argument gets the tensors, arrays by name, and returns predict(rows).",
)
METRIC = option(
    "--metric",
    metavar="NAME",
    help="accuracy, loss, or MODULE.py:FUNCTION, your code: called with labels and predictions, it "
    "returns a number for each row, or one for all, such as F1; more is better.",
)
DEVICE = option(
    "--device",
    metavar="NAME",
    help="Where PyTorch runs a module, like cpu or cuda:1.  [default: a GPU where there is one]",
)
#: Which tensors of a checkpoint a model is given.
PART = (
    option(
        "--key",
        metavar="KEY",
        help="Use this part of PyTorch or Orbax checkpoints, such as state_dict_ema.",
    ),
    option(
        "--use-ema",
        is_flag=True,
        help="Use the running means (EMA) that a trainer keeps beside the weights, in their place.",
    ),
)
ROWS_AT_A_TIME = option("--batch-size", type=int, default=256, metavar="N", help="Rows per batch.")
TRUST_CODE = option(
    "--trust-code",
    is_flag=True,
    help="Run code that a model file contains, such as a Lambda layer.",
)
HASH = option(
    "--hash/--no-hash",
    default=None,
    help="Record each input's SHA-256 in the output.  [default: if the inputs have at most 64 MB]",
)
FOLDER = option(
    "-o", "--output", type=click.Path(), required=True, metavar="DIR", help="The folder to write."
)
JSON = option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
QUIET = option("-q", "--quiet", is_flag=True, help="Print only errors.")

CHOOSING = under(
    "Choosing checkpoints",
    LAST,
    FROM,
    TO,
    option(
        "--every",
        type=int,
        metavar="K",
        default=1,
        help="Use every K-th, counted back from the newest; applied before --last.",
    ),
    option(
        "--min-spacing",
        type=int,
        metavar="STEPS",
        help="Use the newest, and before it those that are at least STEPS epochs or steps apart, "
        "as their names count; applied before --last.",
    ),
    option(
        "--target-count",
        type=int,
        metavar="N",
        help="Use N of them, as evenly spaced as they can be; applied after --last.",
    ),
    EXCLUDE,
    option(
        "--best",
        type=int,
        metavar="N",
        help="Use only the N best by --monitor; applied after --last and --target-count.",
    ),
    option(
        "--best-by",
        type=click.Choice(["value", "lifespan"]),
        help="Whether --best takes the best values, or those that stayed the best for the most "
        "later checkpoints (sockeye's lifespan).  [default: value]",
    ),
    option(
        "--monitor",
        metavar="METRIC",
        help="The metric for --best, from the file names, from --log, or from the program's own "
        "files (trainer_state.json, wenet's and SpeechBrain's .yaml, timm's checkpoints).  "
        "[default: val_loss, or the program's own]",
    ),
    option(
        "--mode",
        type=click.Choice(["min", "max"]),
        help="Whether less or more is better.  [default: guessed from the metric's name]",
    ),
    option(
        "--log",
        type=Readable(),
        metavar="CSV",
        help="The training log for --best, as the CSVLogger of Keras or Lightning writes it.",
    ),
    option(
        "--log-first",
        type=click.IntRange(0, 1),
        metavar="0|1",
        help="The row of --log that belongs to epoch 1 of the file names: 0, as Keras's CSVLogger "
        "counts, or 1.  [default: found from the files; an error where it matters and is "
        "unclear]",
    ),
    EPOCH_PATTERN,
    ORDER,
)


def _declare_parameter(
    name: str, owners: Mapping[str, Parameter]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the option of a parameter, which several schemes may take."""
    from polyak_cli.averaging.schemes import Flag, Word, spell

    texts = []
    for scheme, one in owners.items():
        unset = one.default is None or isinstance(one, Flag)
        default = f"{one.default:g}" if isinstance(one.default, float) else one.default
        texts.append(f"For {scheme}: {one.meaning}.{'' if unset else f'  [default: {default}]'}")
    first = next(iter(owners.values()))
    text = "  ".join(texts)
    if isinstance(first, Flag):
        return option(spell(name), is_flag=True, help=text)
    kind = click.Choice(list(first.words)) if isinstance(first, Word) else float
    return option(spell(name), type=kind, help=text)


def scheme_options(function: Any) -> Any:
    """Add the scheme and its parameters, derived from the registry."""
    from polyak_cli.averaging.schemes import PARAMETERS, SCHEMES

    declared = [
        option(
            "--scheme",
            type=click.Choice(list(SCHEMES)),
            help="How coefficients depend on age; window and posthoc combine running means, in "
            "polyak average only.  [default: equal]",
        )
    ]
    declared += [_declare_parameter(name, owners) for name, owners in PARAMETERS.items()]
    declared.append(
        option(
            "--snapshots",
            type=Readable(),
            metavar="FILE|SIGMAS",
            help="For posthoc: a CSV or JSON file with file, step and sigma of each snapshot, or "
            "the sigmas of files that are named INDEX.STEP, like 0.05,0.28.  [default: both are in "
            "the names]",
        )
    )
    declared.append(
        option(
            "--coefficients",
            type=Numbers(),
            help="Your own coefficients instead of a scheme, oldest first, of any sign; they are "
            "normalised.",
        )
    )
    return under("Coefficients", *declared)(function)


INCLUDE_TENSORS = option(
    "--include-tensors",
    multiple=True,
    metavar="GLOB",
    help="Average only these tensors and copy the others from the newest; may be repeated.",
)
EXCLUDE_TENSORS = option(
    "--exclude-tensors",
    multiple=True,
    metavar="GLOB",
    help="Copy these tensors from the newest; may be repeated.",
)
USE_EMA = option(
    "--use-ema",
    is_flag=True,
    help="Average the running means (EMA) of the weights, which Keras keeps in the optimizer's "
    "state and PyTorch, Orbax and TensorFlow beside the weights.",
)

AVERAGING = under(
    "Averaging",
    option(
        "--dtype",
        type=click.Choice(
            ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
        ),
        help="The float type to store.  [default: that of the checkpoints]",
    ),
    option(
        "--optimizer",
        type=click.Choice(["drop", "newest"]),
        default="drop",
        help="Drop the optimizer's state, or keep that of the newest.",
    ),
    INCLUDE_TENSORS,
    EXCLUDE_TENSORS,
    MATCH,
    USE_EMA,
    option(
        "--allow-nonfinite",
        is_flag=True,
        help="Average NaN and infinity too, instead of refusing them.",
    ),
    ALLOW,
    STRIP_PREFIX,
    KEY,
    option(
        "--lora",
        type=click.Choice(["factors", "exact"]),
        default="factors",
        help="For LoRA, DoRA and weight norm: average the factors, or write factors of the mean "
        "product, truncated to the rank for LoRA.",
    ),
)

RECALIBRATING = under(
    "Recalibrating",
    option(
        "--recalibrate",
        metavar="DATA",
        help="Recompute BatchNorm's statistics; DATA as in polyak recalibrate.",
    ),
    option(
        "--split",
        type=click.Choice(["train", "test"]),
        help="Which part of the data.  [default: train, where the data are split]",
    ),
    option("--batch-size", type=int, metavar="N", help="The most rows per batch.  [default: 256]"),
    option(
        "--model",
        metavar="ARCH",
        help="The model of checkpoints that hold weights only; ARCH as in polyak evaluate.  "
        "Without --recalibrate, a .keras of the same model, which an output in .keras is like.",
    ),
    DEVICE,
    option(
        "--trust-code",
        is_flag=True,
        help="Run code that the model contains, such as a Lambda layer.",
    ),
)

ONLY_WEIGHTS = option(
    "--only-weights",
    is_flag=True,
    help="Write nothing but the tensors, no configuration and no tokenizer: into an output folder "
    "(of DCP without the optimizer's), or of whole Keras models into a .weights.h5.",
)

WRITING = under(
    "Output",
    option(
        "-o",
        "--output",
        type=Writable(),
        metavar="FILE",
        help="The file to write, or the folder, if the checkpoints are folders.",
    ),
    option("--force", is_flag=True, help="Replace an existing output."),
    ONLY_WEIGHTS,
    HASH,
    option(
        "--verify",
        is_flag=True,
        help="Read the output back from the disk, average again and compare, before it replaces "
        "anything.",
    ),
    option("-n", "--dry-run", is_flag=True, help="Show the plan and write nothing."),
    JSON,
    QUIET,
    option("-v", "--verbose", is_flag=True, help="List every tensor and what happens to it."),
)

MACHINE = under(
    "Machine",
    option(
        "--max-memory",
        type=Size(),
        help="Limit of the buffers, on top of Python and its libraries.  [default: 32MiB]",
    ),
    option(
        "--jobs",
        type=int,
        metavar="N",
        help="How many threads or processes to use.  [default: one per processor, at most 8]",
    ),
)

ENGINE = under(
    "Cluster",
    option(
        "--engine",
        type=click.Choice(["here", "dask", "mpi"]),
        default="here",
        help="Who averages: this machine, the workers of Dask, or the ranks of MPI.",
    ),
    option(
        "--scheduler",
        metavar="ADDRESS",
        help="Of Dask's scheduler.  [default: DASK_SCHEDULER_ADDRESS, else --jobs workers are "
        "started here]",
    ),
)
