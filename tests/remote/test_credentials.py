"""Credentials come from where the usual clients find them, and may be replaced during a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.command import polyak, tree
from tests.remote.kinds import named, write_run
from tests.remote.proxy import EXPIRED, Fault, Proxy, Request, some
from tests.remote.servers import LATER_KEYS, S3Bucket

#: Prints keys as a `credential_process` does: those that end soon at first, then others.
PROCESS = """
import datetime, json, os, sys
state, first, later = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
is_first = not os.path.exists(state)
open(state, "a").write("x")
keys = first if is_first else later
# botocore asks for others a quarter of an hour before these end.
end = datetime.timedelta(seconds=15 * 60 + 2 if is_first else 3600)
print(json.dumps({
    "Version": 1, "AccessKeyId": keys["accessKey"], "SecretAccessKey": keys["secretKey"],
    "Expiration": (datetime.datetime.now(datetime.timezone.utc) + end).isoformat(),
}))
"""


def write_profile(folder: Path, proxy: Proxy) -> dict[str, str]:
    """Write a profile whose keys are replaced, and return the environment that names it."""
    (folder / "process.py").write_text(PROCESS)
    environ = dict(proxy.environ)
    first = {
        "accessKey": environ.pop("AWS_ACCESS_KEY_ID"),
        "secretKey": environ.pop("AWS_SECRET_ACCESS_KEY"),
    }
    quoted = " ".join(
        '"' + json.dumps(keys).replace('"', '\\"') + '"' for keys in (first, LATER_KEYS)
    )
    (folder / "config").write_text(
        "[profile rotating]\nregion = us-east-1\n"
        f"credential_process = {sys.executable} {folder}/process.py {folder}/state {quoted}\n"
    )
    return environ | {"AWS_PROFILE": "rotating", "AWS_CONFIG_FILE": str(folder / "config")}


def uses(keys: str, request: Request) -> bool:
    """Return whether a request is signed with keys."""
    return f"Credential={keys}/" in request.headers.get("authorization", "")


@pytest.mark.soak
def test_keys_of_a_profile_that_expire_are_replaced(
    bucket: S3Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    """After the listing the first keys are refused; those that the profile has then are used."""
    folder = tmp_path / "home"
    write_run(named("safetensors"), folder / "run", 3)
    bucket.put_tree(folder / "run", "run/")
    done = polyak("average", "run", "-o", "here.safetensors", "-q", cwd=folder)
    assert done.returncode == 0, done.stderr
    environ = write_profile(tmp_path, proxy)
    first = proxy.environ["AWS_ACCESS_KEY_ID"]
    proxy.rules = [
        lambda request: Fault(pause=3) if request.kind == "LIST" else None,
        lambda request: EXPIRED if uses(first, request) else None,
    ]
    done = polyak("average", f"{bucket.url}/run/", "-o", "there.safetensors", "-q",
                  cwd=folder, environ=environ)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "here.safetensors").read_bytes() == (folder / "there.safetensors").read_bytes()
    used = [uses(LATER_KEYS["accessKey"], request) for request, _ in proxy.traffic.log]
    assert (used[0], set(used[1:])) == (False, {True})


@pytest.mark.parametrize("fault", [EXPIRED, Fault(403, "InvalidAccessKeyId")])
def test_keys_that_end_are_one_line_without_the_keys(
    bucket: S3Bucket, proxy: Proxy, tmp_path: Path, fault: Fault
) -> None:
    """Keys of the environment cannot be replaced: the store's word is shown, and no secret."""
    write_run(named("safetensors"), tmp_path / "run", 2)
    bucket.put_tree(tmp_path / "run", "run/")
    proxy.rules = [some(lambda number: number > 2, fault)]
    done = polyak("average", f"{bucket.url}/run/", "-o", "o.safetensors", cwd=tmp_path,
                  environ=proxy.environ)  # fmt: skip
    assert done.returncode == 3
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert fault.code in errors[0]
    assert "AWS_ACCESS_KEY_ID" in errors[0]
    for text in (done.stdout, done.stderr):
        assert proxy.environ["AWS_SECRET_ACCESS_KEY"] not in text
        assert "Traceback" not in text
    assert "o.safetensors" not in tree(tmp_path)


@pytest.mark.parametrize(
    ("url", "variable", "value", "expected"),
    [
        ("s3://b/k.h5", "AWS_ACCESS_KEY_ID", "secret\n", "holds a line break"),
        ("s3://b/k.h5", "AWS_ENDPOINT_URL", "secret:9000", "is no address"),
        ("gs://b/k.h5", "STORAGE_EMULATOR_HOST", "secret:port", "is no address"),
        ("az://b/k.h5", "AZURE_STORAGE_ACCOUNT_NAME", "secret\n", "holds a line break"),
        ("hf://a/b/k.h5", "HF_TOKEN", "sec\nret", "holds a line break"),
    ],
)
def test_settings_that_no_request_can_carry_are_one_line(
    tmp_path: Path, url: str, variable: str, value: str, expected: str
) -> None:
    """As a file read with its end of line gives them; the variable is named, and not its value."""
    done = polyak("inspect", url, cwd=tmp_path, environ={variable: value})
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"error: {variable}: {expected}")
    assert len(done.stderr.splitlines()) == 1
    assert "sec" not in done.stderr
