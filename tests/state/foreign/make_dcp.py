"""Makes `dcp_two_ranks.zip`: what two ranks of FSDP2 write with torch.distributed.checkpoint.

    torchrun --nproc-per-node 2 make_dcp.py FOLDER
    cd FOLDER && zip -r -9 dcp_two_ranks.zip dcp expected.safetensors

Three steps of AdamW, the checkpoint, and the parameters after a fourth. Ranks see the same batches.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from make_universal import Net, loss_of
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.01)
    for step in range(4):
        if step == 3:
            weights, state = get_state_dict(model, optimizer)
            progress = {"step": step, "name": "run"}
            content = {"model": weights, "optim": state, "train_state": progress}
            dcp.save(content, checkpoint_id=Path(folder) / "dcp")
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = {n: p.full_tensor().detach() for n, p in model.named_parameters()}
    if dist.get_rank() == 0:
        save_file(after, Path(folder) / "expected.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
