"""Tell which layer of one Keras checkpoint is which layer of another.

Keras numbers unnamed layers in the order in which they are made, lists the trained tensors of a
nested model before the frozen ones, and stores weights files by class and count only.  So position
and name may each mislead, and what they say together is compared here.  Knows tables, reads no
file, and does not know what is done with the pairs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from polyak_cli.errors import shown
from polyak_cli.tensors import OutlinedLayer, Table, TensorSpec

_NUMBER = re.compile(r"(.*?)(?:_(\d{1,18}))?", re.DOTALL)


class UnclearError(Exception):
    """Which layer is which cannot be known; says why, without the names of the files."""


class _Layer(NamedTuple):
    """What is known of a layer without its tensors."""

    name: str
    kind: str  # its class as automatic names have it; "" where it is not known

    def identify(self) -> tuple[str, str]:
        """Return what a layer has in common with itself in another checkpoint.

        An automatic name is the class and a number, which only counts: the class remains of it.  Of
        a name whose class is not known, the number may count too.
        """
        base, _ = _split_number(self.name)
        if not self.kind:
            return "base", base
        # tf_keras calls a Functional "model"; a class may itself end in a number, as Block_1.
        automatic = {self.kind, "model"} if self.kind == "functional" else {self.kind}
        is_automatic = base in automatic or self.name in automatic
        return ("class", self.kind) if is_automatic else ("name", self.name)

    @property
    def number(self) -> int:
        """The number that its name ends in; 0 without one, as Keras counts."""
        return _split_number(self.name)[1]


def _split_number(name: str) -> tuple[str, int]:
    """Return a name without the number that it ends in, and the number."""
    match = _NUMBER.fullmatch(name)
    base, number = match.groups() if match else (name, None)
    return (base, int(number)) if base and number else (name, 0)


def align(ours: Sequence[_Layer], theirs: Sequence[_Layer], by: str) -> list[int]:
    """Return for each of their layers, in a known order, the place of the same among ours.

    Layers with names of their own go by name, the others by their order among those of a class.

    Args:
        ours: layers of one model.
        theirs: layers of the other one.
        by: "name" refuses where names and order contradict each other, "numbers" accepts other
            numbers in automatic names, and "order" accepts other names too.

    Raises:
        UnclearError: they contradict each other, or there is no such layer.
    """
    found, wanted = ([layer.identify() for layer in side] for side in (ours, theirs))
    if Counter(found) == Counter(wanted):
        places: dict[tuple[str, str], deque[int]] = defaultdict(deque)
        for place, identity in enumerate(found):
            places[identity].append(place)
        pairs = [places[identity].popleft() for identity in wanted]
        if by == "name":
            _check_numbers([ours[place] for place in pairs], theirs)
        return pairs
    if by != "order" or len(ours) != len(theirs):
        gone, new = Counter(found) - Counter(wanted), Counter(wanted) - Counter(found)
        raise UnclearError(f"has the layers {_list(gone)} where the other has {_list(new)}")
    # Other names at the same places are the same layers renamed, if no name is at another place.
    for one, other, ours_identity, theirs_identity in zip(ours, theirs, found, wanted, strict=True):
        pair = {ours_identity: wanted, theirs_identity: found}
        is_class = one.kind == other.kind  # then automatic names may come and go
        if ours_identity != theirs_identity and any(
            identity in elsewhere and not (is_class and identity[0] == "class")
            for identity, elsewhere in pair.items()
        ):
            raise UnclearError(
                f"has the layer '{shown(one.name)}' where the other has '{shown(other.name)}'"
            )
    return list(range(len(ours)))


def _list(identities: Iterable[tuple[str, str]]) -> str:
    names = [f"'{shown(name, 60)}'" for _, name in identities]
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3) or "none"


def _check_numbers(ours: Sequence[_Layer], theirs: Sequence[_Layer]) -> None:
    """Refuse automatic names that count in another order: layers were made in another order."""
    sides: dict[tuple[str, str], list[tuple[_Layer, _Layer]]] = defaultdict(list)
    for one, other in zip(ours, theirs, strict=True):
        sides[other.identify()].append((one, other))
    for pairs in sides.values():
        ranks = [_rank([pair[side].number for pair in pairs]) for side in (0, 1)]
        for (one, other), before, after in zip(pairs, *ranks, strict=True):
            if before != after:
                raise UnclearError(
                    f"has the layer '{shown(one.name)}' where the other has "
                    f"'{shown(other.name)}', and they are numbered in another order"
                )


def _rank(numbers: Sequence[int]) -> list[int]:
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    ranks = [0] * len(numbers)
    for rank, place in enumerate(order):
        ranks[place] = rank
    return ranks


# --- whole models ---------------------------------------------------------------------------------

_Item = tuple[tuple[str, ...], TensorSpec]  # the parts of a variable's path below its layer


@dataclass(slots=True, eq=False)
class _Node:
    """A layer with its tensors and the layers inside it."""

    layer: _Layer
    below: list[_Node] = field(default_factory=list)
    own: list[_Item] = field(default_factory=list)
    all: list[_Item] = field(default_factory=list)

    def find(self, name: str) -> _Node | None:
        """Return the layer of a name inside it, however deep, if there is one such."""
        direct = [node for node in self.below if node.layer.name == name]
        if direct:
            return direct[0]
        # tf_keras, and models that were made before they were nested, leave out what is between.
        deeper = [found for node in self.below if (found := node.find(name))]
        return deeper[0] if len(deeper) == 1 else None


def pair_by_layers(ours: Table, theirs: Table, by: str = "order") -> dict[str, TensorSpec]:
    """Return for each of their tensors the one of ours that stands at its place in the model.

    The order in the files does not count inside a layer: Keras lists the trained tensors of a
    nested model first (``_legacy_weights``), so that freezing one layer moves others.

    Args:
        ours: a whole model, or the weights of one in the same layout.
        theirs: the template.
        by: see `align`.

    Raises:
        UnclearError: places and names do not tell.
    """
    # Without a configuration on one side, the classes of the other have nothing to go with.
    known = bool(ours.keras.outline and theirs.keras.outline)
    one, other = (_build_tree(table, known) for table in (ours, theirs))
    if len(one) != len(other):
        raise UnclearError(f"has {len(one)} layers with tensors where the other has {len(other)}")
    places = align([node.layer for node in one], [node.layer for node in other], by)
    return {
        wanted.name: found
        for place, node in zip(places, other, strict=True)
        for found, wanted in _pair_layer(one[place], node)
    }


def check_order(ours: Table, theirs: Table) -> None:
    """Refuse equal names at other places of the model, unless all of these were given by hand.

    Keras loads layers by their place, and an automatic name tells only when a layer was made.

    Raises:
        UnclearError: says which.
    """
    if ours.keras.layers == theirs.keras.layers and ours.keras.outline == theirs.keras.outline:
        return
    known = bool(ours.keras.outline and theirs.keras.outline)
    _check_order(*(_build_tree(table, known) for table in (ours, theirs)))


def _check_order(ours: Sequence[_Node], theirs: Sequence[_Node]) -> None:
    one, other = ([node.layer for node in side] for side in (ours, theirs))
    if one == other:
        places = list(range(len(one)))
    elif {layer.name for layer in one} != {layer.name for layer in other}:
        return  # paths have kept older names than the configuration, and these are compared
    else:
        # Without classes, a name may be automatic, and then it says less than its place.
        differing = next(
            ((a, b) for a, b in zip(one, other, strict=True) if a.name != b.name), None
        )
        if differing and not all(layer.kind for layer in differing):
            names = [shown(layer.name) for layer in differing]
            raise UnclearError(f"has the layer '{names[0]}' where the other has '{names[1]}'")
        places = align(one, other, "name")
    for place, node in zip(places, theirs, strict=True):
        _check_order(ours[place].below, node.below)


def _build_tree(table: Table, known: bool) -> list[_Node]:
    """Return the layers that have tensors, in the model's order, with what is inside them."""
    outlined = {
        node.layer.name: node for node in _read_outline(table.keras.outline if known else ())
    }
    nodes: list[_Node] = []
    rest = deque(table.keras.layers)
    for name, spec in table.tensors.items():
        # The tensors come layer by layer, and every layer of the list has some.
        if rest and name.startswith(f"{rest[0]}/"):
            layer = rest.popleft()
            nodes.append(outlined.get(layer) or _Node(_Layer(layer, "")))
        if not nodes or not name.startswith(f"{nodes[-1].layer.name}/"):
            raise UnclearError(f"has a tensor '{shown(name)}' that does not belong to a layer")
        _attach(nodes[-1], name[len(nodes[-1].layer.name) + 1 :], spec)
    for node in nodes:
        _prune(node)
    return nodes


def _read_outline(outline: Sequence[OutlinedLayer]) -> list[_Node]:
    """Return the layers of a configuration as a tree, without tensors."""
    top = _Node(_Layer("", ""))
    chain = [top]
    for depth, name, kind in outline:
        node = _Node(_Layer(name, kind))
        del chain[depth:]
        chain[-1].below.append(node)
        chain.append(node)
    return top.below


def _attach(node: _Node, path: str, spec: TensorSpec) -> None:
    """Add a tensor to the layer inside ``node`` that its path names."""
    parts = tuple(re.sub(r":\d+$", "", path).split("/"))
    # The scopes around the layer come first: the model's own name, or none.
    if node.layer.name in parts[:-1]:
        parts = parts[parts.index(node.layer.name) + 1 :]
    node.all.append((parts, spec))
    home = node
    while len(parts) > 1 and (inner := home.find(parts[0])):
        home, parts = inner, parts[1:]
        home.all.append((parts, spec))
    home.own.append((parts, spec))


def _prune(node: _Node) -> None:
    """Leave out the layers without tensors, such as inputs."""
    for inner in node.below:
        _prune(inner)
    node.below = [inner for inner in node.below if inner.own or inner.below]


def _pair_layer(ours: _Node, theirs: _Node) -> list[tuple[TensorSpec, TensorSpec]]:
    """Pair the tensors of two layers that are the same.

    Raises:
        UnclearError: neither names nor shapes tell them apart.
    """
    try:
        return list(_pair_nodes(ours, theirs))
    except UnclearError as error:
        return _pair_by_shape(ours, theirs, str(error))


def _pair_nodes(ours: _Node, theirs: _Node) -> Iterator[tuple[TensorSpec, TensorSpec]]:
    if len(ours.below) != len(theirs.below) or len(ours.own) != len(theirs.own):
        # One of the two was not understood, as where only one has a configuration.
        yield from _pair_paths(ours.all, theirs.all)
        return
    places = align([n.layer for n in ours.below], [n.layer for n in theirs.below], "order")
    for place, node in zip(places, theirs.below, strict=True):
        yield from _pair_nodes(ours.below[place], node)
    yield from _pair_paths(ours.own, theirs.own)


def _pair_paths(
    ours: Sequence[_Item], theirs: Sequence[_Item]
) -> Iterator[tuple[TensorSpec, TensorSpec]]:
    """Pair variables by their paths, in which numbers only count.

    ``lstm_cell`` and ``lstm_cell_1`` here are ``lstm_cell_4`` and ``lstm_cell_5`` there: the layers
    inside one another are made in one order whenever the same program makes them.
    """
    ours, theirs = _drop_common(ours), _drop_common(theirs)
    if len(ours) != len(theirs):
        raise UnclearError(f"has {len(ours)} tensors where the other has {len(theirs)}")
    one, other = _group_heads(ours), _group_heads(theirs)
    rest = [[head for head in a if head not in b] for a, b in ((one, other), (other, one))]
    if rest[0] or rest[1]:
        # A single one that is called differently is the same one.
        if [len(heads) for heads in rest] != [1, 1] or rest[0][0].is_tensor != rest[1][0].is_tensor:
            names = [_list(("base", head.base) for head in heads) for heads in rest]
            raise UnclearError(f"has {names[0]} where the other has {names[1]}")
        other[rest[0][0]] = other.pop(rest[1][0])
    for head, wanted in other.items():
        if head.is_tensor:
            yield one[head][0][1], wanted[0][1]
        else:
            yield from _pair_paths(one[head], wanted)


def _drop_common(items: Sequence[_Item]) -> Sequence[_Item]:
    """Return the paths without the scopes that all of them begin with."""
    while items and len(items[0][0]) > 1 and len({parts[0] for parts, _ in items}) == 1:
        if any(len(parts) < 2 for parts, _ in items):
            break
        items = [(parts[1:], spec) for parts, spec in items]
    return items


class _Head(NamedTuple):
    """The first part of some paths: its name without number, and its rank and count by number."""

    base: str
    rank: int
    twins: int  # that have the same base
    is_tensor: bool


def _group_heads(items: Iterable[_Item]) -> dict[_Head, list[_Item]]:
    """Group paths by their first part, whose parts follow."""
    named: dict[tuple[str, bool], list[_Item]] = defaultdict(list)
    for parts, spec in items:
        named[parts[0], len(parts) == 1].append((parts[1:], spec))
    alike: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for name, is_tensor in named:
        alike[_split_number(name)[0], is_tensor].append(name)
    return {
        _Head(base, rank, len(names), is_tensor): named[name, is_tensor]
        for (base, is_tensor), names in alike.items()
        for rank, name in enumerate(sorted(names, key=lambda name: _split_number(name)[1]))
    }


def _pair_by_shape(ours: _Node, theirs: _Node, why: str) -> list[tuple[TensorSpec, TensorSpec]]:
    """Pair tensors that only their last names and shapes tell apart.

    Raises:
        UnclearError: two are alike; says which, and why their paths do not tell.
    """

    def describe(item: _Item) -> tuple[str, tuple[int, ...]]:
        return _split_number(item[0][-1])[0], item[1].shape

    found = {describe(item): item[1] for item in ours.all}
    wanted = {describe(item): item[1] for item in theirs.all}
    if found.keys() == wanted.keys() and len(found) == len(ours.all) == len(theirs.all):
        return [(found[key], spec) for key, spec in wanted.items()]
    often = Counter(describe(item) for item in theirs.all).most_common(1)[0]
    twins = [item[1].name for item in theirs.all if describe(item) == often[0]]
    alike = (
        f"; '{shown(twins[0])}' and '{shown(twins[1])}' have the same shape, and Keras moves the "
        "tensors of frozen layers behind the others"
        if len(twins) > 1
        else ""
    )
    raise UnclearError(f"layer '{shown(ours.layer.name)}' {why}{alike}")


# --- weights files --------------------------------------------------------------------------------


def find_moved(ours: Table, theirs: Table, by: str) -> dict[str, str]:
    """Return the groups of a weights file whose layers ours has elsewhere: theirs -> ours.

    A path counts the layers of a class, so that layers which change places keep their paths; only
    the labels beside them tell.

    Args:
        ours: a table with the same names of tensors as the other.
        theirs: the template.
        by: see `align`.

    Raises:
        UnclearError: the labels contradict the paths, or one another.
    """
    one, other = ours.keras.labels, theirs.keras.labels
    # Older files have no labels, and then the paths are all that is known.
    if one == other or not one or not other:
        return {}
    groups = sorted({group for name in theirs.tensors for group in _list_groups(name)})
    inside: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        inside[group.rpartition("/")[0]].append(group)
    moved: dict[str, str] = {}
    _find_moved(("", ""), inside, (one, other), by, moved)
    return moved


def list_moved(tables: Sequence[Table], rows: Sequence[Sequence[TensorSpec]]) -> Iterator[str]:
    """Yield a note for each weights file that keeps a layer elsewhere than the template.

    Args:
        tables: of all checkpoints; the last is the template.
        rows: their tensors, paired.
    """
    others = [k for k, table in enumerate(tables) if table.keras.labels != tables[-1].keras.labels]
    for k in others:
        row = next((row for row in rows if row[k].name != row[-1].name), None)
        if row is not None and tables[k].keras.labels:
            yield (
                f"{shown(tables[k].path)} has layers in other places than "
                f"{shown(tables[-1].path)}, such as '{shown(row[k].name)}' for "
                f"'{shown(row[-1].name)}'; they are paired by their layers' names"
            )


def rename(names: Iterable[str], moved: Mapping[str, str]) -> Iterator[str]:
    """Yield names of tensors with their groups replaced as `find_moved` says."""
    for name in names:
        home, vars_, last = name.partition("/vars/")
        yield moved[f"/{home}"].removeprefix("/") + vars_ + last if f"/{home}" in moved else name


def _list_groups(name: str) -> Iterator[str]:
    """Yield the groups above a tensor's own, from the outside in."""
    home = f"/{name.removeprefix('/')}".partition("/vars/")[0]
    parts = home.split("/")
    yield from ("/".join(parts[: k + 1]) for k in range(1, len(parts)))


def _find_moved(
    at: tuple[str, str],
    inside: Mapping[str, Sequence[str]],
    labels: tuple[Mapping[str, str], Mapping[str, str]],
    by: str,
    moved: dict[str, str],
) -> None:
    """Compare what lies in two groups, ``at`` ours and theirs, and note what is elsewhere."""
    ours, theirs = (
        {group.rpartition("/")[2]: group for group in inside.get(place, ())} for place in at
    )
    if at[0] != at[1]:
        moved[at[1]] = at[0]
    if ours.keys() != theirs.keys():
        raise UnclearError(
            f"'{shown(at[0])}' holds other layers than '{shown(at[1])}', which has its name"
        )
    # A list has no variables of its own, and so no label: its layers are counted by class.
    is_list = all(place not in side for place, side in zip(at, labels, strict=True)) and at[0]
    if is_list:
        pairs = _pair_list(list(ours), at, labels, by)
    else:
        pairs = {name: name for name in ours}
        if by == "name":  # by order, the attributes count alone
            _check_attributes(list(ours), at, labels)
    for their_name, our_name in pairs.items():
        _find_moved((ours[our_name], theirs[their_name]), inside, labels, by, moved)


def _pair_list(
    names: Sequence[str],
    at: tuple[str, str],
    labels: tuple[Mapping[str, str], Mapping[str, str]],
    by: str,
) -> dict[str, str]:
    """Pair the layers of two lists, class by class."""
    classes: dict[str, list[str]] = defaultdict(list)
    for name in names:
        classes[_split_number(name)[0]].append(name)
    pairs: dict[str, str] = {}
    for kind, counted in classes.items():
        counted.sort(key=lambda name: _split_number(name)[1])
        sides = [
            [_Layer(labels[side].get(f"{at[side]}/{name}", ""), kind) for name in counted]
            for side in (0, 1)
        ]
        # A label that is missing tells nothing.
        if any(not layer.name for side in sides for layer in side):
            pairs |= {name: name for name in counted}
            continue
        places = align(sides[0], sides[1], by)
        pairs |= {name: counted[place] for name, place in zip(counted, places, strict=True)}
    return pairs


def _check_attributes(
    names: Sequence[str],
    at: tuple[str, str],
    labels: tuple[Mapping[str, str], Mapping[str, str]],
) -> None:
    """Refuse layers under one attribute whose names have changed places.

    Numbers do not count, because automatic names have them; and so attributes know better.
    """
    ours, theirs = (
        {name: _split_number(labels[side].get(f"{at[side]}/{name}", ""))[0] for name in names}
        for side in (0, 1)
    )
    for name in names:
        one, other = ours[name], theirs[name]
        if one and other and one != other and other in ours.values() and one in theirs.values():
            raise UnclearError(
                f"has the layer '{shown(one)}' as '{shown(at[0])}/{shown(name)}' where the other "
                f"has '{shown(other)}'"
            )
