"""Read and write Keras 3's `.keras`: a zip archive of configuration, weights file and assets.

The weights file is HDF5, and is read and written at its place in the archive.  A deflated one is
inflated into a temporary file without a name, for its header alone.  Executes nothing of the
configuration.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from polyak_cli.errors import FormatError, OutputError, shown, word_size
from polyak_cli.formats import conversion, zips
from polyak_cli.formats.format import Draft, Format, ScanRequest, SkeletonRequest
from polyak_cli.formats.hdf5 import keras_files, skeleton, weights_files
from polyak_cli.formats.hdf5.chunks import Chunks
from polyak_cli.formats.hdf5.library import Place
from polyak_cli.formats.hdf5.windows import Window
from polyak_cli.formats.keras import emas, from_models, vocabularies
from polyak_cli.formats.keras.names import WEIGHTS_SUFFIX
from polyak_cli.formats.keras.outline import label_groups
from polyak_cli.processes.sandbox import Heartbeat
from polyak_cli.storage import InputFile
from polyak_cli.tensors import Asset, Checksum, Extent, Placement, Table, TensorSpec

CONFIG, WEIGHTS, PICKLED = "config.json", "model.weights.h5", "model.weights.npz"
#: Where layers keep what is no tensor, such as a vocabulary that was adapted to data.
_ASSETS = "assets/"
#: Bytes of assets that are read and digested; those of the rest are known by the checksums that the
#: archive lists.  A bomb of many members would otherwise be inflated for hours.
_DIGESTED = 256 << 20
#: Of the weights file in the archive: its tensors keep the alignment that HDF5 gives them.
_ALIGNMENT = 64


def _label_layers(said: dict[str, Any], table: Table, found: Mapping[str, str]) -> Table:
    """Return the table with the names of its layers from the configuration, if the file has none.

    Newer versions of Keras store them beside the variables too.
    """
    if any(found.values()):
        return table
    homes = {spec.location.partition("/vars/")[0] for spec in table.tensors.values()}
    # A model inside the model holds no variables of its own, but those below it.
    groups = {group for home in homes for group in accumulate(home.split("/"), "{}/{}".format)}
    labels = label_groups(said, groups)
    return replace(table, keras=replace(table.keras, labels=labels))


def _find_emas(said: dict[str, Any], table: Table, labels: dict[str, str]) -> Table:
    """Return the table with the EMA slots of the model's tensors, or why there are none."""
    own = {spec.location: spec for spec in table.tensors.values()}
    state = {name: spec.shape for name, spec in table.others.items()}
    shapes = {at: spec.shape for at, spec in own.items()}
    try:
        version = table.about.get("keras_version", "")
        found = emas.find_slots(said, shapes, state, labels, version)
    except FormatError as error:
        cautions = {**table.rules.cautions, "ema": str(error)}
        return replace(table, rules=replace(table.rules, cautions=cautions))
    slots = {slot: [own[at].name for at in of] for slot, of in found.items()}
    return replace(table, keras=replace(table.keras, ema_slots=slots))


def _read_version(file: InputFile, members: Sequence[zips.Member]) -> dict[str, str]:
    """Return the version of Keras that saved the archive, if it is recorded."""
    for member in members:
        if member.name == "metadata.json":
            try:
                said = json.loads(zips.read_whole(file, member))
            except (ValueError, RecursionError):  # Keras itself does not need it
                return {}
            version = said.get("keras_version") if isinstance(said, dict) else None
            return {"keras_version": version} if isinstance(version, str) else {}
    return {}


def _find_parts(members: Sequence[zips.Member]) -> tuple[zips.Member, zips.Member]:
    """Return the members that hold the configuration and the weights."""
    named = {member.name: member for member in members}
    # The variables are dictionaries, which numpy can store as pickles only.
    if WEIGHTS not in named and PICKLED in named:
        raise FormatError(
            f"its weights are pickled ({PICKLED}), and pickles are never loaded; save it with "
            "model.save()"
        )
    # metadata.json may be missing: Keras does not need it to open a model.
    for name in (CONFIG, WEIGHTS):
        if name not in named:
            raise FormatError(f"has no member '{name}'; expected a whole Keras model")
    return named[CONFIG], named[WEIGHTS]


def _parse_configuration(content: bytes) -> dict[str, Any]:
    """Return the configuration of the model, without numbers that differ in every process."""

    def lasting(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Keras numbers shared objects by their addresses in memory.
        return {key: value for key, value in pairs if key != "shared_object_id"}

    try:
        parsed = json.loads(content, object_pairs_hook=lasting)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"its {CONFIG} is damaged: {shown(error)}") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"its {CONFIG} is damaged: it is not a JSON object")
    return parsed


def _digest_configuration(said: dict[str, Any]) -> str:
    """Digest a configuration without its training: the learning rate may fall with epochs."""
    lasting = {key: value for key, value in said.items() if key != "compile_config"}
    return hashlib.sha256(json.dumps(lasting, sort_keys=True).encode()).hexdigest()


def _find_assets(
    said: dict[str, Any],
    file: InputFile,
    members: Sequence[zips.Member],
    labels: Mapping[str, str],
    heartbeat: Heartbeat,
) -> dict[str, Asset]:
    """Return the assets of the archive and the vocabularies in its configuration.

    Args:
        said: the configuration.
        file: the archive.
        members: of the archive.
        labels: group of the weights file -> name of the layer, where Keras recorded it.
        heartbeat: sent with each piece that is read.

    Raises:
        FormatError: an asset is damaged.
    """
    found, names = vocabularies.find_in_configuration(said)
    assets = {f"{CONFIG}/{name}": asset for name, asset in found.items()}
    names |= {group[1:].removesuffix("/vars"): name for group, name in labels.items() if name}
    room = _DIGESTED
    for member in members:
        if member.name.startswith(_ASSETS):
            layer = member.name.removeprefix(_ASSETS).rpartition("/")[0]
            # The vocabulary of a TextVectorization lies also with the lookup layer inside it.
            owner = names.get(layer) or names.get(layer.rpartition("/")[0], "")
            room -= member.nbytes
            digest = _digest_member(file, member, heartbeat) if room >= 0 else f"{member.crc}"
            assets[member.name] = Asset(f"{member.nbytes}:{digest}", owner)
    return assets


def _digest_member(file: InputFile, member: zips.Member, heartbeat: Heartbeat) -> str:
    digest = hashlib.sha256()
    for piece in heartbeat.over(zips.read_pieces(file, member)):
        digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def _open_weights(file: InputFile, member: zips.Member, heartbeat: Heartbeat) -> Iterator[Window]:
    """Yield the weights file, open for reading; inflating one has also checked it."""
    if member.method == zips.STORED:
        yield Window(member.name, file, member.offset, member.nbytes)
        return
    # libhdf5 seeks in its file, and a deflated member can be read forwards only.
    with contextlib.ExitStack() as stack:
        try:
            copy = stack.enter_context(tempfile.TemporaryFile())
            for piece in heartbeat.over(zips.read_pieces(file, member)):
                copy.write(piece)
            copy.flush()
        except OSError as error:
            raise FormatError(
                f"reading the header of its deflated {member.name} needs a temporary file of "
                f"{word_size(member.nbytes)}, which cannot be written ({error.strerror}); set "
                "TMPDIR to a folder with room"
            ) from None
        yield Window(member.name, copy.fileno(), 0, member.nbytes)


def _place_in_archive(spec: TensorSpec, member: zips.Member) -> TensorSpec:
    """Return a tensor of the weights file with its place in the archive."""
    place = spec.storage
    is_deflated = member.method != zips.STORED
    if isinstance(place, Extent) and place.nbytes:
        if is_deflated:
            inflated = zips.Deflated(member.offset, member.stored, place.offset, place.nbytes)
            return replace(spec, storage=inflated)
        return replace(spec, storage=Extent(member.offset + place.offset, place.nbytes))
    if isinstance(place, Chunks):
        # A chunk is read at its own offset; a deflated member is read forwards only.
        if is_deflated:
            raise FormatError(
                f"tensor '{shown(spec.name)}' is stored in chunks inside a deflated member, which "
                "is not supported; save it with model.save()"
            )
        index = {
            at: (member.offset + start, nbytes, skipped)
            for at, (start, nbytes, skipped) in place.index.items()
        }
        return replace(spec, storage=replace(place, index=index))
    return spec


def _place_in_member(request: SkeletonRequest) -> SkeletonRequest:
    """Return the request for the weights file alone."""

    def inside(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        return {
            name: replace(spec, storage=Extent(spec.storage.start, spec.storage.nbytes))
            if isinstance(spec.storage, zips.Deflated)
            else spec
            for name, spec in specs.items()
        }

    template = request.template
    table = replace(
        template,
        tensors=inside(template.tensors),
        others=inside(template.others),
        rules=replace(template.rules, suffixes=(WEIGHTS_SUFFIX,)),
    )
    return request._replace(template=table)


def _list_weights(
    archive: zips.Archive, offset: int, written: Window, placements: Mapping[str, Placement]
) -> Draft:
    """List the weights file that was written at an offset of an archive; return the draft."""
    archive.list_written(WEIGHTS, offset, written.size)
    # libhdf5 counted offsets from the beginning of its window.
    moved = {
        where: place._replace(offset=offset + place.offset) for where, place in placements.items()
    }
    return Draft(moved, notes={"archive": archive.describe()})


class KerasArchive(Format):
    """The `.keras` archives of Keras 3."""

    key = "keras_zip"
    is_scattered = True
    name = "Keras .keras"
    suffixes = (".keras",)
    keras_layout = "objects"
    has_checksums = True
    can_be_left = True
    inner = "hdf5"
    conversion_suffix = ".keras"
    converts_from = frozenset({"hdf5", "weights_json"})
    completes = True

    def scan(self, request: ScanRequest, heartbeat: Heartbeat) -> Table:
        """See `Format.scan`."""
        with zips.open_archive(request.path) as (file, members, _):
            config, weights = _find_parts(members)
            said = _parse_configuration(zips.read_whole(file, config))
            with _open_weights(file, weights, heartbeat) as window:
                found = keras_files.read_weights(
                    window, heartbeat, with_optimizer=request.with_optimizer
                )
            if not found.tensors:
                raise FormatError(f"its {WEIGHTS} holds no tensor of a Keras model")
            found = found._replace(
                tensors=[_place_in_archive(spec, weights) for spec in found.tensors],
                others=[_place_in_archive(spec, weights) for spec in found.others],
            )
            table = keras_files.build_weights_table(self.key, request.path, found)
            table = replace(
                table,
                config=_digest_configuration(said),
                rules=replace(table.rules, suffixes=()),
                assets=_find_assets(said, file, members, found.labels, heartbeat),
            )
            table = _label_layers(said, table, found.labels)
            if not request.with_optimizer:
                return table
            about = {**_read_version(file, members), **table.about}
            return _find_emas(said, replace(table, about=about), found.labels)

    def write_skeleton(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.write_skeleton`.

        The record of where the average comes from is in the weights file: one member more and Keras
        would unpack the whole archive, in search of assets.
        """
        (template,) = request.template.files
        return self._rebuild(template.path, _place_in_member(request), heartbeat)

    def _rebuild(
        self, whole: str, request: SkeletonRequest, heartbeat: Heartbeat, parts: Sequence[str] = ()
    ) -> Draft:
        """Write a skeleton like an archive.

        Args:
            whole: the archive.
            request: for its weights file.
            heartbeat: sent before every object.
            parts: weights files that take the place of the one in the archive.
        """
        with (
            zips.open_archive(whole) as (file, members, comment),
            zips.Archive(request.output, comment) as archive,
        ):
            _, weights = _find_parts(members)
            # The weights file comes last, because its size is not known before it is built.
            for member in members:
                if member is not weights:
                    archive.copy(file, member, heartbeat)
            offset = archive.find_start(WEIGHTS, _ALIGNMENT)
            target = Window(request.output, archive.file.fileno(), offset)
            with contextlib.ExitStack() as stack:
                sources: list[Place] = [*parts]
                if not parts:
                    sources += [stack.enter_context(_open_weights(file, weights, heartbeat))]
                draft = skeleton.merge(request, sources, heartbeat, target)
            return _list_weights(archive, offset, target, draft.placements)

    def extract(self, request: SkeletonRequest, heartbeat: Heartbeat) -> Draft:
        """See `Format.extract`: the weights file has the layout of a ``.weights.h5``."""
        (template,) = request.template.files
        with zips.open_archive(template.path) as (file, members, _):
            _, weights = _find_parts(members)
            with _open_weights(file, weights, heartbeat) as source:
                return skeleton.merge(_place_in_member(request), [source], heartbeat)

    def texts(self, table: Table, heartbeat: Heartbeat) -> dict[str, str]:
        """See `Format.texts`: the configuration, and assets that are texts."""
        with zips.open_archive(table.files[0].path) as (file, members, _):
            _, weights = _find_parts(members)
            with _open_weights(file, weights, heartbeat) as window:
                said = keras_files.read_texts(window, heartbeat)
            for member in members:
                if member is not weights:
                    try:
                        said[member.name] = zips.read_whole(file, member).decode()
                    except UnicodeDecodeError:
                        raise OutputError(
                            f"its member '{shown(member.name)}' is not text and would be lost"
                        ) from None
        return said

    def refuse_conversion(self, request: SkeletonRequest, texts: Mapping[str, str]) -> None:
        """See `Format.refuse_conversion`."""
        if request.architecture:
            return  # its tensors were compared
        from_models.read_model(request.template, texts)

    def convert(
        self, request: SkeletonRequest, texts: Mapping[str, str], heartbeat: Heartbeat
    ) -> Draft:
        """See `Format.convert`: a whole model in HDF5 becomes an archive of the same model.

        Weights become one with the model that the request names.
        """
        if request.architecture:
            files = request.template.files
            # The parts of sharded weights come after the file that lists them.
            parts = [file.path for file in files[1:] or files]
            return self._rebuild(request.architecture, request, heartbeat, parts)
        model = from_models.read_model(request.template, texts)
        with (
            conversion.Carrier(request.template, heartbeat) as carrier,
            zips.Archive(request.output) as archive,
        ):
            archive.add("metadata.json", model.metadata)
            archive.add(CONFIG, model.config)
            offset = archive.find_start(WEIGHTS, _ALIGNMENT)
            target = Window(request.output, archive.file.fileno(), offset)
            made = weights_files.build(request, model.places, target, heartbeat)
            for name, start in made.carried.items():
                carrier.carry(request.template.tensors[name], archive.file, offset + start)
            return _list_weights(archive, offset, target, made.placements)

    def finalize(self, output: str, draft: Draft) -> None:
        """See `Format.finalize`."""
        zips.finalize_archive(output, draft.notes["archive"])

    def check(self, path: str, heartbeat: Heartbeat, later: int | None = None) -> list[Checksum]:
        """See `Format.check`; the scan has checked deflated weights."""
        with zips.open_archive(path) as (file, members, _):
            left = [one for one in members if one.name != WEIGHTS or one.method == zips.STORED]
            return zips.check_members(path, file, left, heartbeat, later)

    def is_polyak_output(self, path: str, heartbeat: Heartbeat) -> bool:
        """See `Format.is_polyak_output`; this tool never deflates."""
        try:
            with zips.open_archive(path) as (file, members, _):
                _, weights = _find_parts(members)
                if weights.method != zips.STORED:
                    return False  # and inflating gigabytes to find out is not worth it
                with _open_weights(file, weights, heartbeat) as window:
                    return keras_files.is_polyak_output(window, heartbeat)
        except FormatError:
            return False
