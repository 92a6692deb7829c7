"""Files sent to real servers: all get their names or none, and nobody's object is replaced."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from polyak_cli.errors import OutputError
from polyak_cli.storage import blobs, objects, s3, uploads
from polyak_cli.storage.urls import parse
from tests.remote.proxy import (
    DENIED,
    EXPIRED,
    LOST,
    NO_CONDITIONS,
    RESET,
    SLOW_DOWN,
    UNAVAILABLE,
    Proxy,
    some,
)
from tests.remote.servers import FOREIGN, AzureContainer, Bucket, S3Bucket, Server

MIB = 1 << 20
#: An eighth of the smallest part that S3 allows, which the tests use to be quick.
UNIT = 5 << 17
Kind = TypeVar("Kind", bound=Bucket)


@pytest.fixture
def bucket(bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Bucket]:
    """Yield a bucket that the code under test finds too, by the environment."""
    yield from reach(bucket, monkeypatch)


@pytest.fixture(params=["bucket", "container"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Yield a bucket, and in a second test a container."""
    yield from reach(request.getfixturevalue(request.param), monkeypatch)


def reach(made: Kind, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kind]:
    """Yield a bucket whose server and credentials this process's environment has meanwhile."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    for name, value in made.server.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(uploads, "PART", 8 * UNIT)
    monkeypatch.setattr(blobs, "CHUNK", 8 * UNIT)
    s3._connect.cache_clear()
    objects._connect.cache_clear()
    yield made


def url(place: Bucket, key: str) -> str:
    """Return the URL of a key."""
    return f"{place.url}/{key}"


def uploads_of(place: Bucket) -> list[str]:
    """Return the keys of unfinished uploads; Azure shows none."""
    return place.uploads() if isinstance(place, S3Bucket) else []


def write(path: Path, nbytes: int, seed: int = 0) -> str:
    """Write a file without repetitions at the distance of a part, and return its path."""
    line = b"%d %%09d of a file\n" % seed
    path.write_bytes(b"".join(line % k for k in range(nbytes // 20 + 1))[:nbytes])
    return str(path)


@pytest.mark.parametrize("name", ["ü%20é.bin", "a b/x+y&z=1?#.bin"])
def test_the_bytes_arrive(place: Bucket, tmp_path: Path, name: str) -> None:
    """A file in parts and a file of one request have their bytes and odd names in the store."""
    big, small = write(tmp_path / "big", 17 * UNIT + 7), write(tmp_path / "small", 100)
    sent: list[int] = []
    uploads.send_files(
        [(big, url(place, name)), (small, url(place, "small"))], force=False, progress=sent.append
    )
    assert place.contents(name) == Path(big).read_bytes()
    assert place.contents("small") == Path(small).read_bytes()
    assert place.keys() == sorted([name, "small"])
    assert sum(sent) >= 17 * UNIT
    assert uploads_of(place) == []


@pytest.mark.parametrize("nbytes", [0, 8 * UNIT, 8 * UNIT + 1])
def test_every_length_arrives(place: Bucket, tmp_path: Path, nbytes: int) -> None:
    """An empty file arrives, and one that ends where a part does."""
    path = write(tmp_path / "file", nbytes)
    uploads.send_files([(path, url(place, "x"))], force=False)
    assert place.contents("x") == Path(path).read_bytes()


@pytest.mark.parametrize("nbytes", [100, 9 * UNIT])
def test_an_object_is_replaced_only_with_force(place: Bucket, tmp_path: Path, nbytes: int) -> None:
    """Without force the store's own condition keeps an object; with force it is replaced."""
    place.put("x", b"older")
    path = write(tmp_path / "new", nbytes)
    with pytest.raises(OutputError, match=r"/x: already exists; use --force to replace it"):
        uploads.send_files([(path, url(place, "x"))], force=False)
    assert place.contents("x") == b"older"
    assert uploads_of(place) == []
    assert place.keys() == ["x"]
    uploads.send_files([(path, url(place, "x"))], force=True)
    assert place.contents("x") == Path(path).read_bytes()


@pytest.mark.parametrize("nbytes", [100, 9 * UNIT])
def test_of_two_runs_to_one_name_one_fails(place: Bucket, tmp_path: Path, nbytes: int) -> None:
    """Two runs that have sent all bytes at the same time: one object, and one error."""
    meeting = threading.Barrier(2)
    outcomes: dict[int, str] = {}

    def run(seed: int) -> None:
        path = write(tmp_path / str(seed), nbytes, seed)
        met: list[int] = []

        def meet(_: int) -> None:
            if not met:
                met.append(meeting.wait(60))

        try:
            uploads.send_files([(path, url(place, "x"))], force=False, progress=meet)
            outcomes[seed] = ""
        except OutputError as error:
            outcomes[seed] = str(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [seed for seed, text in outcomes.items() if not text]
    assert "already exists" in outcomes[3 - winner]
    assert place.contents("x") == (tmp_path / str(winner)).read_bytes()
    assert place.keys() == ["x"]
    assert uploads_of(place) == []


def stop_after(calls: int) -> Callable[[int], None]:
    """Return a progress that raises at one of its calls, as a signal does."""
    left = [calls]

    def progress(_: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("calls", [0, 2, 5, 6, 7])
def test_an_interrupt_leaves_nothing(place: Bucket, tmp_path: Path, calls: int) -> None:
    """Wherever an upload of three files is interrupted, no object and no upload is left."""
    files = [
        (write(tmp_path / name, nbytes), url(place, name))
        for name, nbytes in (("1.bin", 10 * UNIT), ("2.bin", 9 * UNIT), ("index", 10))
    ]
    with pytest.raises(KeyboardInterrupt):
        uploads.send_files(files, force=False, progress=stop_after(calls))
    assert place.keys() == []
    assert uploads_of(place) == []


def test_the_last_file_is_refused_and_the_first_withdrawn(place: Bucket, tmp_path: Path) -> None:
    """An index that another run has written meanwhile stays, and the shards are deleted again."""
    place.put("index", b"another's")
    files = [
        (write(tmp_path / name, nbytes), url(place, name))
        for name, nbytes in (("1.bin", 10 * UNIT), ("2.bin", 20), ("index", 10))
    ]
    with pytest.raises(OutputError, match="index: already exists"):
        uploads.send_files(files, force=False)
    assert place.keys() == ["index"]
    assert place.contents("index") == b"another's"
    assert uploads_of(place) == []


def test_a_shard_of_another_run_is_not_withdrawn(place: Bucket, tmp_path: Path) -> None:
    """Of a folder whose first file is taken, that file is kept: this run did not make it."""
    place.put("1.bin", b"another's")
    files = [(write(tmp_path / name, 10), url(place, name)) for name in ("1.bin", "index")]
    with pytest.raises(OutputError, match=r"1\.bin: already exists"):
        uploads.send_files(files, force=False)
    assert place.contents("1.bin") == b"another's"
    assert place.keys() == ["1.bin"]


def test_stale_objects_go_last(place: Bucket, tmp_path: Path) -> None:
    """Objects of what is replaced are deleted when the new ones have their names."""
    place.put("old.bin", b"old")
    place.put("index", b"old")
    path = write(tmp_path / "new", 10)
    files = [(path, url(place, "new.bin")), (path, url(place, "index"))]
    uploads.send_files(files, force=True, stale=[url(place, "old.bin")])
    assert place.keys() == ["index", "new.bin"]


# --- what dead runs left --------------------------------------------------------------------------


def test_an_orphan_is_found_and_aborted(bucket: S3Bucket) -> None:
    """An upload whose run died is listed with its bytes, and is gone after it was aborted."""
    upload = uploads.begin(url(bucket, "dir/x.bin"), 20 * UNIT)
    uploads.send_part(upload, 1, bytes(8 * UNIT))
    (found,) = uploads.find_orphans(url(bucket, ""))
    assert found.url == url(bucket, "dir/x.bin")
    assert found.nbytes == 8 * UNIT
    assert not found.is_dead  # it gave a sign of life a moment ago
    assert uploads.find_orphans(url(bucket, "other")) == []
    uploads.abort_orphan(found)
    assert uploads_of(bucket) == []


def test_uploads_of_others_are_never_found(bucket: S3Bucket) -> None:
    """Uploads without polyak's lease are not listed, nor one of so many parts that it looks so."""
    client = bucket.client
    lease = b"polyak upload\n".ljust(7_321, b".")
    for key, parts in (
        ("none", {}),
        ("small", {1: b"x"}),
        ("large", {9_998: bytes(5 * UNIT), 9_999: lease}),
        ("another length", {9_999: lease[:-1]}),
        ("longer", {9_999: lease, 10_000: b"x"}),
    ):
        where = {"Bucket": bucket.name, "Key": key}
        upload = client.create_multipart_upload(**where)["UploadId"]
        for number, body in parts.items():
            client.upload_part(**where, UploadId=upload, PartNumber=number, Body=body)
    assert uploads.find_orphans(url(bucket, "")) == []
    uploads.begin(url(bucket, "mine"), 20 * UNIT)
    assert [one.url for one in uploads.find_orphans(url(bucket, ""))] == [url(bucket, "mine")]


def test_the_next_run_aborts_a_dead_one(
    bucket: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run aborts what a dead run left under its own name, and neither a living one nor others."""
    uploads.begin(url(bucket, "x"), 20 * UNIT)
    uploads.begin(url(bucket, "x.other"), 20 * UNIT)
    path = write(tmp_path / "new", 9 * UNIT)
    uploads.send_files([(path, url(bucket, "x"))], force=False)
    assert uploads_of(bucket) == ["x", "x.other"]  # both may be at work
    monkeypatch.setattr(uploads, "_DEAD", -1.0)
    uploads.send_files([(path, url(bucket, "x"))], force=True)
    assert uploads_of(bucket) == ["x.other"]


def test_a_living_run_renews_its_lease(bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a run lives, its lease is sent again and again, so that it never counts as dead."""
    renewed = threading.Event()
    renew = s3.renew

    def renew_and_say(*arguments: Any) -> None:
        renew(*arguments)
        renewed.set()

    monkeypatch.setattr(s3, "renew", renew_and_say)
    upload = uploads.begin(url(bucket, "x"), 20 * UNIT)
    renewed.clear()
    monkeypatch.setattr(uploads, "_RENEWAL", 0.01)
    with uploads.Leases() as leases:
        leases.add(upload)
        assert renewed.wait(30)


def test_a_part_may_be_sent_twice_and_in_any_order(bucket: S3Bucket) -> None:
    """Parts come from anywhere: the last one counts of each number, and a late one is harmless."""
    upload = uploads.begin(url(bucket, "x"), 16 * UNIT, part=8 * UNIT)
    uploads.send_part(upload, 2, b"end")
    uploads.send_part(upload, 1, bytes(8 * UNIT))
    receipts = {1: uploads.send_part(upload, 1, b"a" * (8 * UNIT))}
    receipts[2] = uploads.send_part(upload, 2, b"end")
    uploads.complete(upload, receipts, force=False)
    assert bucket.contents("x") == b"a" * (8 * UNIT) + b"end"
    with pytest.raises(OutputError, match="was aborted meanwhile"):
        uploads.send_part(upload, 2, b"late")
    uploads.complete(upload, receipts, force=False)  # a repetition whose first answer was lost


def test_a_large_object_has_larger_parts() -> None:
    """A part is of 8 MiB, or as large as the number of parts that S3 allows demands."""
    assert uploads.choose_part(1) == 8 * MIB
    assert uploads.choose_part(9_997 * 8 * MIB) == 8 * MIB
    assert uploads.choose_part(9_997 * 8 * MIB + 1) == 9 * MIB
    for nbytes in (810 * 10**9, 5 * 10**12):
        assert -(-nbytes // uploads.choose_part(nbytes)) <= 9_997


@pytest.mark.parametrize("url", ["https://x/y", "hf://a/b/c", "http://u:secret@x/y?sig=secret"])
def test_what_cannot_be_written_to_is_refused(url: str, tmp_path: Path) -> None:
    """Web servers and the Hub are for reading; the message shows no secret."""
    with pytest.raises(OutputError, match="cannot be written to") as caught:
        uploads.send_files([(write(tmp_path / "x", 1), url)], force=True)
    assert "secret" not in str(caught.value)


def test_a_url_keeps_its_odd_characters(place: Bucket) -> None:
    """The text of a parsed URL is the URL again."""
    text = url(place, "a b/ü%20?#&.bin")
    assert str(parse(text)) == text


def test_parts_of_the_usual_size_arrive(
    place: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes of parts that a user gets are those that the servers take."""
    monkeypatch.undo()
    for name, value in place.server.environ.items():
        monkeypatch.setenv(name, value)
    path = write(tmp_path / "big", 20 * MIB + 7)
    uploads.send_files([(path, url(place, "x"))], force=False)
    assert place.contents("x") == Path(path).read_bytes()


# --- faults ---------------------------------------------------------------------------------------


@pytest.fixture
def faulty(
    bucket: S3Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[S3Bucket, Proxy]]:
    """Yield a bucket, and the proxy through which the code under test reaches it."""
    for name, value in proxy.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3, "_ATTEMPTS", 2)
    s3._connect.cache_clear()
    yield bucket, proxy
    s3._connect.cache_clear()


def send_two(bucket: S3Bucket, folder: Path, *, force: bool = False) -> dict[str, bytes]:
    """Send a file in parts and a small one, and return what has to arrive."""
    big, small = write(folder / "big", 17 * UNIT), write(folder / "small", 100)
    uploads.send_files([(big, url(bucket, "big")), (small, url(bucket, "index"))], force=force)
    return {"big": Path(big).read_bytes(), "index": Path(small).read_bytes()}


#: The requests of `send_two` that change something, and how many of each kind come before.
STEPS = [("CREATE", 1), ("PART", 1), ("PART", 2), ("PART", 4), ("COMPLETE", 1), ("PUT", 1)]


FAULTS = {"lost": LOST, "reset": RESET, "500": UNAVAILABLE, "503": SLOW_DOWN}
QUICK = {("lost", "COMPLETE"), ("lost", "PUT"), ("503", "PART")}


def cases(faults: Iterable[str], quick: set[tuple[str, str]]) -> list[Any]:
    """Return each fault with each step; all but a few take long, and are left to `make soak`."""
    return [
        pytest.param(fault, kind, nth, marks=() if (fault, kind) in quick else (pytest.mark.soak,))
        for fault in faults
        for kind, nth in STEPS
    ]


@pytest.mark.parametrize(("fault", "kind", "nth"), cases(FAULTS, QUICK))
def test_a_passing_fault_changes_nothing(
    faulty: tuple[S3Bucket, Proxy], tmp_path: Path, fault: str, kind: str, nth: int
) -> None:
    """A request whose answer is lost, or that fails once, is made again: the bytes are right."""
    bucket, proxy = faulty
    proxy.rules.append(some(lambda n: n == nth, FAULTS[fault], lambda r: r.kind == kind))
    assert send_two(bucket, tmp_path) == bucket.tree()
    if (kind, fault) != ("CREATE", "lost"):  # an upload whose id nobody knows, and without parts
        assert uploads_of(bucket) == []


LASTING = {
    "denied": (DENIED, "may not be written with these credentials (AccessDenied)"),
    "expired": (EXPIRED, "the credentials are not accepted (ExpiredToken)"),
    "503": (SLOW_DOWN, "the server is too busy (SlowDown)"),
    "reset": (RESET, "the server did not answer"),
}


@pytest.mark.parametrize(
    ("fault", "kind", "nth"), cases(LASTING, {("denied", "COMPLETE"), ("expired", "PART")})
)
def test_a_lasting_fault_leaves_nothing(
    faulty: tuple[S3Bucket, Proxy], tmp_path: Path, fault: str, kind: str, nth: int
) -> None:
    """Whichever request fails for good, the error is one line, and nothing is left in the store."""
    bucket, proxy = faulty
    made, said = LASTING[fault]
    proxy.rules.append(some(lambda n: n >= nth, made, lambda r: r.kind == kind))
    with pytest.raises(OutputError) as caught:
        send_two(bucket, tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "polyaksecret" not in str(caught.value)
    assert bucket.keys() == []
    assert uploads_of(bucket) == []


def test_a_server_that_ignores_conditions_is_refused(faulty: tuple[S3Bucket, Proxy]) -> None:
    """Where objects could be replaced unasked, only --force writes; the probe is deleted."""
    bucket, proxy = faulty
    proxy.rules.append(lambda _: NO_CONDITIONS)
    target = url(bucket, "dir/x")
    with pytest.raises(OutputError, match="the server ignores If-Match and If-None-Match"):
        uploads.prepare(target, force=False)
    assert bucket.keys() == []
    uploads.prepare(target, force=True)
    assert bucket.keys() == []


def test_an_honest_server_gets_no_probe(bucket: S3Bucket) -> None:
    """Where conditions hold, asking for that writes nothing."""
    uploads.prepare(url(bucket, "dir/x"), force=False)
    assert bucket.keys() == []


def test_the_last_file_gets_its_name_last(faulty: tuple[S3Bucket, Proxy], tmp_path: Path) -> None:
    """No object has its name before all bytes are in the store, and the index comes last."""
    bucket, proxy = faulty
    send_two(bucket, tmp_path)
    kinds = [(request.kind, request.path.rpartition("/")[2]) for request, _ in proxy.traffic.log]
    assert [pair for pair in kinds if pair[0] in ("COMPLETE", "PUT")] == [
        ("COMPLETE", "big"),
        ("PUT", "index"),
    ]
    assert max(k for k, (kind, _) in enumerate(kinds) if kind == "PART") < kinds.index(
        ("COMPLETE", "big")
    )


def test_few_parts_are_in_memory(faulty: tuple[S3Bucket, Proxy], tmp_path: Path) -> None:
    """At most four parts are on their way at a time, whatever the size of the file."""
    bucket, proxy = faulty
    path = write(tmp_path / "big", 100 * UNIT)
    uploads.send_files([(path, url(bucket, "x"))], force=False)
    assert proxy.traffic.most_open <= 5  # and the lease's


def test_a_busy_azure_is_asked_again(
    container: AzureContainer, azure: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that Azure is too busy for is repeated, and the bytes are right."""
    monkeypatch.setattr(blobs, "CHUNK", 8 * UNIT)
    path = write(tmp_path / "big", 17 * UNIT)
    with Proxy(azure) as proxy:
        proxy.rules.append(some(lambda n: n in (2, 4), SLOW_DOWN, lambda r: r.method == "PUT"))
        for name, value in proxy.environ.items():
            monkeypatch.setenv(name, value)
        objects._connect.cache_clear()
        uploads.send_files([(path, url(container, "x"))], force=False)
        assert 503 in [status for _, status in proxy.traffic.log]
    objects._connect.cache_clear()
    assert container.tree() == {"x": Path(path).read_bytes()}
