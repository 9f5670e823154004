"""Value, gradient and Hessian-vector product of every collective that JAX has, against what JAX says.

The table and what is in it: jax_table.py, which wrote it.
"""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import pmod
from tests.lib.spmd import launch

BOTH = ("data", "model")
ARGUMENT = ("input", "gradient", "gradient of the sine", "direction", "Hessian-vector product of the sine")


@cache
def table():
    # Read at once: simulated ranks are threads, and a lazy NpzFile is not made for them.
    with np.load(Path(__file__).parents[1] / "lib/jax_table.npz") as file:
        arrays = {key: file[key] for key in file.files}
    index = json.loads(str(arrays.pop("index")))["cases"]
    return {case["name"]: case for case in index}, {key: torch.from_numpy(x) for key, x in arrays.items()}


# The programs of jax_table.py, in pmod.


def megatron_mlp(x, w_in, w_out):
    hidden = torch.tanh(pmod.pvary(x, "model") @ pmod.pvary(w_in, "data"))
    return pmod.psum(hidden @ pmod.pvary(w_out, "data"), "model")


def sequence_parallel_mlp(x, w_in, w_out):
    hidden = torch.tanh(pmod.all_gather(x, "ring") @ w_in)
    return pmod.psum_scatter(hidden @ w_out, "ring")


def rms_norm(x, scale):
    mean_square = pmod.pvary(pmod.pmean((x * x).mean(-1, keepdim=True), "ring"), "ring")
    return x * torch.rsqrt(mean_square + 1e-3) * scale


def batch_norm(x):
    centred = x - pmod.pvary(pmod.pmean(x.mean(0), BOTH), BOTH)
    variance = pmod.pmean((centred * centred).mean(0), BOTH)
    return centred * pmod.pvary(torch.rsqrt(variance + 1e-3), BOTH)


def ring_attention(query, block):
    total = torch.zeros_like(query)
    for _ in range(4):
        total = total + torch.tanh(query @ block.T) @ block
        block = pmod.ppermute(block, "ring", [(i, (i + 1) % 4) for i in range(4)])
    return total


def data_parallel_loss(w, b, x):
    w, b = pmod.pvary(w, BOTH), pmod.pvary(b, BOTH)
    return pmod.pmean(torch.sin(x @ w + b).square().mean(), BOTH)


def weighted_mean(x, weight):
    return pmod.pmean(x, "ring", weight=weight)


def fourier_2d(x):
    n = torch.arange(4)
    dft = torch.exp(-2j * torch.pi / 4 * torch.outer(n, n).to(x.dtype))
    columns = pmod.all_to_all(x @ dft, "ring", split_dim=1, concat_dim=0)
    return pmod.all_to_all(dft @ columns, "ring", split_dim=0, concat_dim=1)


def pipeline(x, w):
    for _ in range(3):
        x = pmod.pshift(torch.tanh(x @ w), "ring", wrap=False)
    return x


PROGRAMS = {
    f.__name__: f
    for f in (
        megatron_mlp,
        sequence_parallel_mlp,
        rms_norm,
        batch_norm,
        ring_attention,
        data_parallel_loss,
        weighted_mean,
        fourier_2d,
        pipeline,
    )
}


def call(case, arguments):
    if case["function"] in PROGRAMS:
        return PROGRAMS[case["function"]](*arguments)
    axis = case["axis"] if isinstance(case["axis"], str) else tuple(case["axis"])
    return getattr(pmod, case["function"])(*arguments, axis, **case["kwargs"])


def derivatives(output, weights, arguments, directions):
    """Per argument: gradient of L, gradient of S, Hessian-vector product of S (the letters of jax_table.py).

    The losses are this rank's own. On a V output the ranks' losses add up, an I output is everybody's one loss: by what
    the collectives know, nothing is said here.
    """
    linear = torch.autograd.grad((output * weights).sum().real, arguments, retain_graph=True)
    first = torch.autograd.grad((output.sin() * weights).sum().real, arguments, create_graph=True)
    # One root per argument: summed, V and I products would mix.
    slopes = [(g.conj() * v).sum().real for g, v in zip(first, directions, strict=True)]
    return linear, first, torch.autograd.grad(slopes, arguments)


def check(name):
    """On one rank, with the case's mesh set: run, then compare. Nothing is sent after the first difference is found."""
    index, arrays = table()
    case = index[name]
    rank = pmod.axis_index(tuple(axis for axis, _ in case["mesh"]))

    def same(actual, expected, what):
        torch.testing.assert_close(
            actual, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}, {what} on rank {rank}: {text}"
        )

    rows = [arrays[f"case/{name}/argument/{i}"][:, rank] for i in range(len(case["inputs"]))]
    result = arrays[f"case/{name}/result"][:, rank]
    arguments = [row[0].clone().requires_grad_(case["differentiable"]) for row in rows]
    output = call(case, arguments)
    if not isinstance(output, torch.Tensor):
        assert output == result[0].item(), f"{name}, output on rank {rank}: {output}, not {result[0].item()}"
        return
    found = []
    if case["differentiable"]:
        found = derivatives(output, result[1], arguments, [row[3] for row in rows])
    same(output.detach(), result[0], "output")
    for i, row in enumerate(rows):
        same(arguments[i].detach(), row[0], f"input {i}, which was to be left alone,")
        for k, values in zip((1, 2, 4), found, strict=False):
            same(values[i].detach(), row[k], f"{ARGUMENT[k]} by argument {i}")


def check_all(names):
    for name in names:
        check(name)


@pytest.mark.parametrize("name", list(table()[0]))
def test_jax_threads(name):
    pmod.simulate(check, name, **dict(table()[0][name]["mesh"]))


@pytest.mark.parametrize("mesh", [{"ring": 4}, {"data": 2, "model": 2}], ids="x".join)
def test_jax_processes(mesh):
    names = [name for name, case in table()[0].items() if dict(case["mesh"]) == mesh]
    assert names
    launch(check_all, names, **mesh)


def test_table_kinds():
    """What the index calls invariant is stored as equal on all ranks along that axis, what varies is not."""
    index, arrays = table()
    for name, case in index.items():
        sizes = [size for _, size in case["mesh"]]
        tensors = {f"argument/{i}": varies for i, varies in enumerate(case["inputs"])} | {"result": case["output"]}
        for key, varies in tensors.items():
            x = arrays[f"case/{name}/{key}"]
            x = x.unflatten(1, sizes)
            for d, (axis, _) in enumerate(case["mesh"], 1):
                equal = bool((x == x.narrow(d, 0, 1)).all())
                assert equal == (axis not in varies), f"{name}, {key} along {axis}"
