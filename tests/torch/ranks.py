"""Save and load distributed checkpoints in several processes, as `torchrun` starts them.

Run as ``python -m tests.torch.ranks save WORLD FOLDER STEP`` or ``load WORLD FOLDER FILE``, or with
``weights`` in place of ``load`` where a checkpoint has no more.  The
processes are forked from one that has imported PyTorch, and talk through gloo.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import multiprocessing, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def build(world: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a small model, sharded by FSDP2, whose sizes no number of processes divides."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, 3).to(torch.bfloat16)
    )
    mesh = init_device_mesh("cpu", (world,))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters())


def place_extras(world: int, step: int) -> dict[str, Any]:
    """Return tensors that are divided in other ways than FSDP2 divides, and what is no tensor."""
    mesh = init_device_mesh("cpu", (world,))
    values = torch.arange(60, dtype=torch.float32).reshape(5, 12) / step
    found: dict[str, Any] = {
        "columns": distribute_tensor(values, mesh, [Shard(1)]),
        "replicated": distribute_tensor(values + 1, mesh, [Replicate()]),
        "half": distribute_tensor(values.to(torch.bfloat16), mesh, [Shard(0)]),
        "cube": distribute_tensor(values.reshape(3, 10, 2), mesh, [Shard(1)]),
        "empty": distribute_tensor(torch.ones(0, 3), mesh, [Shard(0)]),
        "scale": torch.tensor(float(step)),
        "count": torch.tensor(step),
    }
    if world % 2 == 0:
        both = init_device_mesh("cpu", (world // 2, 2))
        found["blocks"] = distribute_tensor(values, both, [Shard(0), Shard(1)])
    else:
        found["blocks"] = distribute_tensor(values, mesh, [Shard(1)])
    return found


def shift(model: nn.Module, step: int) -> None:
    """Change all parameters by an amount that depends on the step, and on no process."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + step / 64)


def save(rank: int, world: int, port: int, folder: str, step: int) -> None:
    """Train one step, and save model, optimizer, and more."""
    start(rank, world, port)
    model, optimizer = build(world)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    shift(model, step)
    states, slots = get_state_dict(model, optimizer)
    state = {"model": states, "optim": slots, "more": place_extras(world, step)}
    dcp.save({**state, "step": step, "note": ["of", "the", "run"]}, checkpoint_id=folder)
    dist.destroy_process_group()


def load(rank: int, world: int, port: int, folder: str, file: str) -> None:
    """Load a checkpoint into a live model and its optimizer; save whole tensors to a file."""
    start(rank, world, port)
    model, optimizer = build(world)
    states, slots = get_state_dict(model, optimizer)
    state = {"model": states, "optim": slots, "more": place_extras(world, 7), "step": 0}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=StateDictOptions(strict=True),
    )
    whole: dict[str, Any] = {"step": state["step"]}
    for name, value in (*model.state_dict().items(), *state["more"].items()):
        whole[name] = value.full_tensor() if isinstance(value, DTensor) else value
    if rank == 0:
        torch.save(whole, file)
    dist.destroy_process_group()


def load_weights(rank: int, world: int, port: int, folder: str, file: str) -> None:
    """Load the weights alone into a live model; save whole tensors to a file."""
    start(rank, world, port)
    model, _ = build(world)
    state = {"model": model.state_dict(), "more": place_extras(world, 7)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    whole = {}
    for name, value in (*model.state_dict().items(), *state["more"].items()):
        whole[name] = value.full_tensor() if isinstance(value, DTensor) else value
    if rank == 0:
        torch.save(whole, file)
    dist.destroy_process_group()


def start(rank: int, world: int, port: int) -> None:
    """Join the group of processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)


def find_port() -> int:
    """Return a port that no program listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main(action: str, world: str, folder: str, last: str) -> None:
    """Start the processes and wait for them."""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    arguments = (int(world), find_port(), folder)
    if action == "save":
        task: Any = save
        arguments_of_task: tuple[Any, ...] = (*arguments, int(last))
    else:
        task = load if action == "load" else load_weights
        arguments_of_task = (*arguments, last)
    multiprocessing.start_processes(task, arguments_of_task, nprocs=int(world), start_method="fork")


if __name__ == "__main__":
    main(*sys.argv[1:])
