"""Trains a small network on the mesh that its launcher gives it, and prints what every launcher must print alike."""

# pyright: standard

import torch

import pmod

ranks = pmod.Topology.detect().world_size
mesh = pmod.make_mesh(data=-1, model=1 if ranks % 2 else 2)
pmod.set_mesh(mesh)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(mesh.device)
inputs = torch.randn(48, 8, device=mesh.device)  # 48 samples go evenly to 1, 2, 3 and 4 ranks
targets = inputs.sin().sum(1, keepdim=True)


def descend(rate: float) -> None:
    """Gradient descent by hand: torch.optim imports the compiler, which takes a rank a second and more."""
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter -= rate * parameter.grad


@pmod.checked
def step(x: torch.Tensor, y: torch.Tensor) -> float:
    params = pmod.pvary(dict(model.named_parameters()), "data")
    # each rank of the model axis has its part of the 32 hidden values
    weight, bias = pmod.shard((params["0.weight"], params["0.bias"]), "model")
    hidden = torch.tanh(x @ weight.T + bias)
    prediction = pmod.psum(hidden @ pmod.shard(params["2.weight"], "model", dim=1).T, "model") + params["2.bias"]
    loss = pmod.pmean(((prediction - y) ** 2).mean(), "data")
    model.zero_grad()
    loss.backward()
    descend(0.1)
    return loss.item()


loss = float("nan")
for _ in range(50):
    loss = step(*pmod.shard((inputs, targets), "data"))
if mesh.topology.rank == 0:
    print(f"{mesh.topology.launcher} {ranks} ranks, loss {loss:.10e}")
