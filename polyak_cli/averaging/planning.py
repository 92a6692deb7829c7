"""Decide everything about an average from headers.

Reads no value, writes nothing, and knows no option of the stages around an average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from polyak_cli import checkpoints, formats
from polyak_cli.averaging import carried_files, ema, products, records, schemes
from polyak_cli.averaging.belonging import assets, averages, blame, exports, prefixes
from polyak_cli.averaging.belonging.factors import Factors, Measured, describe_plan, find_factors
from polyak_cli.averaging.belonging.layers import list_moved
from polyak_cli.averaging.fates import (
    decide_fates,
    drops_optimizer,
    is_compared,
    list_notes,
    map_stored_dtypes,
    note_files_beside,
    note_missing_emas,
)
from polyak_cli.averaging.matching import Row, match
from polyak_cli.averaging.notebook import write_html, write_text
from polyak_cli.averaging.options import Machine, Settings
from polyak_cli.checkpoints import Checkpoint, PassedOver, Problem
from polyak_cli.checkpoints.folders import list_relative_paths
from polyak_cli.checkpoints.spacing import require_rising_epochs
from polyak_cli.checkpoints.suspicions import find_suspicions
from polyak_cli.engine.timing import measure_peak
from polyak_cli.errors import (
    FormatError,
    MismatchError,
    PolyakError,
    UsageError,
    list_some,
    name_path,
    shown,
    word_count,
    word_size,
)
from polyak_cli.formats import outputs
from polyak_cli.formats.catalogue import find_format
from polyak_cli.formats.format import OutputForm
from polyak_cli.formats.model_folders import FolderFiles
from polyak_cli.storage import mirrors, publishing
from polyak_cli.tensors import Extent, Grid, Inline, Table, itemsize


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do, decided from headers alone.

    Attributes:
        output: the file to write, if one was named.
        checkpoints: the checkpoints, oldest first; the output begins as a copy of the last one.
        scheme: the name of the scheme; "custom" for custom coefficients.
        parameters: the parameters of the scheme, such as alpha.
        mean: what each checkpoint is multiplied by, and what the sum is divided by; the shares,
            whose sum is 1, are `coefficients`.
        positions: where each checkpoint stands in the run, in epochs.
        carried: names of the tensors that are copied from the newest checkpoint.
        dropped: names of the tensors that are left out.
        passed_over: the files of a directory that are no checkpoints, and why.
        skipped: the checkpoints that were chosen and left out because they are not healthy.
        suspicions: what names, file times and headers suggest and do not prove: that checkpoints do
            not belong together.  The notes have their texts, and the record their kinds.
        notes: what a user should know before the run.
        bytes_to_read: bytes of tensors to read, of all checkpoints together.
        bytes_to_write: about the size of the output in bytes.
        memory: bytes of memory: what the process has now, and the buffers.
        settings: the options, parsed.
        stages: the options of what happens before and after the average; not for users.
        recalibrate: the rows on which BatchNorm's statistics will be computed again, if they are.
        output_form: the format of the output, and how it is made of the newest checkpoint.
        stored_dtypes: location in the template -> the type to store, of each averaged tensor.
        drop_optimizer: the output leaves the optimizer's state out.
        files: what an output folder will hold; None if the output is no folder.
        factors: those of the averaged tensors of which a model uses only the product.
        measured: how far their means are from the mean of the products; a run measures it.
        tables: the table of tensors of each checkpoint.
        averaged_rows: the tensors to average as each checkpoint has them.
        carried_rows: the tensors to copy from the newest, in the same form.
        sigmas: of EMA snapshots, the relative width of each; otherwise empty.
    """

    output: Path | None
    checkpoints: tuple[Checkpoint, ...]
    scheme: str
    parameters: Mapping[str, schemes.Value]
    mean: schemes.Mean = field(repr=False)
    positions: tuple[float, ...]
    carried: tuple[str, ...]
    dropped: tuple[str, ...]
    passed_over: tuple[PassedOver, ...]
    skipped: tuple[Skipped, ...]
    suspicions: tuple[Problem, ...]
    notes: tuple[str, ...]
    bytes_to_read: int
    bytes_to_write: int
    memory: int
    settings: Settings
    recalibrate: Mapping[str, Any] | None
    stages: object = field(repr=False)
    output_form: OutputForm
    stored_dtypes: Mapping[str, str] = field(repr=False)
    drop_optimizer: bool
    files: FolderFiles | None = field(repr=False)
    factors: Factors = field(repr=False)
    measured: tuple[Measured, ...]
    tables: tuple[Table, ...] = field(repr=False)
    averaged_rows: tuple[Row, ...] = field(repr=False)
    carried_rows: tuple[Row, ...] = field(repr=False)
    sigmas: tuple[float, ...] = ()

    @property
    def names(self) -> list[str]:
        """The checkpoints' names, or as much of their paths as tells them apart."""
        return list_relative_paths([one.path for one in self.checkpoints])

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The share of each checkpoint, oldest first; the sum is 1."""
        return self.mean.coefficients

    @property
    def averaged(self) -> tuple[str, ...]:
        """The names of the tensors that are averaged."""
        return tuple(row[-1].name for row in self.averaged_rows)

    @property
    def effective_number(self) -> float:
        """How many equally counted checkpoints would steady the average as much: 1 / sum(c^2)."""
        return schemes.effective_number(self.coefficients)

    @property
    def averages_running_means(self) -> bool:
        """Whether the scheme is for files that hold running means, and no weights of a step."""
        return schemes.takes_running_means(self.scheme)

    @property
    def sum_of_absolutes(self) -> float:
        """The sum of the coefficients' absolute values: 1, or more if some are negative."""
        return schemes.sum_absolutes(self.coefficients)

    def _describe(self) -> str:
        output = f" into {self.output}" if self.output else ""
        return (
            f"Plan: average {word_count(len(self.checkpoints), 'checkpoint')}{output}, scheme "
            f"{self.scheme}, effective number {self.effective_number:.1f}"
        )

    def __repr__(self) -> str:
        """Return three lines for a prompt; the fields have the rest."""
        return write_text(self._describe(), f"oldest first: {list_some(self.names)}", self.notes)

    def _repr_html_(self) -> str:
        """Return the plan for a notebook."""
        rows = [
            (name, one.epoch, coefficient)
            for name, one, coefficient in zip(
                self.names, self.checkpoints, self.coefficients, strict=True
            )
        ]
        header = ("checkpoint", "epoch", "coefficient")
        return write_html(self._describe(), header, rows[::-1], self.notes)

    def data(self) -> dict[str, Any]:
        """Return the plan as what JSON can hold."""
        return {
            "output": name_path(self.output) if self.output else None,
            "scheme": self.scheme,
            "parameters": dict(self.parameters),
            "effective_number": self.effective_number,
            "sum_of_absolutes": self.sum_of_absolutes,
            "checkpoints": [
                {
                    "path": name_path(checkpoint.path),
                    "name": name,
                    "epoch": checkpoint.epoch,
                    "metric": checkpoint.metric,
                    "size": table.size,
                    "sigma": sigma,
                    "coefficient": coefficient,
                }
                for checkpoint, name, table, sigma, coefficient in zip(
                    self.checkpoints,
                    self.names,
                    self.tables,
                    self.sigmas or [None] * len(self.checkpoints),
                    self.coefficients,
                    strict=True,
                )
            ],
            "template": name_path(self.checkpoints[-1].path),
            "tensors": {
                fate: {"count": len(names), "names": list(names)}
                for fate, names in (
                    ("averaged", self.averaged),
                    ("carried", self.carried),
                    ("dropped", self.dropped),
                )
            },
            "files": self.files.data() if self.files else None,
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "memory": self.memory,
            "recalibrate": dict(self.recalibrate) if self.recalibrate else None,
            "passed_over": [
                {"path": name_path(passed.path), "reason": passed.reason}
                for passed in self.passed_over
            ],
            "skipped": [one.data() for one in self.skipped],
            "suspicions": [one.data() for one in self.suspicions],
            "factors": {
                **self.factors.data(),
                "written": self.settings.tensors.lora,
                "measured": [one.data() for one in self.measured],
            }
            if self.factors
            else None,
            "notes": list(self.notes),
        }


class Skipped(Protocol):
    """A checkpoint that was chosen and then left out."""

    @property
    def path(self) -> Path:
        """The checkpoint."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What is wrong with it."""

    def data(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""


class Around(NamedTuple):
    """What the stages around an average contribute to its plan; see `pipeline`."""

    skipped: Sequence[Skipped] = ()
    #: What an examination of the values suggests of the run as a whole, with its epochs and file
    #: times; None if there was none.
    suspicions: Sequence[Problem] | None = None
    recalibrate: Mapping[str, Any] | None = None  # what BatchNorm's statistics come from
    copies: int = 1  # of the output that lie on its disk at a time
    architecture: Table | None = None  # the whole model to which tensors are to be added
    stages: object = None  # their own options, which are kept for them
    check_template: Callable[[Table, Path | None], None] = lambda _template, _output: None


def plan_average(
    chosen: checkpoints.Selection,
    output: Path | None,
    settings: Settings,
    around: Around = Around(),  # noqa: B008 - immutable
) -> Plan:
    """Decide from headers what averaging would do, without reading one value.

    Args:
        chosen: the checkpoints, oldest first.
        output: the file or folder that would be written; None if it is open.
        settings: the options.
        around: what the stages around the average know.

    Raises:
        PolyakError: a leaf of it; see `pipeline.plan`.
    """
    scheme, mean, notes = _weigh(chosen, settings)
    template = (tables := _scan(chosen, settings))[-1]
    _check_output(output, tables, chosen, settings)
    around.check_template(template, output)
    exports.refuse_unordered(tables)
    found = _sort_tensors(tables, settings, mean, output)
    notes += assets.refuse_other_assets(tables, settings.tensors.allow)
    only = settings.output.only_weights
    files = carried_files.plan_files(output, template, only_weights=only)
    suspicions = [*_list_suspicions(chosen, around), *found.averages]
    made = Plan(
        output=output,
        checkpoints=chosen.checkpoints,
        scheme=scheme.name,
        parameters=scheme.parameters,
        mean=mean,
        positions=chosen.positions,
        carried=found.carried_names,
        dropped=found.dropped_names,
        passed_over=chosen.passed_over,
        skipped=tuple(around.skipped),
        suspicions=tuple(suspicions),
        notes=(*notes, *_collect_notes(chosen, tables, found, around, suspicions, files)),
        bytes_to_read=_count_bytes_to_read(found.averaged, found.carried, mean.multipliers),
        bytes_to_write=_estimate_size(template, found) + (files.nbytes if files else 0),
        memory=measure_peak() + settings.machine.share().nbytes,
        settings=settings,
        recalibrate=around.recalibrate,
        stages=around.stages,
        output_form=_choose_form(output, template, found, settings, around.architecture),
        stored_dtypes=found.stored,
        drop_optimizer=found.drop_optimizer,
        files=files,
        factors=found.factors,
        measured=(),
        tables=tables,
        averaged_rows=tuple(found.averaged),
        carried_rows=tuple(found.carried),
        sigmas=chosen.sigmas,
    )
    if output and not sends_in_parts(made):
        publishing.check_room(output, around.copies * made.bytes_to_write)
    return made


def sends_in_parts(plan: Plan) -> bool:
    """Return whether an output goes to a store in parts while it is folded, never whole to a disk.

    Not if anything reads it before it has its name: checksums of what is averaged, `--verify`,
    `--recalibrate`, or the products of factors.
    """
    settings = plan.settings
    return (
        plan.output is not None
        and mirrors.is_sent_in_parts(plan.output)
        and not formats.has_late_checksums(plan.output_form.key)
        and not settings.output.verify
        and plan.recalibrate is None
        and settings.tensors.lora != "exact"
    )


def _check_output(
    output: Path | None,
    tables: Sequence[Table],
    chosen: checkpoints.Selection,
    settings: Settings,
) -> None:
    """Refuse an output that is in the way; see `outputs.check_output`."""
    if output:
        force, owned = settings.output.force, records.list_owned
        outputs.check_output(output, tables, force=force, run=chosen.left_out, list_owned=owned)


def _scan(chosen: checkpoints.Selection, settings: Settings) -> tuple[Table, ...]:
    """Read the headers of all checkpoints."""
    paths = [checkpoints.find_file(checkpoint.path) for checkpoint in chosen.checkpoints]
    jobs = settings.machine.share().jobs
    try:
        # EMAs lie in the optimizer's state, which is described only where it is needed.
        wanted = settings.tensors
        return tuple(formats.scan(paths, jobs=jobs, with_optimizer=wanted.use_ema, key=wanted.key))
    except MismatchError as error:
        raise blame.blame_format(paths, error) from None
    except PolyakError as error:
        raise blame.blame_unreadable(paths, error, settings.tensors.key) from None


class _Fates(NamedTuple):
    """The fate of each tensor of the checkpoints."""

    averaged: Sequence[Row]
    carried: Sequence[Row]
    carried_names: tuple[str, ...]  # those of the file that are not the model's own too
    dropped_names: tuple[str, ...]
    stored: Mapping[str, str]  # location in the template -> the type to store
    drop_optimizer: bool
    missing_emas: Sequence[str]
    prefix_note: str
    averages: Sequence[Problem]  # running means among the tensors, and what is done about them
    factors: Factors  # among the averaged
    is_exact: bool  # the mean products of the factors are written


def _sort_tensors(
    tables: tuple[Table, ...],
    settings: Settings,
    mean: schemes.Mean,
    output: Path | None,
) -> _Fates:
    """Pair the tensors of all checkpoints, and decide the fate of each."""
    template, wanted = tables[-1], settings.tensors
    stripped, prefix_note = prefixes.strip_tables(tables, wanted.strip_prefix)
    scheme = settings.weighting.scheme
    if scheme is not None and schemes.takes_running_means(scheme):
        averages.refuse_raw_weights(stripped, wanted, scheme)
    taken, found_averages, missing_emas = ema.take_parts(stripped, wanted)
    rows = match(taken, wanted.match)
    averaged, carried = decide_fates(rows, wanted, shown(template.path))
    # Refused now: later, a block that is too large would fail in the middle of a fold.
    _check_chunks(tables, rows, settings.machine)
    drop = drops_optimizer(
        template,
        wanted.optimizer,
        outputs.choose_format(output, template),
        only_weights=settings.output.only_weights,
    )
    whole = outputs.choose_format(output, template) == template.format
    takes_tensors = template.rules.part or settings.output.only_weights
    beside = template.optimizer if whole or not takes_tensors else template.others.keys()
    dropped = [name for name in template.others if drop and name in beside]
    others = (name for name in template.others if name not in dropped)
    return _Fates(
        averaged=averaged,
        carried=carried,
        carried_names=(*(row[-1].name for row in carried), *others),
        dropped_names=tuple(dropped),
        stored=map_stored_dtypes(averaged, wanted.dtype, template),
        drop_optimizer=drop,
        missing_emas=missing_emas,
        averages=found_averages,
        prefix_note=prefix_note,
        factors=_find_factors(tables, averaged, mean.coefficients, settings),
        is_exact=wanted.lora == "exact",
    )


def _find_factors(
    tables: Sequence[Table],
    averaged: Sequence[Row],
    coefficients: Sequence[float],
    settings: Settings,
) -> Factors:
    """Return the factors among averaged tensors; refuse what cannot be done with them."""
    found = find_factors(averaged)
    if found.pairs:
        products.compare_configurations(tables)
    if settings.tensors.lora == "exact":
        terms = sum(1 for coefficient in coefficients if coefficient)
        products.check_products(found, terms, settings.machine.max_memory)
    return found


def _weigh(
    chosen: checkpoints.Selection, settings: Settings
) -> tuple[schemes.UsedScheme, schemes.Mean, list[str]]:
    """Return the scheme, its mean, and what a user should know of the choice and of both."""
    used = settings.weighting.resolve()
    if "ema_half_life" in used.parameters:  # without epochs, its unit would be checkpoints
        require_rising_epochs(chosen.checkpoints, "--ema-half-life")
    mean = settings.weighting.compute(chosen.positions, chosen.sigmas)
    return used, mean, [*chosen.notes, *note_coefficients(used, mean, chosen.positions[-1])]


def note_coefficients(used: schemes.UsedScheme, mean: schemes.Mean, end: float) -> Iterator[str]:
    """Yield what negative coefficients do, and a half-life that a short run cannot have.

    Args:
        used: the scheme.
        mean: what it leads to.
        end: the position of the newest checkpoint.
    """
    half_life, longest = used.parameters.get("ema_half_life"), schemes.find_longest_half_life(end)
    is_long = isinstance(half_life, float) and half_life > longest
    if used.name == "power" and is_long and len(mean.multipliers) > 1:
        yield (
            f"warning: --ema-half-life {half_life:g} is longer than {longest:.4g}, ln(2) of the "
            f"newest checkpoint's position, {end:g}: until the run is long enough for it, every "
            "step counts alike"
        )
    if not schemes.is_signed(mean.multipliers):
        return
    total = schemes.sum_absolutes(mean.coefficients)
    text = f"warning: some coefficients are negative; the absolute values sum to {total:.4g}, so "
    if schemes.takes_running_means(used.name):
        yield (
            f"{text}that rounding errors of the running means may grow by that factor; if the "
            "files hold plain weights and no running means, choose another scheme"
        )
    else:
        yield (
            f"{text}that the average lies outside of its checkpoints, and their errors may grow "
            "by that factor: compare it with the newest checkpoint on data"
        )


def _collect_notes(
    chosen: checkpoints.Selection,
    tables: Sequence[Table],
    found: _Fates,
    around: Around,
    suspicions: Sequence[Problem],
    files: FolderFiles | None,
) -> Iterator[str]:
    """Yield what a user should know before the run."""
    yield from (problem.text for problem in suspicions)
    if files is None:
        yield from note_files_beside(chosen.checkpoints[-1], tables[-1])
    yield from carried_files.note_other_weights(files)
    yield from list_notes(
        tables,
        found.averaged,
        found.carried,
        found.stored,
        drop_optimizer=found.drop_optimizer,
        recalibrates=around.recalibrate is not None,
    )
    yield from list_moved(tables, found.averaged)
    yield from note_missing_emas(found.missing_emas)
    if found.prefix_note:
        yield found.prefix_note
    yield from describe_plan(found.factors, exact=found.is_exact)


def _list_suspicions(chosen: checkpoints.Selection, around: Around) -> list[Problem]:
    """Return what epochs and file times suggest, unless the values were examined already."""
    if around.suspicions is not None:
        return [*around.suspicions]
    return find_suspicions(chosen.checkpoints, chosen.run, chosen.thinned)


def _choose_form(
    output: Path | None,
    template: Table,
    found: _Fates,
    settings: Settings,
    architecture: Table | None,
) -> OutputForm:
    """Return the form of the output; refuse what its format cannot hold."""
    chosen = outputs.choose_format(output, template)
    # Only a conversion can store other types in place of fixed ones.
    if chosen == template.format:
        _check_types(template, found.averaged, settings.tensors.dtype)
    outputs.check_conversion(
        output,
        template,
        averaged=found.stored,
        drop_optimizer=found.drop_optimizer,
        only_weights=settings.output.only_weights,
        architecture=architecture,
    )
    return OutputForm(chosen, outputs.takes_weights(output, template), architecture)


def _check_types(template: Table, averaged: Sequence[Row], dtype: str | None) -> None:
    """Refuse another type where the files cannot have it."""
    retypes = find_format(template.format).retypes
    for spec in (row[-1] for row in averaged if template.rules.is_fixed):
        if dtype not in (None, spec.dtype) and not {dtype, spec.dtype} <= retypes:
            limit = (
                f"can change types only between {', '.join(sorted(retypes))}"
                if retypes
                else "keeps its types"
            )
            raise UsageError(
                f"--dtype {dtype}: {shown(template.path)} {limit}, and tensor "
                f"'{shown(spec.name)}' is {spec.dtype}; leave out --dtype, or give the output a "
                "name in .safetensors"
            )


def _check_chunks(tables: Sequence[Table], rows: Sequence[Row], machine: Machine) -> None:
    """Refuse chunks that do not fit: HDF5's filters work on whole chunks only."""
    jobs = machine.share().jobs
    # A process holds a chunk twice: as stored, and decoded.
    bound = machine.max_memory // jobs // 2
    newest = len(tables) - 1
    # Checkpoints with the template's skeleton share its table, and need no second look.
    others = [k for k in range(newest) if tables[k].tensors is not tables[-1].tensors]
    for row in rows:
        for k in (*others, newest):
            table, spec = tables[k], row[k]
            if spec.storage and spec.storage.block_nbytes > bound:
                raise FormatError(
                    f"{shown(table.path)}: tensor '{shown(spec.name)}' is stored in chunks of "
                    f"{word_size(spec.storage.block_nbytes)}, and each must be held whole; raise "
                    f"--max-memory above {2 * jobs * spec.storage.block_nbytes} bytes"
                )


def _count_bytes_to_read(
    averaged: Sequence[Row], carried: Sequence[Row], coefficients: Sequence[float]
) -> int:
    """Return the bytes of tensors that a run reads."""
    # Carried tensors are copied with the skeleton, and read only to be compared.
    compared = sum(spec.nbytes for row in carried if is_compared(row) for spec in row)
    read = sum(
        spec.nbytes
        for row in averaged
        for spec, coefficient in zip(row, coefficients, strict=True)
        if coefficient  # a coefficient of zero is never read
    )
    return read + compared


def _estimate_size(template: Table, found: _Fates) -> int:
    """Return the template's size, corrected for other types and for dropped tensors."""
    # Headers and padding are taken to stay as they are: only free disk space depends on it.
    change = sum(
        row[-1].size * (itemsize(found.stored[row[-1].location]) - itemsize(row[-1].dtype))
        for row in found.averaged
    )
    # What is compressed, or not stored as it is a value often repeated, is written in full.
    unpacked = sum(
        spec.nbytes
        for spec in (*template.tensors.values(), *template.others.values())
        if not isinstance(spec.storage, (Extent, Grid, Inline))
    )
    dropped = sum(template.others[name].nbytes for name in found.dropped_names)
    return max(template.size, unpacked) + change - dropped
