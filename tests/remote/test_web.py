"""Files of web servers and of the Hugging Face Hub, from servers in this process.

The Hub is not reached by tests.  What stands here answers as its documentation says: a revision is
a commit, a tree has pages, and a file is at another server, which must not see the token.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.command import Done, one_line, polyak
from tests.remote.servers import S3Bucket, clean_environ
from tests.remote.test_reading import write_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class Web:
    """A web server with files, and what it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.etags = True
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.hub: Hub | None = None
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                web.asked.append((self.command, self.path, headers))
                status, content, more = web.answer(self.path, headers)
                self.send_response(status)
                for name, value in more.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    with contextlib.suppress(OSError):  # who has seen the status may leave
                        self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        """End the server."""
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, path: str, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers."""
        if self.hub:
            return self.hub.answer(path, headers)
        content = self.files.get(unquote(path.partition("?")[0].lstrip("/")))
        if content is None:
            return 404, b"no", {}
        more = {"Last-Modified": "Sun, 29 Nov 2026 10:00:00 GMT"}
        if self.etags:
            more["ETag"] = f'"{hash(content)}"'
            if headers.get("if-match", more["ETag"]) != more["ETag"]:
                return 412, b"changed", {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("range", ""))
        if not asked or not self.ranges:
            return 200, content, more
        start, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        more["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
        return 206, content[start : last + 1], more


class Hub:
    """The Hub's answers about one repository, whose files are at another server."""

    def __init__(self, web: Web, store: Web) -> None:
        self.web = web
        self.store = store

    def answer(self, path: str, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers."""
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, b"no", {}
        if path == "/api/models/owner/name/revision/main":
            said = {"sha": COMMIT, "lastModified": "2026-11-29T10:00:00.000Z"}
            return 200, json.dumps(said).encode(), {}
        tree = f"/api/models/owner/name/tree/{COMMIT}?recursive=true"
        if path.startswith(tree):
            page = int(path.partition("&cursor=")[2] or 0)
            names = sorted(self.store.files)
            rows = [
                {"type": "file", "path": name, "size": len(self.store.files[name]), "oid": name}
                for name in names[2 * page : 2 * page + 2]
            ]
            more = f'<{self.web.url}{tree}&cursor={page + 1}>; rel="next"'
            links = {"Link": more} if 2 * page + 2 < len(names) else {}
            return 200, json.dumps([{"type": "directory", "path": "x"}, *rows]).encode(), links
        at = f"/owner/name/resolve/{COMMIT}/"
        if path.startswith(at):
            return 302, b"", {"Location": f"{self.store.url}/{path.removeprefix(at)}"}
        return 404, b"no", {}


@pytest.fixture
def web() -> Iterator[Web]:
    """Yield a web server."""
    made = Web()
    yield made
    made.close()


@pytest.fixture
def store() -> Iterator[Web]:
    """Yield another one."""
    made = Web()
    yield made
    made.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Write a run of two checkpoints that are too large to be fetched whole at once."""
    return write_run(tmp_path / "run", 2, 5000)


def command(cwd: Path, *arguments: object, **more: str) -> Done:
    """Run a command in an environment without the user's own tokens."""
    return polyak(*arguments, cwd=cwd, environ=clean_environ() | {"HF_HOME": str(cwd)} | more)


def test_files_of_a_web_server_are_averaged(web: Web, run: Path) -> None:
    """Each is named by itself; user, password and signature are sent and not shown."""
    for path in run.iterdir():
        web.files[f"a b/{path.name}"] = path.read_bytes()
    names = sorted(path.name for path in run.iterdir())
    urls = [f"{web.url}/a%20b/{name}?signature=secret" for name in names]
    urls = [one.replace("http://", "http://me:secret@") for one in urls]
    done = command(run.parent, "average", *urls, "-o", "w.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stdout + done.stderr
    plan = json.loads(done.stdout)
    assert plan["checkpoints"][0]["path"] == f"{web.url}/a%20b/{names[0]}"
    here = command(run.parent, "average", "run", "-o", "h.safetensors")
    assert here.returncode == 0, here.stderr
    written = [(run.parent / name).read_bytes() for name in ("w.safetensors", "h.safetensors")]
    assert written[0] == written[1]
    assert b"secret" not in written[0]
    asked = [one for one in web.asked if one[0] == "GET"]
    assert all("signature=secret" in path for _, path, _ in asked)
    assert all("authorization" in headers for _, _, headers in asked)


def test_presigned_urls_of_a_bucket_are_read(bucket: S3Bucket, run: Path) -> None:
    """Their signatures hold for GETs only, and are neither shown nor recorded."""
    bucket.put_tree(run, "run 1/")
    urls = [
        bucket.client.generate_presigned_url("get_object", {"Bucket": bucket.name, "Key": key})
        for key in sorted(bucket.tree())
    ]
    done = command(run.parent, "average", *urls, "-o", "p.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    here = command(run.parent, "average", "run", "-o", "h.safetensors", "-q")
    assert (here.returncode, here.stderr) == (0, "")
    written = [(run.parent / name).read_bytes() for name in ("p.safetensors", "h.safetensors")]
    assert written[0] == written[1]
    secrets = [value for url in urls for value in re.findall(r"=([^&]{16,})", url)]
    assert len(secrets) >= 2
    shown = (done.stdout + done.stderr).encode() + written[0]
    assert [one for one in secrets if one.encode() in shown] == []
    # A URL whose signature does not hold any more.
    spoilt = re.sub("Signature=....", "Signature=0000", urls[0])
    line = one_line(command(run.parent, "inspect", spoilt).stderr)
    assert "access is denied (403" in line
    assert "0000" not in line


def test_a_server_without_ranges_is_refused(web: Web, run: Path) -> None:
    """It would send a whole file for each block; a small file needs no ranges."""
    web.ranges = False
    name = "epoch_01.safetensors"
    web.files[name] = (run / name).read_bytes()
    line = one_line(command(run, "inspect", f"{web.url}/{name}").stderr)
    assert line.startswith(f"{web.url}/{name}: ")
    assert "the server ignores ranges of bytes" in line
    small = write_run(run.parent / "small", 1)
    web.files[name] = (small / name).read_bytes()
    assert command(run, "inspect", f"{web.url}/{name}").returncode == 0


def test_a_server_without_etags_is_known_by_time_and_size(web: Web, run: Path) -> None:
    """Then nothing else can tell whether a file was replaced."""
    web.etags = False
    name = "epoch_01.safetensors"
    web.files[name] = (run / name).read_bytes()
    done = command(run, "inspect", "--stats", f"{web.url}/{name}")
    assert done.returncode == 0, done.stderr
    assert "if-match" not in {name for _, _, headers in web.asked for name in headers}


def test_a_web_server_has_no_folders(web: Web, run: Path) -> None:
    """What is no file there is one line."""
    line = one_line(command(run, "average", f"{web.url}/run/", "-n").stderr)
    assert line.startswith(f"{web.url}/run: no such file")


def test_a_repository_of_the_hub_is_averaged(web: Web, store: Web, run: Path) -> None:
    """The revision is resolved once to a commit, which stands in every name."""
    web.hub = Hub(web, store)
    for path in run.iterdir():
        store.files[f"run/{path.name}"] = path.read_bytes()
    store.files |= {"README.md": b"text", "config.json": b"{}"}
    environ = {"HF_ENDPOINT": web.url, "HF_TOKEN": TOKEN}
    done = command(run.parent, "average", "hf://owner/name/run/", "-o", "f.safetensors", "--json",
                   "--no-hash", **environ)  # fmt: skip
    assert done.returncode == 0, done.stderr
    paths = [one["path"] for one in json.loads(done.stdout)["checkpoints"]]
    assert paths == [f"hf://owner/name@{COMMIT}/run/epoch_0{k}.safetensors" for k in (1, 2)]
    here = command(run.parent, "average", "run", "-o", "h.safetensors", "--no-hash")
    assert here.returncode == 0, here.stderr
    written = [(run.parent / name).read_bytes() for name in ("f.safetensors", "h.safetensors")]
    assert written[0] == written[1]
    assert [path for _, path, _ in web.asked].count("/api/models/owner/name/revision/main") == 1
    assert store.asked
    assert not [headers for _, _, headers in store.asked if "authorization" in headers]


@pytest.mark.soak
def test_workers_read_the_commit_that_was_planned(web: Web, store: Web, run: Path) -> None:
    """A worker does not look for the revision again, which may be another commit by then."""
    web.hub = Hub(web, store)
    for path in run.iterdir():
        store.files[f"run/{path.name}"] = path.read_bytes()
    environ = {"HF_ENDPOINT": web.url, "HF_TOKEN": TOKEN}
    written = []
    for engine in ("here", "dask"):
        output = f"{engine}.safetensors"
        done = command(run.parent, "average", "hf://owner/name/run/", "-o", output, "-q",
                       "--engine", engine, **environ)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        written.append((run.parent / output).read_bytes())
    assert written[0] == written[1]
    assert [path for _, path, _ in web.asked].count("/api/models/owner/name/revision/main") == 2


def test_what_the_hub_refuses_is_one_line(web: Web, store: Web, run: Path) -> None:
    """Without a token, and for a repository or a revision that is not there."""
    web.hub = Hub(web, store)
    source = "hf://owner/name/run/"
    line = one_line(command(run, "average", source, "-n", HF_ENDPOINT=web.url).stderr)
    assert line.startswith(f"{source}: cannot be read: access is denied (401")
    assert "set HF_TOKEN" in line
    (run / "token").write_text(f"{TOKEN}\n")  # as `hf auth login` keeps it
    line = one_line(command(run, "average", "hf://owner/other/", "-n", HF_ENDPOINT=web.url).stderr)
    assert line.startswith("hf://owner/other/: cannot be read: there is no such")
