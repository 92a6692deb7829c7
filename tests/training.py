"""Networks trained by plain numpy, for tests that need checkpoints of honest runs.

Knows nothing of the program.  Derivatives are written out, and no framework is imported, so that a
run of ten epochs takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
Rates = Callable[[float], float]


@dataclass(eq=False)
class Node:
    """A value, its gradient, and how the gradient flows on to what it was computed from."""

    value: Array
    sources: list[tuple[Node, Callable[[Array], Array]]] = field(default_factory=list)
    grad: Array | None = None


def backward(loss: Node) -> None:
    """Compute the gradients of everything that a loss was computed from."""
    order: list[Node] = []
    seen: set[int] = set()

    def visit(node: Node) -> None:
        if id(node) not in seen:
            seen.add(id(node))
            for source, _ in node.sources:
                visit(source)
            order.append(node)

    visit(loss)
    loss.grad = np.ones_like(loss.value)
    for node in reversed(order):
        for source, flow in node.sources:
            part = flow(node.grad)  # type: ignore[arg-type]
            source.grad = part if source.grad is None else source.grad + part


def matmul(a: Node, b: Node) -> Node:
    """Return ``a @ b``."""
    return Node(a.value @ b.value, [(a, lambda g: g @ b.value.T), (b, lambda g: a.value.T @ g)])


def add(a: Node, b: Node) -> Node:
    """Return the sum; ``b`` may be one row."""
    rows = tuple(range(a.value.ndim - b.value.ndim))
    return Node(a.value + b.value, [(a, lambda g: g), (b, lambda g: g.sum(axis=rows))])


def relu(a: Node) -> Node:
    """Return the positive part."""
    return Node(np.maximum(a.value, 0), [(a, lambda g: g * (a.value > 0))])


def tanh(a: Node) -> Node:
    """Return the hyperbolic tangent."""
    value = np.tanh(a.value)
    return Node(value, [(a, lambda g: g * (1 - value**2))])


def flatten(a: Node) -> Node:
    """Return one row for each example."""
    return Node(a.value.reshape(len(a.value), -1), [(a, lambda g: g.reshape(a.value.shape))])


def look_up(table: Node, words: Array) -> Node:
    """Return the mean of the rows of a table that each example names."""

    def flow(g: Array) -> Array:
        grad = np.zeros_like(table.value)
        np.add.at(grad, words, g[:, None] / words.shape[1])
        return grad

    return Node(table.value[words].mean(axis=1), [(table, flow)])


def conv(x: Node, kernel: Node) -> Node:
    """Return a convolution without padding: images (n, h, w, c), kernel (k, k, c, d)."""
    size = kernel.value.shape[0]
    h, w = (x.value.shape[axis] - size + 1 for axis in (1, 2))
    places = [(i, j) for i in range(size) for j in range(size)]

    def cut(values: Array, i: int, j: int) -> Array:
        return values[:, i : i + h, j : j + w]

    def to_x(g: Array) -> Array:
        grad = np.zeros_like(x.value)
        for i, j in places:
            cut(grad, i, j)[...] += g @ kernel.value[i, j].T
        return grad

    def to_kernel(g: Array) -> Array:
        rows = g.reshape(-1, g.shape[-1])
        parts = [cut(x.value, i, j).reshape(len(rows), -1).T @ rows for i, j in places]
        return np.reshape(parts, kernel.value.shape)

    value = sum(cut(x.value, i, j) @ kernel.value[i, j] for i, j in places)
    return Node(np.asarray(value), [(x, to_x), (kernel, to_kernel)])


def cross_entropy(logits: Node, labels: Array) -> Node:
    """Return the mean loss of labels that are classes."""
    shifted = logits.value - logits.value.max(axis=1, keepdims=True)
    shares = np.exp(shifted)
    shares /= shares.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    delta = shares.copy()
    delta[rows, labels] -= 1
    loss = -np.log(shares[rows, labels] + 1e-12).mean()
    return Node(np.asarray(loss), [(logits, lambda g: g * delta / len(labels))])


def squares(found: Node, wanted: Array) -> Node:
    """Return the mean squared error."""
    difference = found.value - wanted
    return Node(
        np.asarray((difference**2).mean()),
        [(found, lambda g: g * 2 * difference / difference.size)],
    )


# --- networks -------------------------------------------------------------------------------------


def glorot(rng: np.random.Generator, *shape: int) -> Array:
    """Return Keras's default initial kernel."""
    field_size = int(np.prod(shape[:-2]))
    bound = np.sqrt(6 / (field_size * (shape[-2] + shape[-1])))
    return rng.uniform(-bound, bound, shape)


@dataclass(frozen=True)
class Network:
    """How a network is initialised, and the loss of a batch."""

    create: Callable[[np.random.Generator], Tensors]
    loss: Callable[[Mapping[str, Node], Array, Array], Node]
    data: str = "pixels"
    frozen: tuple[str, ...] = ()


def make_dense(
    widths: tuple[int, ...], last: str = "glorot", activation: Callable[[Node], Node] = relu
) -> Network:
    """Return layers of these widths, with a bias each."""

    def create(rng: np.random.Generator) -> Tensors:
        made: Tensors = {}
        for k, (a, b) in enumerate(pairwise(widths)):
            final = k == len(widths) - 2
            kernel = glorot(rng, a, b)
            made[f"w{k}"] = np.zeros_like(kernel) if final and last == "zeros" else kernel
            made[f"b{k}"] = np.zeros(b)
        return made

    def loss(p: Mapping[str, Node], x: Array, y: Array) -> Node:
        z = Node(x)
        for k in range(len(widths) - 1):
            z = add(matmul(z, p[f"w{k}"]), p[f"b{k}"])
            if k < len(widths) - 2:
                z = activation(z)
        return squares(z, x) if widths[0] == widths[-1] else cross_entropy(z, y)

    return Network(create, loss)


def make_conv(channels: int = 16) -> Network:
    """Return two convolutions and a dense layer."""

    def create(rng: np.random.Generator) -> Tensors:
        return {
            "k0": glorot(rng, 3, 3, 1, channels),
            "c0": np.zeros(channels),
            "k1": glorot(rng, 3, 3, channels, channels * 2),
            "c1": np.zeros(channels * 2),
            "w": glorot(rng, 16 * channels * 2, 10),
            "b": np.zeros(10),
        }

    def loss(p: Mapping[str, Node], x: Array, y: Array) -> Node:
        z = relu(add(conv(Node(x.reshape(-1, 8, 8, 1)), p["k0"]), p["c0"]))
        z = relu(add(conv(z, p["k1"]), p["c1"]))
        return cross_entropy(add(matmul(flatten(z), p["w"]), p["b"]), y)

    return Network(create, loss)


def make_embedding(width: int = 16, spread: float = 0.05) -> Network:
    """Return the mean of word vectors, and two dense layers."""

    def create(rng: np.random.Generator) -> Tensors:
        return {
            "table": rng.uniform(-spread, spread, (500, width)),
            "w0": glorot(rng, width, 32),
            "b0": np.zeros(32),
            "w1": glorot(rng, 32, 10),
            "b1": np.zeros(10),
        }

    def loss(p: Mapping[str, Node], x: Array, y: Array) -> Node:
        z = relu(add(matmul(look_up(p["table"], x), p["w0"]), p["b0"]))
        return cross_entropy(add(matmul(z, p["w1"]), p["b1"]), y)

    return Network(create, loss, "words")


def make_factors(rank: int = 8) -> Network:
    """Return LoRA's factors beside frozen kernels: ``a`` is random and ``b`` begins at zero."""

    def create(rng: np.random.Generator) -> Tensors:
        base = np.random.default_rng(99)  # the pretrained model is the same whatever the seed
        made: Tensors = {}
        for k, (n, m) in enumerate(((64, 64), (64, 10))):
            made[f"w{k}"] = glorot(base, n, m)
            made[f"a{k}"] = rng.uniform(-1, 1, (n, rank)) / np.sqrt(n)
            made[f"z{k}"] = np.zeros((rank, m))
        return made

    def loss(p: Mapping[str, Node], x: Array, y: Array) -> Node:
        z = Node(x)
        for k in range(2):
            low = matmul(matmul(z, p[f"a{k}"]), p[f"z{k}"])
            z = add(matmul(z, p[f"w{k}"]), low)
            z = relu(z) if k == 0 else z
        return cross_entropy(z, y)

    return Network(create, loss, frozen=("w0", "w1"))


# --- training -------------------------------------------------------------------------------------


@dataclass
class Sgd:
    """Gradient descent with momentum."""

    rate: float = 0.1
    momentum: float = 0.0

    def step(self, state: Tensors, name: str, grad: Array, rate: float) -> Array:
        """Return how far a tensor moves."""
        if not self.momentum:
            return -rate * grad
        state[name] = self.momentum * state.get(name, np.zeros_like(grad)) - rate * grad
        return state[name]


@dataclass
class Adam:
    """Adam (Kingma and Ba, 2015); without `first`, RMSprop."""

    rate: float = 0.001
    first: float = 0.9
    second: float = 0.999

    def step(self, state: Tensors, name: str, grad: Array, rate: float) -> Array:
        """Return how far a tensor moves."""
        zero = np.zeros_like(grad)
        t = state[f"{name}.t"] = state.get(f"{name}.t", np.zeros(())) + 1
        m = state[f"{name}.m"] = self.first * state.get(f"{name}.m", zero) + (1 - self.first) * grad
        v = state[f"{name}.v"] = (
            self.second * state.get(f"{name}.v", zero) + (1 - self.second) * grad**2
        )
        corrected = np.sqrt(v / (1 - self.second**t)) + 1e-7
        return -rate * (m / (1 - self.first**t)) / corrected


def make_data(kind: str, rows: int = 512) -> tuple[Array, Array]:
    """Return examples and their classes; the same whatever the seed of a network."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 10, rows)
    if kind == "words":
        usual = rng.integers(0, 500, (10, 40))
        chosen = usual[labels[:, None], rng.integers(0, 40, (rows, 12))]
        noise = rng.integers(0, 500, (rows, 12))
        return np.where(rng.random((rows, 12)) < 0.5, chosen, noise), labels
    centres = rng.uniform(0, 1, (10, 64)) * (rng.random((10, 64)) < 0.5)
    return np.clip(centres[labels] + rng.normal(0, 0.35, (rows, 64)), 0, 1), labels


@dataclass
class Training:
    """A training run between two epochs; a deep copy of it goes on in the same way."""

    network: Network
    optimizer: Sgd | Adam
    rng: np.random.Generator  # of the initial values, then of the order of the examples
    values: Tensors = field(init=False)
    state: Tensors = field(init=False, default_factory=dict)  # the optimizer's

    def __post_init__(self) -> None:
        self.values = self.network.create(self.rng)

    def train_epoch(
        self, x: Array, y: Array, *, batch: int, factors: Rates, decay: float = 0.0
    ) -> None:
        """Train on all examples once, in random order.

        Args:
            x: inputs.
            y: classes or targets.
            batch: examples in a step.
            factors: share of the epoch that is over -> factor of the rate.
            decay: of the weights, decoupled, at each step.
        """
        order = self.rng.permutation(len(y))
        for first in range(0, len(y), batch):
            rate = self.optimizer.rate * factors(first / len(y))
            chosen = order[first : first + batch]
            nodes = {name: Node(value) for name, value in self.values.items()}
            backward(self.network.loss(nodes, x[chosen], y[chosen]))
            for name, node in nodes.items():
                if name not in self.network.frozen and node.grad is not None:
                    moved = self.optimizer.step(self.state, name, node.grad, rate)
                    self.values[name] = self.values[name] * (1 - rate * decay) + moved

    def export(self) -> Tensors:
        """Return the values as float32."""
        return {name: value.astype(np.float32) for name, value in self.values.items()}


def _return(factor: float, _share: float) -> float:
    return factor


def train(
    network: Network,
    optimizer: Sgd | Adam,
    *,
    seed: int = 0,
    epochs: int = 10,
    batch: int = 32,
    rates: Rates = lambda _epoch: 1.0,
    decay: float = 0.0,
    start: Mapping[str, Array] | None = None,
    rows: int = 512,
    examples: tuple[Array, Array] | None = None,
) -> list[Tensors]:
    """Return the initial values and those after each epoch, as float32.

    Args:
        network: what is trained.
        optimizer: with its rate.
        seed: of the initial values and of the order of the examples.
        epochs: how many.
        batch: examples in a step.
        rates: epoch -> factor of the rate.
        decay: of the weights, decoupled, at each step.
        start: values to begin with in place of random ones.
        rows: examples of an epoch.
        examples: inputs and classes in place of those of the network's kind of data.
    """
    training = Training(network, optimizer, np.random.default_rng(seed))
    training.values.update({k: value.astype(np.float64) for k, value in (start or {}).items()})
    x, y = examples or make_data(network.data, rows)
    kept = [training.export()]
    for epoch in range(epochs):
        factor = rates(epoch)
        training.train_epoch(x, y, batch=batch, factors=partial(_return, factor), decay=decay)
        kept.append(training.export())
    return kept
