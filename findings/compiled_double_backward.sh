#!/usr/bin/env bash
# One would guess: a gradient penalty through a compiled function has its derivative, or raises.
# What happens: autograd.grad(..., create_graph=True) through a function of torch.compile returns a gradient that says it
# requires a gradient, and from which no way leads back to the weights. The gradient of loss + penalty is that of the loss
# alone, and that of the penalty alone is None where unused inputs are allowed. Nothing is said, with aot_eager and with
# inductor.
# Who is hurt: who compiles the network of a PINN, of an energy whose forces are trained, or a critic with a gradient
# penalty: training runs on, and the physics is not in it.
# Seen with torch 2.13.0 (CPU); 2.14.1 gives the same.
# Output seen: the lines that are compared below.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$folder/penalty.py" <<'PYTHON'
import torch


def network(x, w):
    return torch.tanh(x @ w).sum(1)


def gradients(f, x, w):
    y = f(x, w)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    loss, penalty = y.square().sum(), slope.square().sum()
    both = torch.autograd.grad(loss + penalty, w, retain_graph=True)[0]
    alone = torch.autograd.grad(loss, w, retain_graph=True)[0]
    of_penalty = torch.autograd.grad(penalty, w, allow_unused=True)[0] if penalty.requires_grad else None
    return slope.requires_grad, torch.equal(both, alone), None if of_penalty is None else "a tensor"


x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4).requires_grad_()
w = torch.linspace(-2, 1, 16, dtype=torch.float64).reshape(4, 4).requires_grad_()
for name, f in (("eager", network), ("aot_eager", torch.compile(network, backend="aot_eager"))):
    depends, same, of_penalty = gradients(f, x, w)
    print(f"{name}: the slope requires a gradient: {depends}; gradient of loss + penalty is that of the loss: {same}; "
          f"of the penalty: {of_penalty}")
PYTHON
"$folder/venv/bin/python" -W ignore "$folder/penalty.py" 2>/dev/null | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
eager: the slope requires a gradient: True; gradient of loss + penalty is that of the loss: False; of the penalty: a tensor
aot_eager: the slope requires a gradient: True; gradient of loss + penalty is that of the loss: True; of the penalty: None
SEEN
