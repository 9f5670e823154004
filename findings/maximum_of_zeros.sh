#!/usr/bin/env bash
# One would guess: torch.maximum works element by element, so equal pairs give equal results wherever they lie, and the
# maximum of a shard is the shard of the maximum, bit for bit.
# What happens: of +0.0 and -0.0 it takes the one or the other by where the pair lies in memory. In whole vectors of the
# processor it keeps the second operand, in the rest behind them the first one; so in a tensor of 17 equal pairs the last
# result has another sign than the first 16, and the maximum of a part that is cut off differs from that part of the
# whole. torch.minimum does the same, torch.fmax in float32 does not.
# Who is hurt: who compares replicas or checkpoints bit for bit, or divides by such a maximum (1 / -0.0 is -inf): the
# result changes with the length of the shards, and so with the number of ranks.
# Seen with torch 2.13.0 (CPU, x86-64 with AVX2 or AVX-512), float32 and float64.
# Output seen: the lines that are compared below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/zeros.py" <<'PYTHON'
import torch

torch.set_num_threads(1)
for dtype in (torch.float32, torch.float64):
    plus, minus = torch.zeros(17, dtype=dtype), -torch.zeros(17, dtype=dtype)
    for name in ("maximum", "minimum", "fmax"):
        f = getattr(torch, name)
        whole, part = f(plus, minus), f(plus[:1], minus[:1])
        signs = "one sign" if len(set(torch.signbit(whole).tolist())) == 1 else "both signs"
        same = "equal" if torch.equal(torch.signbit(part), torch.signbit(whole[:1])) else "unlike"
        print(f"{name} {str(dtype)[6:]}: 17 equal pairs give {signs}; the first one alone: {same}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/zeros.py")
echo "$seen"
expected="maximum float32: 17 equal pairs give both signs; the first one alone: unlike
minimum float32: 17 equal pairs give both signs; the first one alone: unlike
fmax float32: 17 equal pairs give one sign; the first one alone: equal
maximum float64: 17 equal pairs give both signs; the first one alone: unlike
minimum float64: 17 equal pairs give both signs; the first one alone: unlike
fmax float64: 17 equal pairs give one sign; the first one alone: equal"
test "$seen" = "$expected"
