"""Runs of trainers as they lie on the disk: from the folder to an average that loads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from polyak_cli import average, verify


def test_a_run_of_speechbrain_is_averaged(tmp_path: Path) -> None:
    """Its best checkpoints, by the metric that it wrote; the average takes model.ckpt's place."""
    run, weights = tmp_path / "save", []
    for number, (date, wer) in enumerate(
        [("01-02+23-04-05", 9.5), ("01-03+01-00-00", 8.25), ("02-01+00-00-00", 9.0)]
    ):
        folder = run / f"CKPT+2024-{date}+00"
        folder.mkdir(parents=True)
        torch.manual_seed(number)
        model = nn.ModuleDict({"enc": nn.Linear(3, 4), "dec": nn.Linear(4, 2)})
        optimizer = torch.optim.Adam(model.parameters())
        torch.save(model.state_dict(), folder / "model.ckpt")
        torch.save(optimizer.state_dict(), folder / "optimizer.ckpt")
        (folder / "counter.ckpt").write_text(str(number + 1))
        (folder / "CKPT.yaml").write_text(f"# yamllint disable\nWER: {wer}\nend-of-epoch: true\n")
        weights.append(model.state_dict())
    output = tmp_path / "model.ckpt"
    report = average(run, output, best=2)
    assert [one.metric for one in report.plan.checkpoints] == [8.25, 9.0]
    assert any("only model.ckpt is averaged" in note for note in report.notes)
    found = torch.load(output, weights_only=True)
    for name, value in found.items():
        mean = (weights[1][name].double() + weights[2][name].double()) / 2
        assert torch.equal(value, mean.float()), name
    nn.ModuleDict({"enc": nn.Linear(3, 4), "dec": nn.Linear(4, 2)}).load_state_dict(found)
    assert verify(output, sources=[*run.iterdir()]).verified
