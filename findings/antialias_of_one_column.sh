#!/usr/bin/env bash
# One would guess: F.interpolate(profile, size=(4, 1), antialias=True) of an image that is one column wide gives the same
# numbers as that of a wider image whose columns are all alike, and as that of the same numbers along a row.
# What happens (torch 2.13.0 and 2.14.1, CPU): every row of the result is the first one's value, silently, in both modes
# that have antialias; a row of one height, and two columns, are right.
# Who is hurt: profiles kept as N x 1 images, and fields that are cut over longitudes until a rank holds one column.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip -q install "torch==${TORCH:-2.13.0}" numpy
venv/bin/python - <<'PYTHON'
import torch
import torch.nn.functional as F

column = torch.arange(16.0).reshape(1, 1, 16, 1)
print("torch", torch.__version__)
for mode in ("bilinear", "bicubic"):
    one = F.interpolate(column, size=(4, 1), mode=mode, antialias=True).flatten().tolist()
    two = F.interpolate(column.expand(1, 1, 16, 2), size=(4, 2), mode=mode, antialias=True)[0, 0, :, 0].tolist()
    row = F.interpolate(column.transpose(2, 3), size=(1, 4), mode=mode, antialias=True).flatten().tolist()
    print(f"{mode}: one column {one}\n  the first of two columns {two}\n  the same along a row {row}")
    assert two == row and len(set(two)) == 4, "two columns, or a row, are no longer right"
    assert one == [two[0]] * 4, "one column is no longer the first value repeated"
print("still so")
PYTHON
