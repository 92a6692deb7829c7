"""Find and call functions of the user, named as MODULE.py:FUNCTION or package.module:FUNCTION.

The user names the code, and trusts it by naming it; it runs in this process.  Nothing that a
checkpoint names is ever found here.  This module knows no rows and no models.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TypeAlias

from polyak_cli.errors import PolyakError, UsageError, shown
from polyak_cli.evaluation.quiet import silence_frameworks
from polyak_cli.storage.local import open_local

#: What makes a model: a file, MODULE.py:FUNCTION, or in Python the function itself.
Maker: TypeAlias = str | os.PathLike[str] | Callable[..., object]


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function of the user.

    Attributes:
        path: the file that it is in.
        name: its name.
        function: the function itself.
        folder: where its code finds other modules, as a script does.
    """

    path: Path
    name: str
    function: Callable[..., object]
    folder: str

    def call(self, *arguments: object) -> object:
        """Return what it returns.

        Raises:
            PolyakError: its code failed; the message is one line, and says in which line.
        """
        with self.running(f"{self.name}() failed"):
            return self.function(*arguments)

    @contextlib.contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Run its code, or code of what it returned, in the block.

        Raises:
            PolyakError: the code failed; the message is one line, and says in which line.
        """
        # Code may import its neighbours as late as in the block.
        with _first_on_path(self.folder), _reword_user_errors(self.path, what):
            yield

    def count_arguments(self) -> int:
        """Return how many arguments it needs."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # some written in C have no signature
            return 0
        return sum(
            one.default is one.empty
            and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
            for one in parameters
        )


def is_function(source: str) -> bool:
    """Return whether a text names a function, whether or not there is one."""
    module, colon, function = source.rpartition(":")
    if not colon or not function.isidentifier():
        return False
    return module.lower().endswith(".py") or all(p.isidentifier() for p in module.split("."))


def name_source(source: Maker) -> str:
    """Return the text that names a model: a path or a function as it is, a function by its module.

    Raises:
        UsageError: a function has no name of its own in its module, such as a lambda.
    """
    if not callable(source):
        return os.fspath(source)
    home, name = str(getattr(source, "__module__", "")), str(getattr(source, "__qualname__", ""))
    # A notebook's functions are in the module `__main__`.
    if getattr(sys.modules.get(home), name, None) is not source:
        raise UsageError(
            f"model {shown(name or source, 60)}: is not a function of a module by its own name; "
            "define it at the top of a module or notebook"
        )
    return f"{home}:{name}"


def find_function(source: str, expected: str) -> UserFunction:
    """Import the module of a function of the user, and return the function.

    Raises:
        UsageError: the module has no such function.
        PolyakError: there is no such file or module (``expected`` says what could be), or its code
            failed.
    """
    module, _, name = source.rpartition(":")
    if module.lower().endswith(".py"):
        path = Path(module)
        if not path.is_file():
            raise PolyakError(f"{shown(path)}: there is no such file; {expected}")
        folder = str(path.resolve().parent)
        with _first_on_path(folder), _reword_user_errors(path, "cannot be loaded"):
            imported = _import_file(path)
    else:
        folder = str(Path.cwd())
        imported = _import_module(source, module, expected)
        path = Path(getattr(imported, "__file__", None) or module)
    found = getattr(imported, name, None)
    if not callable(found):
        raise UsageError(f"{shown(path)}: has no function '{shown(name)}'")
    return UserFunction(path, name, found, folder)


def _import_module(source: str, module: str, expected: str) -> object:
    """Import a module by its dotted name, from the current folder too, as `python -m` does."""
    with _first_on_path(str(Path.cwd())), silence_frameworks():
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            # One that is not there is a typing error; one that it imports is missing.
            if f"{module}.".startswith(f"{error.name}."):
                raise PolyakError(f"{shown(source)}: there is no such module; {expected}") from None
            failed: BaseException = error
        except (Exception, SystemExit) as error:
            failed = error
    raise PolyakError(
        f"{shown(source)}: cannot be loaded: {type(failed).__name__}: {shown(failed)}"
        f"{_advise_install(failed)}"
    ) from failed


#: Files of the user that were imported: path -> their text, and the module.
_modules: dict[Path, tuple[bytes, ModuleType]] = {}


def _import_file(path: Path) -> object:
    """Import a file of the user, unless it was imported before and has the same text still."""
    with open_local(path) as file, file.stream() as stream:
        place, text = path.resolve(), stream.read()
    known, module = _modules.get(place, (b"", None))
    if module is None or known != text:
        module = _execute_file(path)
        _modules[place] = text, module
    sys.modules[module.__name__] = module  # another file may have had its name since
    return module


def _execute_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_name_module(path), path)
    if spec is None or spec.loader is None:
        raise ImportError("it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look for it there
    spec.loader.exec_module(module)
    return module


_imported: set[str] = set()  # names of files of the user


def _name_module(path: Path) -> str:
    """Return a name for a file: its own, unless another module has that."""
    name = path.stem
    if name not in _imported:
        if not name.isidentifier() or name in sys.modules:
            return f"polyak_data_{name}"
        known = importlib.util.find_spec(name)
        if known and Path(known.origin or "").resolve() != path.resolve():
            return f"polyak_data_{name}"
    # Processes that a DataLoader starts import it by this name.
    _imported.add(name)
    return name


@contextlib.contextmanager
def _first_on_path(folder: str) -> Iterator[None]:
    """Have modules be looked for in a folder first."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # code of the user may have replaced the path
            sys.path.remove(folder)


@contextlib.contextmanager
def _reword_user_errors(path: Path, what: str) -> Iterator[None]:
    """Replace an exception in code of the user by an error of one line with its line number."""
    try:
        with silence_frameworks():  # it may import a framework
            yield
    except PolyakError:  # it has its words
        raise
    except (Exception, SystemExit) as error:
        line = _line_in(path, error)
        where = f"line {line}: " if line else ""
        raise PolyakError(
            f"{shown(path)}: {what}: {where}{type(error).__name__}: {shown(error)}"
            f"{_advise_install(error)}"
        ) from error


def _advise_install(error: BaseException) -> str:
    """Return which extra brings a framework that code of the user could not import, or nothing."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    extra = {"torch": "torch", "tensorflow": "tensorflow", "keras": "tensorflow"}.get(missing or "")
    return f"; pip install 'polyak[{extra}]'" if extra else ""


def _line_in(path: Path, error: BaseException) -> int | None:
    """Return the number of the innermost line of the file in the traceback, or None."""
    # Python makes the name of an imported file absolute.
    own = {str(path), str(path.absolute())}
    if isinstance(error, SyntaxError) and error.filename in own:
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename in own]
    return lines[-1] if lines else None
