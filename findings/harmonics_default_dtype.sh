#!/usr/bin/env bash
# One would guess: torch_harmonics.RealVectorSHT(...).double() of a float64 field is a float64 transform, good to 1e-15 or so.
# What happens (torch-harmonics 0.9.3, torch 2.13.0): its factors 1 / (l (l + 1)) are made in torch's default dtype when the
# module is built, so unless that is float64 the coefficients are those of a float32 computation, 1e-8 off, without a word.
# Who is hurt: who checks a transform of their own, or conservation in a spectral model, against it in double precision.
# Output seen: the two lines that are compared below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/pip" install -q --no-deps torch-harmonics==0.9.3
cat > "$folder/harmonics.py" <<'PYTHON'
import torch
from torch_harmonics import RealVectorSHT

torch.manual_seed(0)
field = torch.randn(2, 16, 32, dtype=torch.float64)


def coefficients(default: torch.dtype) -> torch.Tensor:
    torch.set_default_dtype(default)
    return RealVectorSHT(16, 32, grid="legendre-gauss").double()(field)


single, double = coefficients(torch.float32), coefficients(torch.float64)
error = ((single - double).abs().max() / double.abs().max()).item()
print(f"both are {single.dtype}: {single.dtype == double.dtype}")
print(f"they agree to 1e-12: {error < 1e-12}; to 1e-6: {error < 1e-6}")
PYTHON
seen=$("$folder/venv/bin/python" "$folder/harmonics.py")
echo "$seen"
expected="both are torch.complex128: True
they agree to 1e-12: False; to 1e-6: True"
test "$seen" = "$expected"
