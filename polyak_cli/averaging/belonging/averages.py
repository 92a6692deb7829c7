"""Find the parts of a checkpoint that are running means of other parts, and choose between them.

The mean of running means counts old steps several times, so the raw part is averaged where both
are there.  Goes by the names and shapes of tensors alone; knows no file and reads no value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from polyak_cli.averaging.fates import is_wanted
from polyak_cli.averaging.options import Tensors
from polyak_cli.checkpoints import Problem
from polyak_cli.errors import MismatchError, UsageError, list_some, shown, word_count
from polyak_cli.formats.running_means import names_running_mean
from polyak_cli.tensors import FLOATS, Table, TensorSpec

#: The kind of the suspicion, and the word of `allow` that goes on against the refusal.
KIND, ALLOWED = "average", "averages"
#: Formats in which nothing but names tells a running mean.
_FLAT = ("torch_zip", "torch_dcp", "safetensors", "npz", "orbax")
_PART = re.compile(r"[^/.]+[/.]")
#: What torch.save's lists give: a number in place of a name.
_NUMBERED = re.compile(r"/\d+$")
#: Floats of a state dict that `model.parameters()` does not have.
_BUFFER = re.compile(r"[./]running_(mean|var)$")
#: The end of a shadow's name in the checkpoints of TensorFlow's ExponentialMovingAverage.
_SHADOW = "/ExponentialMovingAverage"


@dataclass(frozen=True, slots=True)
class Average:
    """A part of a checkpoint that is a running mean.

    Attributes:
        prefix: how the names of its tensors begin.
        raw: how the names of the tensors begin that it is a mean of; None if they are not there.
        pairs: its tensors -> the raw ones, as far as both are floats of the same shape.
        unpaired: its float tensors without a raw one.
        is_own: it is averaged by itself where the raw tensors are.
        is_list: its tensors are numbered, and have no names.
        is_beside: the file holds other weights, whether they are its raw ones or not.
    """

    prefix: str
    raw: str | None
    pairs: Mapping[str, str]
    unpaired: tuple[str, ...] = ()
    is_own: bool = False
    is_list: bool = False
    is_beside: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Its float tensors."""
        return (*self.pairs, *self.unpaired)


def choose_parts(
    tables: Sequence[Table], wanted: Tensors
) -> tuple[Sequence[Table], list[Problem], list[str]]:
    """Return the tables with each running mean and its raw tensors read from one of both.

    The average of the raw tensors is also written in the running mean's place: programs that prefer
    the running mean would otherwise load the newest checkpoint's own.

    Returns:
        The tables, what was found in the template, and the template's float tensors that have no
        running mean where those are wanted.

    Raises:
        MismatchError: a checkpoint holds only a running mean, which was not asked for; or those
            that were asked for are missing, are several of the same weights, or are a list that
            cannot be paired with the weights.
    """
    found = [_leave_out(own, wanted) for own in list_averages(tables)]
    for table, own in zip(tables, found, strict=True):
        text = describe_refusal(table, wanted, own)
        if text:
            raise MismatchError(text)
    averages = found[-1]
    if not averages:
        if wanted.use_ema and tables[-1].format in _FLAT:  # Keras says itself which are EMAs
            if said := _find_whole(tables):
                text = f"{said} running means of weights, which are averaged (--use-ema)"
                return tables, [Problem(KIND, text)], []
            # torchtitan keeps its EMA in an optimizer's state; see `ema`.
            if not tables[-1].keras.ema_slots:
                raise MismatchError(_describe_none(tables[-1]))
        return tables, [], []
    unique = {id(t.tensors): (t, own) for t, own in zip(tables, found, strict=True)}
    merged = {
        key: {**t.tensors, **_exchange(t, own, use_ema=wanted.use_ema)}
        for key, (t, own) in unique.items()
    }
    rounded = _find_rounded(averages)
    problems = [
        _describe_choice(one, rounded.get(one.prefix), use_ema=wanted.use_ema) for one in averages
    ]
    missing: list[str] = []
    if wanted.use_ema:
        known = {name for one in averages for name in (*one.names, *one.pairs.values())}
        specs = tables[-1].tensors.values()
        missing = [spec.name for spec in specs if spec.dtype in FLOATS and spec.name not in known]
    return [replace(t, tensors=merged[id(t.tensors)]) for t in tables], problems, missing


def _find_whole(tables: Sequence[Table]) -> str:
    """Return what says that all that is averaged are running means, "" if nothing does."""
    part = tables[-1].rules.part
    if part and names_running_mean(part.rpartition("/")[2]):
        return f"'{shown(part)}' (--key) holds"
    folders = {table.path.parent.name for table in tables}
    if all(map(names_running_mean, folders)):
        some = ", ".join(f"'{shown(name, 60)}'" for name in sorted(folders))
        return f"the folders {some} hold"
    return ""


def _describe_none(table: Table) -> str:
    """Say that a checkpoint has no running means to take, and where there may be some."""
    part = table.rules.part
    text = f"{shown(table.path)}: has no running mean of its weights (an EMA) that --use-ema could "
    text += f"take in '{shown(part)}'" if part else "take"
    if table.format != "orbax":
        return f"{text}; --key may choose the EMA itself" if part else text
    if any(name.startswith("optimizer_variables.") for name in table.optimizer):
        return (
            f"{text}: Keras keeps its own in 'optimizer_variables', which is read from .keras and "
            ".h5 files only; save those, or leave --use-ema out"
        )
    keys = sorted({name.partition(".")[0] for name in {**table.tensors, **table.others}})
    emas = [key for key in keys if names_running_mean(key)]
    keys = [key for key in keys if key not in emas]
    return (
        f"{text} (keys of its tree: {list_some([*emas, *keys])}); average a key that is the EMA "
        f"with --key {shown(emas[0], 40) if emas else 'NAME'}, without --use-ema"
    )


def describe_refusal(table: Table, wanted: Tensors, averages: Sequence[Average]) -> str:
    """Return why a checkpoint must not be averaged as it is, "" if it may be.

    Args:
        table: of the checkpoint.
        wanted: the options.
        averages: of the checkpoint; see `list_averages`.
    """
    if wanted.use_ema:
        return _describe_doubt(table, averages)
    if ALLOWED in wanted.allow:
        return ""
    for one in averages:
        if not one.pairs and any(is_wanted(name, wanted) for name in one.names):
            if one.is_list and one.is_beside:
                return f"{_describe_list(table, one)}; --allow {ALLOWED} averages it by itself"
            return (
                f"{shown(table.path)}: '{shown(one.prefix)}*' is a running mean of the weights, "
                "and the raw weights are missing; averaging running means counts old steps "
                "several times. Average checkpoints with the raw weights, or use --use-ema or "
                f"--allow {ALLOWED} to average the running means anyway"
            )
    return ""


def refuse_raw_weights(tables: Sequence[Table], wanted: Tensors, scheme: str) -> None:
    """Refuse raw weights where a scheme is for running means, and both are there.

    Raises:
        UsageError: names both parts.
    """
    for table, averages in zip(tables, list_averages(tables), strict=True):
        for one in _leave_out(averages, wanted):
            if one.raw is not None and not wanted.use_ema:
                raise UsageError(
                    f"--scheme {scheme} is for running means, and {shown(table.path)} holds both: "
                    f"'{shown(one.raw)}*' and their running mean '{shown(one.prefix)}*'; add "
                    "--use-ema, which takes the running mean and writes the average in both places"
                )


def _leave_out(averages: Iterable[Average], wanted: Tensors) -> list[Average]:
    """Return the running means that are not excluded as a whole: those are carried as they are."""
    excluding = replace(wanted, include_tensors=())
    return [one for one in averages if any(is_wanted(name, excluding) for name in one.names)]


def _describe_doubt(table: Table, averages: Sequence[Average]) -> str:
    """Return why the running mean that is wanted is not known, "" if it is."""
    owners: dict[str, Average] = {}
    rounded = _find_rounded(averages)
    for one in averages:
        if one.is_list and one.is_beside and not one.pairs:
            return _describe_list(table, one)
        for raw in one.pairs.values() if one.prefix not in rounded else ():
            other = owners.setdefault(raw, one)
            if other is not one:
                first, second = (f"{shown(each.prefix)}*" for each in (other, one))
                return (
                    f"{shown(table.path)}: '{first}' and '{second}' are both running means of the "
                    f"raw weights '{shown(str(one.raw))}*', and --use-ema takes one; leave the "
                    f"other out with --exclude-tensors '{first}' or --exclude-tensors '{second}'"
                )
    return ""


def _describe_list(table: Table, one: Average) -> str:
    """Say that a list of running means fits no weights of its file, and what to do."""
    return (
        f"{shown(table.path)}: '{shown(one.prefix)}*' is a running mean of weights as a list "
        f"without names, of {word_count(len(one.names), 'tensor')}; expected the number, order and "
        "shapes of the weights of one part of the file, to pair them. --exclude-tensors "
        f"'{shown(one.prefix)}*' carries it as it is in the newest checkpoint"
    )


def _describe_choice(one: Average, exact: Average | None, *, use_ema: bool) -> Problem:
    """Say which part is a running mean of which, and what is done about it.

    Args:
        one: the running mean.
        exact: the same in float32, if that is there.
        use_ema: running means are averaged.
    """
    prefix = f"'*{_SHADOW}'" if one.is_own else f"'{shown(one.prefix)}*'"
    if one.raw is None:
        return Problem(KIND, f"{prefix} is a running mean, and running means are averaged")
    text = f"{prefix} is a running mean of the raw weights '{shown(one.raw)}*': "
    if use_ema:
        text += "the running means are averaged (--use-ema) and written in both places"
        text += f", as '{shown(exact.prefix)}*' has them in float32" if exact else ""
    elif one.is_own:
        text += "each is averaged by itself; --use-ema writes the running means in both places"
    else:
        text += (
            "the raw weights are averaged and written in both places, so that no program loads "
            "the running mean of the newest checkpoint alone; --use-ema averages the running "
            "means"
        )
    if one.is_list:
        text += ". It is a list without names, whose order and shapes are those of the weights"
    if one.unpaired:
        count = word_count(len(one.unpaired), "tensor")
        text += f". {count} of its tensors have no raw weights and are averaged themselves "
        text += f"({list_some(one.unpaired)})"
    return Problem(KIND, text)


def _find_rounded(averages: Sequence[Average]) -> dict[str, Average]:
    """Return the prefixes of running means that stand in float32 too, with the latter.

    fairseq saves its EMA as the model is, in float16, and with ema_fp32 also before rounding.
    """
    exact = {one.prefix: one for one in averages}
    found = {one.prefix: exact.get(f"{one.prefix[:-1]}_fp32_params/") for one in averages}
    return {prefix: one for prefix, one in found.items() if one}


def _exchange(table: Table, averages: Sequence[Average], *, use_ema: bool) -> dict[str, TensorSpec]:
    """Return the tensors whose values are read from another's place."""
    changed: dict[str, TensorSpec] = {}
    rounded = _find_rounded(averages)
    exact = {raw: mean for one in rounded.values() for mean, raw in one.pairs.items()}
    for one in averages:
        for mean, raw in one.pairs.items() if use_ema or not one.is_own else ():
            source = exact.get(raw, mean) if use_ema else raw
            taken = table.tensors[source]
            for target in {mean, raw} - {source}:
                changed[target] = replace(
                    table.tensors[target],
                    storage=taken.storage,
                    byteorder=taken.byteorder,
                    dtype=taken.dtype,
                )
    return changed


# --- finding --------------------------------------------------------------------------------------


def list_averages(tables: Sequence[Table]) -> list[list[Average]]:
    """Return the running means of each checkpoint; equal skeletons are looked at once."""
    # They share their tensors.
    unique = {id(table.tensors): table for table in tables}
    found = {key: _find_averages(table) for key, table in unique.items()}
    return [found[id(table.tensors)] for table in tables]


def _find_averages(table: Table) -> list[Average]:
    """Return the parts of a checkpoint that are running means."""
    if table.format == "tf_bundle":
        return _find_shadows(table)
    if table.format not in _FLAT:
        return []  # Keras keeps them in its optimizer's state; see `ema`
    finder = _Finder(table)
    return [one for one in finder.run() if one.names]


def _find_shadows(table: Table) -> list[Average]:
    """Return TensorFlow's shadows, whose names are their variable's and an ending."""
    pairs = {
        name: name.removesuffix(_SHADOW)
        for name, spec in table.tensors.items()
        if name.endswith(_SHADOW) and _fits(table.tensors.get(name.removesuffix(_SHADOW)), spec)
    }
    return [Average("", "", pairs, is_own=True)] if pairs else []


def _fits(raw: TensorSpec | None, mean: TensorSpec) -> bool:
    """Return whether a tensor can be the one that another is a mean of."""
    return (
        raw is not None
        and raw.dtype in FLOATS
        and mean.dtype in FLOATS
        and raw.shape == mean.shape
        and raw.storage is not None
        and mean.storage is not None
        and _describe_layout(raw) == _describe_layout(mean)
    )


def _describe_layout(spec: TensorSpec) -> str:
    """Return how the elements lie, "" for C order; names are left out, as the two have others.

    Tied weights share a storage, of which each is a view; a running mean may keep one of them only.
    """
    views = dict.fromkeys(re.findall(r"\([\d, ]*\) from \d+ by \([\d, ]*\)", spec.arrangement))
    strides = [math.prod(spec.shape[axis + 1 :]) for axis in range(len(spec.shape))]
    if [*views] == [f"{spec.shape} from 0 by {tuple(strides)}"]:
        return ""
    return "; ".join(views) or spec.arrangement


class _Finder:
    """Finds the running means of one checkpoint: first by what only they have, then by names."""

    def __init__(self, table: Table) -> None:
        self.tensors = table.tensors
        self.is_nested = table.format == "torch_zip"  # "/" is a dictionary, not part of a name
        self.taken: set[str] = set()  # tensors of averages

    def run(self) -> Iterator[Average]:
        """Yield them."""
        yield from self._find_swapped()
        marked = list(self._list_marked())
        for prefix, _ in marked:
            self.taken.update(self._below(prefix))
        # ema-pytorch's module is called as its mean is, and holds the raw weights too.
        online = [n for _, raws in marked for raw in raws if raw for n in self._below(raw)]
        groups = self._group_by_word({*online})
        for names in groups.values():
            self.taken.update(names)
        for prefix, raws in marked:
            yield self._pair(prefix, self._below(prefix), raws)
        rest = sum(s.dtype in FLOATS and n not in self.taken for n, s in self.tensors.items())
        for prefix, names in groups.items():
            # A module may be called so: only as a key of the checkpoint, or with most of a model in
            # it, is it a model's running mean.
            is_key = self.is_nested and prefix.endswith("/")
            if is_key or 2 * len(names) >= rest:
                found = self._pair(prefix, names)
                if is_key or 2 * len(found.pairs) >= max(1, rest):
                    yield found

    def _below(self, prefix: str) -> list[str]:
        return [name for name in self.tensors if name.startswith(prefix)]

    def _find_swapped(self) -> Iterator[Average]:
        """Yield running means that stand where the model is looked for.

        Lightning's WeightAveraging (2.5.2, `on_save_checkpoint`) puts the raw weights under
        current_model_state.  mmengine's EMAHook (`before_save_checkpoint`) swaps the two, so that
        the raw weights are in ema_state_dict, which has a counter besides.
        """
        for raw, mark in (
            ("current_model_state/", "averaging_state/"),
            ("ema_state_dict/module.", "ema_state_dict/steps"),
        ):
            if self._below(raw) and self._below(mark) and self._below("state_dict/"):
                self.taken.update((*self._below("state_dict/"), *self._below(raw)))
                yield self._pair("state_dict/", self._below("state_dict/"), (raw,))

    def _list_marked(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield the prefixes of running means that a counter stands beside, and of raw weights.

        torch.optim.swa_utils.AveragedModel counts in n_averaged; ema-pytorch has the buffers
        initted and step; LitEma of latent diffusion has num_updates and decay.
        """
        for name in self.tensors:
            end = max(name.rfind("/"), name.rfind(".")) + 1
            above, last = name[:end], name[end:]
            if name in self.taken:
                continue
            if last == "n_averaged" and self._below(f"{above}module."):
                yield f"{above}module.", ()
            elif last == "initted" and self._below(f"{above}ema_model."):
                yield f"{above}ema_model.", (f"{above}online_model.",)
            elif last == "num_updates" and f"{above}decay" in self.tensors:
                parent = re.sub(r"[^/.]+[/.]$", "", above)
                yield above, (f"{parent}model.", parent)

    def _group_by_word(self, raw: Container[str]) -> dict[str, list[str]]:
        """Return the tensors below each name that says running mean, without those known as raw."""
        groups: dict[str, list[str]] = {}
        for name in self.tensors:
            for part in _PART.finditer(name) if name not in self.taken and name not in raw else ():
                if names_running_mean(part[0][:-1]):
                    groups.setdefault(name[: part.end()], []).append(name)
                    break
        return groups

    def _pair(self, prefix: str, names: Sequence[str], raws: Sequence[str] = ()) -> Average:
        """Return a running mean with the raw tensors that have its names after another prefix."""
        floats = [name for name in names if self.tensors[name].dtype in FLOATS]
        # LitEma's decay is a float beside the means.
        floats = [name for name in floats if name[len(prefix) :] != "decay"]
        if floats and all(_NUMBERED.search(name) for name in floats):
            return self._pair_list(prefix, floats)
        found = {raw: self._pair_with(floats, prefix, raw) for raw in raws}
        if not any(found.values()):
            found = {raw: self._pair_with(floats, prefix, raw) for raw in self._list_raws(prefix)}
        raw = max(found, key=lambda one: len(found[one]), default=None)
        pairs = found[raw] if raw is not None else {}
        if raw is None or 2 * len(pairs) < len(floats) or not pairs:
            return Average(prefix, None, {}, tuple(floats))
        return Average(prefix, raw, pairs, tuple(name for name in floats if name not in pairs))

    def _pair_list(self, prefix: str, floats: Sequence[str]) -> Average:
        """Return a running mean that is a list, with the weights of the part that it fits.

        diffusers' EMAModel and torch_ema keep no names, and go by the order of
        `model.parameters()`: that of a state dict without its buffers.
        """
        parts: dict[str, list[str]] = {}
        for name, spec in self.tensors.items():
            if name not in self.taken and spec.dtype in FLOATS and not _BUFFER.search(name):
                parts.setdefault(name[: name.find("/") + 1], []).append(name)
        floats = sorted(floats, key=lambda name: int(name[name.rfind("/") + 1 :]))
        for raw, names in parts.items():
            pairs = dict(zip(floats, names, strict=False))
            fit = all(_fits(self.tensors[r], self.tensors[mean]) for mean, r in pairs.items())
            if len(names) == len(floats) and fit:
                return Average(prefix, raw, pairs, is_list=True, is_beside=True)
        return Average(prefix, None, {}, tuple(floats), is_list=True, is_beside=bool(parts))

    def _list_raws(self, prefix: str) -> list[str]:
        """Return how names begin that end as those of a running mean, the nearest ones first."""
        ends = sorted({self._find_end(name, prefix) for name in self._below(prefix)}, key=len)
        if not ends:
            return []
        probe = ends[-1]
        found = dict.fromkeys(
            name[: -len(probe)]
            for name in self.tensors
            if name not in self.taken and name.endswith(probe)
        )
        return [one for one in found if not one or one[-1] in "/."]

    def _pair_with(self, floats: Sequence[str], prefix: str, raw: str) -> dict[str, str]:
        """Return those tensors of a running mean that have raw ones."""
        pairs = {}
        plain: dict[str, str] | None = None
        for name in floats:
            end = self._find_end(name, prefix)
            other = f"{raw}{end}"
            if other not in self.tensors and "." not in end:
                # LitEma takes the points out of names, since no buffer may have one.
                plain = plain or {n[len(raw) :].replace(".", ""): n for n in self._below(raw)}
                other = plain.get(end, other)
            if other != name and _fits(self.tensors.get(other), self.tensors[name]):
                pairs[name] = other
        return pairs

    @staticmethod
    def _find_end(name: str, prefix: str) -> str:
        """Return a name after its prefix, and after what wraps a model (AveragedModel, DDP).

        Lightning keeps a callback's state under the name of its class, such as EMA, and the
        callback has the weights under a key of its own there.
        """
        return re.sub(r"^((module|shadow|(ema_)?state_dict)[./])+", "", name[len(prefix) :])
