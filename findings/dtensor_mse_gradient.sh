#!/usr/bin/env bash
# One would guess: mse_loss of two DTensors that are cut along the batch is the plain loss, with the plain gradient.
# What happens: the loss is right and its gradient is n times too large on n ranks, with equal shards and without a
# word; smooth_l1_loss, huber_loss and soft_margin_loss do the same, l1_loss and
# binary_cross_entropy_with_logits do not. Backward divides by the number of elements of a rank's own shard.
# Who is hurt: who trains a regression (fields, PINNs, any surrogate) on DTensors: the learning rate is n times what was
# asked for, changes with the number of ranks, and two losses that are added weigh unlike.
# Seen with torch 2.13.0 (CPU, gloo, 2 and 4 processes); torch 2.14.1 gives the same for mse_loss and smooth_l1_loss on 2.
# Output seen: the lines that are compared below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/losses.py" <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

NAMES = ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "l1_loss", "binary_cross_entropy_with_logits")


def main(rank, world, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    prediction, target = torch.arange(4.0), torch.ones(4)
    for name in NAMES:
        loss = getattr(F, name)
        whole = prediction.clone().requires_grad_()
        plain = loss(whole, target)
        plain.backward()
        shards = distribute_tensor(prediction, mesh, [Shard(0)]).requires_grad_()
        cut = loss(shards, distribute_tensor(target, mesh, [Shard(0)]))
        cut.backward()
        torch.testing.assert_close(cut.full_tensor(), plain)
        ratio = (shards.grad.full_tensor()[2:] / whole.grad[2:]).mean().item()
        if rank == 0:
            print(f"{world} ranks: the loss is right and its gradient {ratio:.3g} times that of plain {name}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    for world in (2, 4):
        mp.spawn(main, args=(world, f"{sys.argv[1]}/store{world}"), nprocs=world)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/losses.py" "$folder" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
2 ranks: the loss is right and its gradient 2 times that of plain mse_loss
2 ranks: the loss is right and its gradient 2 times that of plain smooth_l1_loss
2 ranks: the loss is right and its gradient 2 times that of plain huber_loss
2 ranks: the loss is right and its gradient 2 times that of plain soft_margin_loss
2 ranks: the loss is right and its gradient 1 times that of plain l1_loss
2 ranks: the loss is right and its gradient 1 times that of plain binary_cross_entropy_with_logits
4 ranks: the loss is right and its gradient 4 times that of plain mse_loss
4 ranks: the loss is right and its gradient 4 times that of plain smooth_l1_loss
4 ranks: the loss is right and its gradient 4 times that of plain huber_loss
4 ranks: the loss is right and its gradient 4 times that of plain soft_margin_loss
4 ranks: the loss is right and its gradient 1 times that of plain l1_loss
4 ranks: the loss is right and its gradient 1 times that of plain binary_cross_entropy_with_logits
SEEN
