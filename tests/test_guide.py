"""README and guide tell the truth: their examples run, and all that the program has is in them."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import click
import pytest

import polyak_cli
from polyak_cli.averaging.schemes import SCHEMES
from polyak_cli.cli import cli
from polyak_cli.cli.guide import INDEX, list_pages
from polyak_cli.cli.options import Command
from tests import api_page, commands_page
from tests.command import POLYAK, Done, environment, one_line, polyak
from tests.test_cli import on_terminal

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "polyak_cli/guide"
README = ROOT / "README.md"
PAGES = [README, *sorted(GUIDE.glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
PROMISES = (GUIDE / "promises.md").read_text()
#: Columns of a page; an editor beside a terminal shows them.
WIDEST = 110
#: What a command or an import needs beyond what averaging needs -> the package that is looked for.
EXTRAS = {
    r"polyak (evaluate|recalibrate|sweep|train)\b|--recalibrate\b": "tensorflow",
    r"\b(net|plain)\.py\b|^from net\b": "torch",  # on the page on PyTorch
    r"\b(lm\.py\b|transformers\b)": "transformers",  # on the page on Hugging Face
    r"--plot\b": "matplotlib",
    r"--engine dask\b": "distributed",
    r"--engine mpi\b": "mpi4py",
    r"^(?:from|import) polyak_cli\.callbacks": "keras",
    r"^(?:from|import) (keras|tensorflow|torch|safetensors|sklearn)\b": "",
}


#: Options of Dask and Slurm in the text, and of the tools on the page of recipes.
OTHERS = {"--no-dashboard", "--nodes", "--nthreads", "--ntasks", "--ntasks-per-node"}
OTHERS |= {"--checkpoint-upper-bound", "--inputs", "--num-epoch-checkpoints"}  # fairseq
OTHERS |= {"--num-update-checkpoints"}
OTHERS |= {"--input", "--no-sort", "--no-use-ema"}  # timm
OTHERS |= {"--avg", "--epoch", "--use-averaged-model"}  # icefall
OTHERS |= {"--rounds", "--size"}  # of the bench of buckets


class Block(NamedTuple):
    """A block of code of a page."""

    language: str
    text: str

    def find_missing(self) -> str:
        """Return a package that the block needs and that is not installed here, or nothing."""
        for pattern, package in EXTRAS.items():
            for found in re.finditer(pattern, self.text, re.MULTILINE):
                needed = package or found[1]
                if importlib.util.find_spec(needed) is None:
                    return needed
        return ""


def find_blocks(text: str) -> list[Block]:
    """Return the blocks of a page that run, in order."""
    found = re.findall(r"^```(sh|python)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(*one) for one in found]


def run(block: Block, folder: Path) -> Done:
    """Run a block as a user would, who has polyak on the PATH."""
    command = ["bash", "-euc"] if block.language == "sh" else [sys.executable, "-c"]
    return subprocess.run(
        [*command, block.text],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def find_outputs(block: Block, folder: Path) -> list[Path]:
    """Return the files that the commands of a block are asked to write."""
    if block.language != "sh":
        return []
    named = re.findall(r"\bpolyak .*? -o (\S+)", re.sub(r"#.*", "", block.text))
    outputs = [folder / name for name in named]
    return [file for path in outputs for file in (path.iterdir() if path.is_dir() else [path])]


#: Pages that train or score for a quarter of a minute and more; README shows the same commands.
LONG = ("tutorial", "worth", "training", "recipes")


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.soak if page.stem in LONG else ())
        for page in PAGES
        if find_blocks(page.read_text())
    ],
    ids=lambda page: page.stem,
)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """They run in order in one folder, each to its end, and write what they name.

    At the first that needs a package which is not installed the rest of the page is skipped.
    """
    shutil.copytree(ROOT / "sample_checkpoints", tmp_path / "sample_checkpoints")
    for block in find_blocks(page.read_text()):
        if missing := block.find_missing():
            pytest.skip(f"the rest of {page.name} needs {missing}")
        done = run(block, tmp_path)
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        for output in find_outputs(block, tmp_path):
            assert output.stat().st_size > 0, output


def test_a_broken_example_is_seen(tmp_path: Path) -> None:
    """A failing command, and one before the last of a block, is no success; others leave files."""
    text = (
        "```text\nfalse\n```\n```sh\nfalse\ntrue\n```\n```python\nopen('a', 'w').write('a')\n```\n"
    )
    shell, python = find_blocks(text)
    assert run(shell, tmp_path).returncode == 1
    assert run(python, tmp_path).returncode == 0
    assert (tmp_path / "a").read_text() == "a"
    writing = Block("sh", "polyak average c/ -o a  # -o b\n")
    assert find_outputs(writing, tmp_path) == [tmp_path / "a"]
    assert Block("python", "import no_such_package").find_missing() == ""
    assert Block("python", "import torch").find_missing() in ("", "torch")


def test_there_are_examples() -> None:
    """The tests of examples do not run over nothing."""
    languages = [block.language for page in PAGES for block in find_blocks(page.read_text())]
    assert languages.count("sh") >= 8
    assert languages.count("python") >= 1


# --- what is in it --------------------------------------------------------------------------------


def test_every_page_is_in_the_index_with_its_title() -> None:
    """The index lists each page once, under one of the four kinds, by the heading of the page."""
    entries = list_pages()
    topics = [entry.topic for entry in entries]
    assert sorted(topics) == sorted(page.stem for page in GUIDE.glob("*.md") if page.stem != INDEX)
    kinds = list(dict.fromkeys(entry.kind for entry in entries))
    assert kinds == ["Tutorial", "How-to", "Reference", "Explanation"]
    for entry in entries:
        first = (GUIDE / f"{entry.topic}.md").read_text().splitlines()[0]
        assert first == f"# {entry.title}"
        assert len(f"  {entry.topic:12}  {entry.summary}") <= 80, entry.topic


@pytest.mark.parametrize("writer", [api_page, commands_page], ids=["api", "commands"])
def test_a_page_that_is_written_by_a_program_is_current(writer: ModuleType) -> None:
    """Help texts and docstrings were not changed since; `python -m tests.commands_page` writes."""
    # In a process of its own: click keeps the help option that a command had in an earlier test.
    code = f"import sys, {writer.__name__} as p; sys.stdout.buffer.write(p.make_page().encode())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, check=False
    )
    page = writer.PAGE.read_text(encoding="utf-8")
    assert page == done.stdout.decode(), f"run python -m {writer.__name__}; {done.stderr.decode()}"


def test_every_public_name_is_in_the_guide() -> None:
    """Each has its heading in the reference of Python, and a signature or what it is."""
    page = (GUIDE / "api.md").read_text()
    for name in set(polyak_cli.__all__) - {"__version__"}:
        found = re.search(rf"^### {name}\n\n```text\n(?:class )?{name}\b", page, re.MULTILINE)
        assert found, name


def test_every_command_option_scheme_and_exit_code_is_in_the_guide() -> None:
    """Nothing that the program can do is left out."""
    guide = "\n".join(page.read_text() for page in GUIDE.glob("*.md"))
    for name, command in cli.commands.items():
        assert f"polyak {name}" in guide
        for option in (one for one in command.params if isinstance(one, click.Option)):
            for spelled in (*option.opts, *option.secondary_opts):
                assert re.search(rf"(?<![\w-]){spelled}(?![\w-])", guide), f"{name} {spelled}"
    for name in SCHEMES:
        assert f"`{name}" in guide
    for code in (0, 1, 2, 3, 130, 143):
        assert re.search(rf"\b{code}\b", guide), code


def test_every_command_names_a_page_that_exists() -> None:
    """The last line of a help text can be typed."""
    for name, command in cli.commands.items():
        assert isinstance(command, Command)
        assert (GUIDE / f"{command.guide}.md").is_file(), name
        assert (command.epilog or "").endswith(f"Guide: polyak guide {command.guide}")


def test_every_option_the_text_names_exists() -> None:
    """An option that was renamed or removed does not live on in the text."""
    known = {
        option
        for command in cli.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", TEXT))
    assert named - known <= {"--help", "--version", *OTHERS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_of_a_page_is_too_long(page: Path) -> None:
    """A line has at most 110 characters."""
    assert [line for line in page.read_text().splitlines() if len(line) > WIDEST] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    """A link to a file of the clone, and to a heading in it, resolves."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, heading = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in titles]
            assert heading in slugs, target


# --- polyak guide and polyak help -----------------------------------------------------------------


def test_guide_lists_the_topics_and_prints_a_page_as_it_is(tmp_path: Path) -> None:
    """Without a topic the list, with one the Markdown of the page, byte for byte in a pipe."""
    done = polyak("guide", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^  ([\w-]+) ", done.stdout, re.MULTILINE) == [e.topic for e in list_pages()]
    assert max(map(len, done.stdout.splitlines())) <= 80
    done = polyak("guide", "schemes", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, (GUIDE / "schemes.md").read_text())


def test_guide_takes_the_name_of_a_command(tmp_path: Path) -> None:
    """Who knows the command finds its page."""
    done = polyak("guide", "verify", cwd=tmp_path)
    assert done.stdout == (GUIDE / "verifying.md").read_text()


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        ("verfying", "no page verfying; did you mean verifying? polyak guide lists the pages"),
        ("xyzzy", "no page xyzzy; polyak guide lists the pages"),
        ("../../README", "no page ../../README; polyak guide lists the pages"),
    ],
)
def test_an_unknown_topic_is_refused_with_the_nearest(
    topic: str, expected: str, tmp_path: Path
) -> None:
    """One line and exit 2; a path is no topic."""
    done = polyak("guide", topic, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert one_line(done.stderr).endswith(expected)


@pytest.mark.parametrize("name", [None, *sorted(cli.commands)])
def test_help_is_the_help_of_the_command(name: str | None, tmp_path: Path) -> None:
    """`polyak help NAME`, `polyak NAME -h` and `polyak NAME --help` print the same."""
    named = [] if name is None else [name]
    texts = {
        polyak(*arguments, cwd=tmp_path).stdout
        for arguments in (["help", *named], [*named, "-h"], [*named, "--help"])
    }
    assert len(texts) == 1
    assert texts.pop().startswith(f"Usage: {' '.join(['polyak', *named])} ")


@pytest.mark.parametrize(
    "arguments",
    ["help", "help sweep", "guide", "completion bash", "inspect --json", "diff --json"],
)
def test_a_terminal_shows_a_laid_out_text_as_it_is(arguments: str, tmp_path: Path) -> None:
    """Help, the list of pages, a script and JSON have the lines that a pipe gets."""
    names = [f"a name of many short words, the last of which is its number {k}.h5" for k in (1, 2)]
    for name in names:
        shutil.copy(ROOT / "sample_checkpoints/model_499.h5", tmp_path / name)
    words = [*arguments.split(), *(names if "--json" in arguments else [])]
    code, text = on_terminal([*POLYAK, *words], tmp_path, columns=80, TERM="xterm")
    done = polyak(*words, cwd=tmp_path)
    assert (code, text.replace("\r\n", "\n")) == (done.returncode, done.stdout)


def test_a_terminal_shows_a_page_with_a_pager(tmp_path: Path) -> None:
    """The page is formatted for its width; links name the command that shows the other page."""
    command = [*POLYAK, "guide", "index"]
    settings = {"PAGER": "sed s/^/paged:/", "TERM": "xterm-256color"}
    code, text = on_terminal(command, tmp_path, columns=60, **settings)
    assert code == 0
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in text.splitlines()]
    assert len(lines) > 24
    assert all(line.startswith("paged:") for line in lines)
    assert max(len(line.removeprefix("paged:")) for line in lines) <= 60
    assert "\x1b[" in text
    plain = " ".join(" ".join(lines).replace("paged:", "").split())
    assert "(polyak guide tutorial)" in plain
    assert ".md)" not in text


def test_a_short_page_needs_no_pager(tmp_path: Path) -> None:
    """A page that fits the screen is printed; so is every page where the terminal is dumb."""
    settings = {"PAGER": "false", "TERM": "xterm", "NO_COLOR": "1", "LINES": "500"}
    code, text = on_terminal([*POLYAK, "guide", "converting"], tmp_path, columns=200, **settings)
    assert (code, "Convert between formats" in text) == (0, True)
    settings = {"PAGER": "false", "TERM": "dumb"}
    code, text = on_terminal([*POLYAK, "guide", "index"], tmp_path, columns=80, **settings)
    assert (code, text.startswith("# Guide")) == (0, True)


def test_a_terminal_without_unicode_shows_plain_pages_and_escaped_names(tmp_path: Path) -> None:
    """In a Latin-1 or ASCII locale a page is Markdown, and other letters of a name are escaped."""
    settings = {"PAGER": "false", "TERM": "xterm", "PYTHONIOENCODING": "ascii"}
    code, text = on_terminal([*POLYAK, "guide", "schemes"], tmp_path, columns=80, **settings)
    assert (code, text.startswith("# Schemes")) == (0, True)
    name = "\N{GREEK SMALL LETTER ALPHA}.h5"
    shutil.copy(ROOT / "sample_checkpoints/model_499.h5", tmp_path / name)
    command = [*POLYAK, "inspect", name]
    code, text = on_terminal(command, tmp_path, columns=80, **settings)
    assert (code, text.startswith(r"\u03b1.h5: Keras HDF5")) == (0, True)


def test_help_of_an_unknown_command_is_refused(tmp_path: Path) -> None:
    """One line and exit 2."""
    done = polyak("help", "avrage", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no command avrage; did you mean average?" in one_line(done.stderr)


# --- what it says of tests ------------------------------------------------------------------------


def promises() -> list[list[str]]:
    """Return each promise: its name, what exactly it says, and the tests that keep it."""
    sections = re.split(r"^## ", PROMISES, flags=re.MULTILINE)[1:]
    found = []
    for section in sections:
        name, _, rest = section.partition("\n")
        found.append([name, *rest.split("\nKept by:\n")])
    return found


def named_tests(text: str) -> list[tuple[str, str]]:
    """Return (file or folder, name in it or nothing) of all that a text names below tests/."""
    found = []
    path = ""
    for named in re.findall(r"tests/[\w/.-]+(?:::\w+)*|(?<=`)(?:::\w+)+", text):
        file, _, name = named.partition("::")
        path = file or path
        found.append((path, name))
    return found


def defines(path: Path, name: str) -> bool:
    """Return whether a file defines a function, or a method by ``Class::method``."""
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for part in name.split("::"):
        inside = [d for d in body if isinstance(d, ast.ClassDef | ast.FunctionDef)]
        named = [d for d in inside if d.name == part]
        if not named:
            return False
        body = named[-1].body
    return True


def test_every_test_that_the_text_names_exists() -> None:
    """A promise does not outlive the test that keeps it."""
    for path, name in named_tests(TEXT):
        assert (ROOT / path).exists(), path
        assert not name or defines(ROOT / path, name), f"{path}::{name}"


def test_every_promise_is_kept_by_a_test() -> None:
    """Each promise says what exactly, and names a test by file and name."""
    assert len(promises()) >= 10
    for row in promises():
        assert len(row) == 3, row
        assert all(name for _, name in named_tests(row[2])), row[0]
        assert named_tests(row[2]), row[0]
