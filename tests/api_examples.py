"""An example for each public name, for the guide's reference of Python.

Each runs by itself, in a folder that holds `sample_checkpoints`: `tests.api_page` writes them into
the page, and the tests run them as doctests.
"""

from __future__ import annotations

#: Those that need Keras and TensorFlow.
WITH_KERAS = (
    "compare",
    "evaluate",
    "recalibrate",
    "sweep",
    "train",
    "Compared",
    "Comparison",
    "Evaluator",
    "Gain",
    "Recalibration",
    "RowScores",
    "Score",
    "Sweep",
    "TrainReport",
    "MissingExtraError",
)

#: Public name -> lines as Python's prompt shows them.
EXAMPLES: dict[str, str] = {
    "average": """
>>> from polyak_cli import average
>>> report = average("sample_checkpoints", "final.h5", scheme="exp", alpha=2, last=5)
>>> report.output.name, len(report.plan.checkpoints), report.bytes_read
('final.h5', 5, 3060)
""",
    "check": """
>>> from polyak_cli import check
>>> health = check("sample_checkpoints", last=5)
>>> health.healthy, len(health.checkpoints)
(True, 5)
""",
    "coefficients": """
>>> from polyak_cli import coefficients
>>> coefficients("linear", positions=[1, 2, 3, 4])
(0.1, 0.2, 0.3, 0.4)
""",
    "compare": """
>>> from polyak_cli import average, compare
>>> from polyak_cli.evaluation import data
>>> report = average("sample_checkpoints", "final.h5")
>>> newest = "sample_checkpoints/model_499.h5"
>>> found = compare("final.h5", newest, data.load("blobs").split("test"))
>>> [(gain.metric, gain.verdict) for gain in found.models[0].gains]
[('accuracy', 'within noise'), ('loss', 'better')]
""",
    "diff": """
>>> from pathlib import Path
>>> from polyak_cli import diff
>>> run = Path("sample_checkpoints")
>>> found = diff(run / "model_498.h5", run / "model_499.h5")
>>> found.equal, found.tensors[0].name, round(found.tensors[0].relative, 4)
(False, 'dense/sequential/dense/kernel', 0.0096)
""",
    "distances": """
>>> from polyak_cli import distances, select
>>> found = distances(select(["sample_checkpoints"], last=3))
>>> [round(one.to_average, 4) for one in found.checkpoints]
[0.0053, 0.002, 0.0052]
""",
    "effective_number": """
>>> from polyak_cli import effective_number
>>> effective_number([0.25, 0.25, 0.25, 0.25])
4.0
""",
    "evaluate": """
>>> from polyak_cli import evaluate
>>> from polyak_cli.evaluation import data
>>> rows = data.load("blobs").split("test")  # or Split("my rows", features, labels)
>>> (score,) = evaluate("sample_checkpoints/model_499.h5", rows)
>>> round(score.metrics["accuracy"], 3), score.rows
(0.806, 1000)
""",
    "halves": """
>>> import numpy as np
>>> from polyak_cli import Split, halves
>>> rows = Split("my rows", np.zeros((100, 2)), np.arange(100) % 4)
>>> choose, report = halves(rows)
>>> choose.rows, report.rows
(50, 50)
""",
    "geometry": """
>>> from polyak_cli import geometry
>>> run = geometry("sample_checkpoints", last=5)
>>> round(run.spread, 6), round(run.mean_cosine, 2), run.moved[0].name
(5.6e-05, 0.5, 'dense/sequential/dense/kernel')
""",
    "inspect": """
>>> from pathlib import Path
>>> from polyak_cli import inspect
>>> (found,) = inspect([Path("sample_checkpoints/model_499.h5")])
>>> found.format, found.parameters
('Keras HDF5', 153)
""",
    "mcnemar": """
>>> import numpy as np
>>> from polyak_cli import mcnemar
>>> ours = np.array([True] * 9 + [False])
>>> theirs = np.array([True] * 3 + [False] * 7)
>>> round(mcnemar(ours, theirs), 5)
0.03125
""",
    "model_files": """
>>> from polyak_cli import model_files
>>> found, passed_over = model_files("sample_checkpoints")
>>> len(found), [one.path.name for one in passed_over]
(10, ['README.md', 'training.csv'])
""",
    "paired_difference": """
>>> import numpy as np
>>> from polyak_cli import paired_difference
>>> ours = np.array([True] * 60 + [False] * 40)
>>> theirs = np.array([True] * 50 + [False] * 50)
>>> paired_difference(ours, theirs)
Paired(difference=0.1, low=0.05, high=0.16, rows=100)
""",
    "plan": """
>>> from polyak_cli import plan
>>> made = plan("sample_checkpoints", scheme="linear", last=3)
>>> made.coefficients, len(made.averaged), made.bytes_to_read
((0.16666666666666666, 0.3333333333333333, 0.5), 4, 1836)
""",
    "recalibrate": """
>>> import keras, numpy as np
>>> from polyak_cli import Split, recalibrate
>>> layers = [keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
>>> keras.Sequential(layers).save("average.keras")
>>> rows = Split("my rows", np.ones((64, 4), "float32"), np.zeros(64, int))
>>> report = recalibrate("average.keras", "final.keras", rows)
>>> report.layers, report.rows
(1, 64)
""",
    "run": """
>>> from polyak_cli import plan, run
>>> made = plan("sample_checkpoints", "final.h5", last=5)
>>> run(made).output.name
'final.h5'
""",
    "select": """
>>> from polyak_cli import plan, select
>>> chosen = select(["sample_checkpoints"], every=4)
>>> [one.epoch for one in chosen.checkpoints]
[491, 495, 499]
>>> plan(chosen).coefficients == (1 / 3,) * 3
True
""",
    "sign_flip": """
>>> import numpy as np
>>> from polyak_cli import sign_flip
>>> sign_flip(np.array([0.5, 0.4, 0.6, 0.3]), np.array([0.6, 0.6, 0.7, 0.5]))
0.125
""",
    "sweep": """
>>> from polyak_cli import sweep
>>> from polyak_cli.evaluation import data
>>> found = sweep("sample_checkpoints", data.load("blobs"), windows="1,10", chosen="equal")
>>> found.metric, len(found.rows), found.verdict
('accuracy', 14, 'within noise')
""",
    "train": """
>>> from polyak_cli import train
>>> report = train("run", epochs=3, keep=2)
>>> [path.name for path in report.checkpoints], len(report.history["val_loss"])
(['model_1.h5', 'model_2.h5'], 3)
""",
    "verdict": """
>>> from polyak_cli import Paired, verdict
>>> verdict(Paired(0.1, 0.02, 0.18, 100), higher_is_better=True, p=0.01)
'better'
>>> verdict(Paired(0.1, -0.02, 0.22, 100), higher_is_better=True, p=0.11)
'within noise'
""",
    "verify": """
>>> from polyak_cli import average, verify
>>> report = average("sample_checkpoints", "final.h5")
>>> found = verify("final.h5", sources=["sample_checkpoints"])
>>> found.problems, len(found.inputs)
((), 10)
""",
    "watch": """
>>> from polyak_cli import watch
>>> for report in watch("sample_checkpoints", "latest.h5", last=3, once=True, interval=0.1):
...     print(report.output.name, len(report.plan.checkpoints))
latest.h5 3
""",
    "Checked": """
>>> from polyak_cli import check
>>> newest = check("sample_checkpoints").checkpoints[-1]
>>> newest.path.name, newest.epoch, newest.nonfinite, newest.problems
('model_499.h5', 499, 0, ())
""",
    "Checkpoint": """
>>> from polyak_cli import select
>>> newest = select(["sample_checkpoints"]).checkpoints[-1]
>>> newest.path.name, newest.epoch, newest.metric
('model_499.h5', 499, None)
""",
    "Compared": """
>>> from polyak_cli import compare
>>> from polyak_cli.evaluation import data
>>> run = "sample_checkpoints"
>>> rows = data.load("blobs").split("test")
>>> (model,) = compare(f"{run}/model_490.h5", f"{run}/model_499.h5", rows).models
>>> model.score.path.name, len(model.gains)
('model_490.h5', 2)
""",
    "Comparison": """
>>> from polyak_cli import compare
>>> from polyak_cli.evaluation import data
>>> run = "sample_checkpoints"
>>> rows = data.load("blobs").split("test")
>>> found = compare(f"{run}/model_490.h5", f"{run}/model_499.h5", rows)
>>> round(found.baseline.metrics["accuracy"], 3), len(found.models)
(0.806, 1)
""",
    "Differences": """
>>> from pathlib import Path
>>> from polyak_cli import diff
>>> path = Path("sample_checkpoints/model_499.h5")
>>> found = diff(path, path)
>>> found.equal, found.mismatches, len(found.tensors)
(True, (), 4)
""",
    "Discrepancy": """
>>> import h5py
>>> from polyak_cli import average, verify
>>> report = average("sample_checkpoints", "final.h5")
>>> with h5py.File("final.h5", "r+") as file:
...     file["model_weights/dense/sequential/dense/bias"][0] += 1
>>> [one.kind for one in verify("final.h5", sources=["sample_checkpoints"]).problems]
['tensor']
""",
    "Distances": """
>>> from polyak_cli import distances, select
>>> found = distances(select(["sample_checkpoints"]))
>>> found.tensors, [one.epoch for one in found.checkpoints if one.outlier]
(4, [])
""",
    "Evaluator": """
>>> from pathlib import Path
>>> from polyak_cli import Evaluator
>>> from polyak_cli.evaluation import data
>>> evaluator = Evaluator([data.load("blobs").split("test")])
>>> for path in sorted(Path("sample_checkpoints").glob("model_49[89].h5")):
...     (found,) = evaluator.score_rows(path)  # one result for each split
...     print(path.name, found.correct.sum(), "of", len(found.correct))
model_498.h5 794 of 1000
model_499.h5 806 of 1000
""",
    "Gain": """
>>> from polyak_cli import compare
>>> from polyak_cli.evaluation import data
>>> run = "sample_checkpoints"
>>> rows = data.load("blobs").split("test")
>>> (model,) = compare(f"{run}/model_490.h5", f"{run}/model_499.h5", rows).models
>>> accuracy, loss = model.gains
>>> accuracy.metric, round(accuracy.paired.difference, 3), accuracy.verdict
('accuracy', -0.014, 'within noise')
""",
    "Geometry": """
>>> from polyak_cli import geometry
>>> run = geometry("sample_checkpoints", last=3)
>>> [round(distance, 4) for distance in run.to_average([1, 1, 2])]
[0.0464, 0.0178, 0.0276]
""",
    "Health": """
>>> from polyak_cli import check
>>> health = check("sample_checkpoints")
>>> health.healthy, health.all_problems, [one.path.name for one in health.passed_over]
(True, (), ['README.md', 'training.csv'])
""",
    "Inspection": """
>>> from pathlib import Path
>>> from polyak_cli import inspect
>>> (found,) = inspect([Path("sample_checkpoints/model_499.h5")], statistics=True)
>>> first = found.tensors[0]
>>> first.spec.name, first.spec.shape, first.spec.dtype, first.fate
('dense/sequential/dense/kernel', (2, 25), 'float32', 'averaged')
""",
    "Options": """
>>> from polyak_cli import Options, plan
>>> options: Options = {"scheme": "ema", "decay": 0.5, "last": 2}
>>> plan("sample_checkpoints", **options).coefficients
(0.3333333333333333, 0.6666666666666666)
""",
    "ScoringOptions": """
>>> from polyak_cli import Evaluator, ScoringOptions
>>> from polyak_cli.evaluation import data
>>> options: ScoringOptions = {"batch_size": 100, "metric": "accuracy"}
>>> evaluator = Evaluator([data.load("blobs").split("test")], **options)
>>> evaluator.metric.name
'accuracy'
""",
    "Paired": """
>>> from polyak_cli import Paired
>>> paired = Paired(difference=0.1, low=0.02, high=0.18, rows=100)
>>> paired.low > 0
True
""",
    "PassedOver": """
>>> from polyak_cli import select
>>> for one in select(["sample_checkpoints"]).passed_over:
...     print(f"{one.path.name}: {one.reason}")
README.md: not named like a checkpoint
training.csv: not named like a checkpoint
""",
    "Plan": """
>>> from polyak_cli import plan
>>> made = plan("sample_checkpoints", scheme="exp", alpha=2)
>>> made.names[-1], round(made.coefficients[-1], 3), round(made.effective_number, 2)
('model_499.h5', 0.396, 4.03)
""",
    "Problem": """
>>> import shutil
>>> from polyak_cli import check
>>> copied = shutil.copytree("sample_checkpoints", "run", symlinks=True)
>>> copied = shutil.copy("run/model_498.h5", "run/model_499.h5")
>>> [(problem.kind, problem.path.name) for problem in check("run").all_problems]
[('identical', '')]
""",
    "Recalibration": """
>>> import keras, numpy as np
>>> from polyak_cli import Split, recalibrate
>>> layers = [keras.Input((4,)), keras.layers.BatchNormalization(), keras.layers.Dense(2)]
>>> keras.Sequential(layers).save("average.keras")
>>> rows = Split("my rows", np.ones((64, 4), "float32"), np.zeros(64, int))
>>> report = recalibrate("average.keras", "final.keras", rows, batch_size=16)
>>> report.layers, report.batches, len(report.statistics)
(1, 4, 2)
""",
    "Report": """
>>> from polyak_cli import average
>>> report = average("sample_checkpoints", "final.h5", verify=True)
>>> report.verified, report.bytes_written == report.output.stat().st_size
(True, True)
""",
    "RowScores": """
>>> from pathlib import Path
>>> from polyak_cli import Evaluator
>>> from polyak_cli.evaluation import data
>>> evaluator = Evaluator([data.load("blobs").split("test")])
>>> (found,) = evaluator.score_rows(Path("sample_checkpoints/model_499.h5"))
>>> found.losses.shape, found.correct.shape, found.predictions.shape
((1000,), (1000,), (1000, 3))
""",
    "Score": """
>>> from polyak_cli import evaluate
>>> from polyak_cli.evaluation import data
>>> (score,) = evaluate("sample_checkpoints/model_499.h5", data.load("blobs").split("test"))
>>> round(score.loss, 3), score.loss_words
(0.542, "categorical_crossentropy (Keras's)")
""",
    "Selection": """
>>> from polyak_cli import select
>>> chosen = select(["sample_checkpoints"], last=2)
>>> [one.epoch for one in chosen.checkpoints], len(chosen.left_out), chosen.positions
([498, 499], 8, (498.0, 499.0))
""",
    "Split": """
>>> import numpy as np
>>> from polyak_cli import Split
>>> Split("my rows", np.zeros((100, 2)), np.arange(100) % 4).rows
100
""",
    "Sweep": """
>>> from polyak_cli import sweep
>>> from polyak_cli.evaluation import data
>>> found = sweep("sample_checkpoints", data.load("blobs"), windows="1,10", chosen="equal")
>>> found.label(found.winner.candidate), sorted(found.gains)
('model_494.h5', ['newest'])
""",
    "TrainReport": """
>>> from polyak_cli import train
>>> report = train("run", epochs=3, keep=2, optimizer="adam")
>>> report.optimizer, report.learning_rate, report.log.name
('adam', 0.001, 'training.csv')
""",
    "Verification": """
>>> from polyak_cli import average, verify
>>> report = average("sample_checkpoints", "final.h5")
>>> found = verify("final.h5", sources=["sample_checkpoints"])
>>> found.problems, found.unverified, found.nbytes == report.bytes_written
((), (), True)
""",
    "ChangedError": """
>>> from polyak_cli import ChangedError, FormatError
>>> issubclass(ChangedError, FormatError)  # caught where damaged files are
True
""",
    "StoreError": """
>>> from polyak_cli import FormatError, StoreError
>>> issubclass(StoreError, FormatError)  # a file of which nothing is known is not damaged
False
""",
    "CheckpointError": """
>>> from polyak_cli import CheckpointError, plan
>>> try:
...     plan("no_such_folder")
... except CheckpointError as error:
...     print(error)
no_such_folder: no such file or directory
""",
    "FormatError": """
>>> from pathlib import Path
>>> from polyak_cli import FormatError, inspect
>>> size = Path("cut.h5").write_bytes(Path("sample_checkpoints/model_499.h5").read_bytes()[:9000])
>>> try:
...     list(inspect([Path("cut.h5")]))
... except FormatError as error:
...     print(error)
cut.h5: is truncated: it has 9000 bytes, its header says 21736; save it again
""",
    "MismatchError": """
>>> import numpy as np
>>> from polyak_cli import MismatchError, plan
>>> np.savez("model_1.npz", kernel=np.zeros((2, 3)))
>>> np.savez("model_2.npz", kernel=np.zeros((3, 2)))
>>> try:
...     plan("model_*.npz")
... except MismatchError as error:
...     print("kernel" in str(error))
True
""",
    "MissingExtraError": """
>>> from polyak_cli import MissingExtraError, train
>>> try:
...     report = train("run", epochs=1, keep=1)
... except MissingExtraError as error:
...     print("install what the message names:", error)
""",
    "OutputError": """
>>> from polyak_cli import OutputError, average
>>> report = average("sample_checkpoints", "final.h5")
>>> try:
...     average("sample_checkpoints", "final.h5")
... except OutputError as error:
...     print(error)
final.h5: already exists; use --force to replace it
""",
    "PolyakError": """
>>> from polyak_cli import PolyakError, average
>>> try:
...     average("sample_checkpoints", "final.h5", last=11)
... except PolyakError as error:
...     print(type(error).__name__)
CheckpointError
""",
    "UsageError": """
>>> from polyak_cli import UsageError, plan
>>> try:
...     plan("sample_checkpoints", alpha=2)
... except UsageError as error:
...     print(error)
--alpha belongs to --scheme exp, not to equal
""",
}
