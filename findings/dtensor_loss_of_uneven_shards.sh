#!/usr/bin/env bash
# One would guess: the mean that a loss of DTensors takes is that of all elements, whatever lengths the shards have.
# What happens: mse_loss of shards of 3 and 2 elements is the mean of the two shards' means, and where a shard is empty
# (6 elements on 4 ranks lie as 2, 2, 2, 0) it is NaN on every rank. l1_loss of the same tensors is right.
# Who is hurt: who evaluates or trains on a last batch, a mesh or a point cloud that does not divide by the ranks: the
# error that is reported depends on the number of ranks, silently, or one small batch turns the weights into NaN.
# Seen with torch 2.13.0 (CPU, gloo); 2.14.1 gives the same wrong mean for uneven shards on 2 ranks.
# Output seen: the lines that are compared below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/losses.py" <<'PYTHON'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main(rank, world, n, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    prediction, target = torch.arange(float(n)), torch.zeros(n)
    shards = [distribute_tensor(x, mesh, [Shard(0)]) for x in (prediction, target)]
    for loss in (F.mse_loss, F.l1_loss):
        plain, cut = loss(prediction, target).item(), loss(*shards).full_tensor().item()
        if rank == 0:
            print(f"{n} elements on {world} ranks: {loss.__name__} {cut:.4f}, plain {plain:.4f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    for world, n in ((2, 5), (4, 6)):
        mp.spawn(main, args=(world, n, f"{sys.argv[1]}/store{n}"), nprocs=world)
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/losses.py" "$folder" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
5 elements on 2 ranks: mse_loss 7.0833, plain 6.0000
5 elements on 2 ranks: l1_loss 2.0000, plain 2.0000
6 elements on 4 ranks: mse_loss nan, plain 9.1667
6 elements on 4 ranks: l1_loss 2.5000, plain 2.5000
SEEN
