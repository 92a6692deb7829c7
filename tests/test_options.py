"""Options have one home: the fields of the parts that they are parsed into."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest

from polyak_cli.averaging import options as averaging_options
from polyak_cli.averaging import records
from polyak_cli.averaging.options import PARTS, Tensors
from polyak_cli.cli import cli
from polyak_cli.errors import UsageError
from polyak_cli.evaluation import scoring
from polyak_cli.pipeline.stages import Options, Stages, parse_options
from polyak_cli.tensors import FLOATS
from tests.command import polyak

#: Options of the command that are not options of an average: where it goes, and what is printed.
COMMAND = {"sources", "output", "dry_run", "as_json", "quiet", "verbose", "split"}


def test_every_option_is_a_field_of_exactly_one_part() -> None:
    """The keywords that users may give are the fields, no more and no less."""
    names = [one.name for part in (*PARTS.values(), Stages) for one in fields(part)]
    assert len(names) == len(set(names))
    assert set(names) == set(Options.__annotations__)


def test_the_options_of_scoring_are_the_fields_that_they_are_parsed_into() -> None:
    """And `evaluate` and `sweep` of the command line have each of them."""
    names = {one.name for one in fields(scoring.Scoring)}
    assert names == {*scoring.ScoringOptions.__annotations__}
    for name in ("evaluate", "sweep"):
        offered = {param.name for param in cli.commands[name].params}
        assert names - {"model"} | {"architecture"} <= offered


def test_the_command_line_has_the_same_options_and_defaults() -> None:
    """What `polyak average` does without an option is what `average()` does without it."""
    command = cli.commands["average"]
    assert isinstance(command, click.Command)
    settings, stages = parse_options({})
    parsed: dict[str, Any] = {}
    for part in (*(getattr(settings, name) for name in PARTS), stages):
        parsed |= {one.name: getattr(part, one.name) for one in fields(part)}
    offered = {p.name: p for p in command.params if p.name and p.name not in COMMAND}
    assert set(offered) == set(parsed)
    given: Any = {
        name: option.get_default(click.Context(command)) for name, option in offered.items()
    }
    # click marks what was not given; a flag that was not given is off.
    plain: Any = {
        k: v for k, v in given.items() if v is not None and isinstance(v, int | str | tuple)
    }
    again, around = parse_options(plain | {"batch_size": None})
    assert (again, around) == (settings, stages)


def test_the_command_line_offers_the_words_that_are_accepted() -> None:
    """A choice of the command line is complete, and none is refused afterwards."""
    types = {one.name: one.type for one in cli.commands["average"].params}
    hints = get_type_hints(Tensors)
    for name, words in (
        ("dtype", {*FLOATS}),
        ("optimizer", {*get_args(hints["optimizer"])}),
        ("match", {*get_args(hints["match"])}),
        ("lora", {*get_args(hints["lora"])}),
        ("allow", {*averaging_options.ALLOWED}),
    ):
        found = types[name]
        assert isinstance(found, click.Choice)
        assert {*found.choices} == words, name


def test_the_help_texts_have_the_defaults_that_are_used() -> None:
    """Where click has no default of its own, the help text has it in words."""
    options = [one for one in cli.commands["average"].params if isinstance(one, click.Option)]
    helps = {one.name: one.help or "" for one in options}
    settings, stages = parse_options({})
    assert f"[default: {stages.batch_size}]" in helps["batch_size"]
    assert f"[default: {settings.machine.max_memory >> 20}MiB]" in helps["max_memory"]


def test_the_record_has_the_options_that_decide_values() -> None:
    """An average can be computed again from its record alone."""
    recorded = {*records._OPTIONS, *records.YOUNGER_OPTIONS}
    assert {one.name for one in fields(Tensors)} == recorded
    for key, (_, default) in records.YOUNGER_OPTIONS.items():
        kept = getattr(Tensors(), key)
        assert (list(kept) if isinstance(kept, tuple) else kept) == default, key


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"last": "5"}, "last is '5'; expected a whole number"),
        ({"exclude": "*.h5"}, "exclude is a single string; expected a list of globs"),
        ({"coefficients": "1,2"}, "coefficients is a single string; expected a list of numbers"),
        ({"dtype": "int8"}, "--dtype is int8; expected one of float16"),
        ({"allow": ["anything"]}, "--allow is anything; expected one of two-runs"),
        ({"allow": "two-runs"}, "allow is a single string; expected a list of words"),
        ({"jobs": 0}, "--jobs is 0; expected at least 1"),
        ({"max_memory": 5}, "--max-memory is 5; expected at least 1048576"),
        ({"on_unhealthy": "maybe"}, "--on-unhealthy is maybe; expected one of fail, skip"),
        ({"on_unhealthy": "skip", "use_ema": True}, "--on-unhealthy checks the model's own"),
        ({"trust_code": True}, "--trust-code belongs to --recalibrate, which is missing"),
        ({"scheme": "linear", "alpha": 2.0}, "alpha"),
    ],
)
def test_options_are_refused_by_name(options: Any, expected: str) -> None:
    """Each is refused before any checkpoint is looked for."""
    with pytest.raises(UsageError) as caught:
        parse_options(options)
    assert expected in str(caught.value)


def test_an_unknown_option_is_a_mistake_of_the_caller() -> None:
    """A misspelt keyword is a TypeError, as for any function."""
    wrong: Any = {"shceme": "exp"}
    with pytest.raises(TypeError, match="unknown option shceme"):
        parse_options(wrong)


def test_none_stands_for_the_default() -> None:
    """An option that is None is as if it had been left out."""
    keys: Any = dict.fromkeys(averaging_options.Options.__annotations__)
    assert averaging_options.parse(keys) == averaging_options.parse({})


@pytest.mark.parametrize(
    ("given", "meant"), [("--lsat", "--last"), ("--shceme", "--scheme"), ("--average", "")]
)
def test_an_unknown_option_names_only_a_close_one(given: str, meant: str, tmp_path: Path) -> None:
    """A slip of the fingers is recognised; nothing far-fetched is offered."""
    done = polyak("average", "ckpts", given, "3", cwd=tmp_path)
    assert done.returncode == 2
    assert ("Did you mean" in done.stderr) == bool(meant)
    assert meant in done.stderr
