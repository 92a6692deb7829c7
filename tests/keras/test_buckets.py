"""Models in a bucket are scored as those on the disk are: each is fetched when its turn comes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from polyak_cli.evaluation import data, evaluator
from polyak_cli.pipeline import sweeping
from polyak_cli.storage import mirrors
from tests.remote.servers import NoServerError, S3Bucket, seaweedfs

SAMPLES = Path("sample_checkpoints").absolute()
NAMES = [f"model_{k}.h5" for k in (497, 498, 499)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("obstore") is None or find_spec("boto3") is None,
        reason="buckets need the extra s3",
    ),
]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Bucket]:
    """Yield a bucket with three of the samples in `run`."""
    try:
        with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
            made = S3Bucket.create(server)
            for name in NAMES:
                made.put(f"run/{name}", (SAMPLES / name).read_bytes())
            yield made
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture
def url(filled: S3Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield the URL of the run; nothing is left in TMPDIR."""
    (tmp_path / "tmp").mkdir()
    for name, value in (filled.server.environ | {"TMPDIR": str(tmp_path / "tmp")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", None)
    yield f"{filled.url}/run"
    mirrors.close()
    assert list((tmp_path / "tmp").iterdir()) == []


def test_evaluate_scores_objects(url: str) -> None:
    """The scores are those of the same files, and a note says that each was fetched."""
    rows = data.load("blobs").split("train")
    there = [*evaluator.evaluate([f"{url}/{name}" for name in NAMES], rows)]
    here = evaluator.evaluate([SAMPLES / name for name in NAMES], rows)
    assert [(one.loss, one.metrics) for one in there] == [(one.loss, one.metrics) for one in here]
    assert [note.split(",")[0] for one in there for note in one.notes] == (
        ["was fetched to TMPDIR"] * len(NAMES)
    )


def test_sweep_averages_and_scores_objects(url: str, tmp_path: Path) -> None:
    """Every row has the scores of the same files, and the best average has the same bytes."""
    (tmp_path / "run").mkdir()
    for name in NAMES:
        (tmp_path / "run" / name).symlink_to(SAMPLES / name)
    rows = data.load("blobs")
    scores, written = [], []
    for place, source in (("there", f"{url}/"), ("here", str(tmp_path / "run"))):
        best = tmp_path / f"{place}.h5"
        found = sweeping.sweep(source, rows, windows="2-3", chosen="equal", write_best=best)
        splits = ("selection", "reporting")
        scores.append([[one.value("loss", split) for split in splits] for one in found.rows])
        written.append(best.read_bytes())
    assert len(scores[0]) > len(NAMES)
    assert scores[0] == scores[1]
    assert written[0] == written[1]
