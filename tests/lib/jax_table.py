"""Write jax_table.npz, what JAX says about every collective that it has: run by hand, where JAX is installed.

    pip install jax numpy && python tests/lib/jax_table.py

Each case is a program on 4 devices. The table holds what test_jax.py needs to run it with pmod and compare:

    index                   JSON, one entry per case: name, function, kwargs, mesh (axis and size, in order), axis,
                            inputs and output (the mesh axes along which each varies; along the others it is
                            invariant), and differentiable (in JAX)
    case/NAME/argument/I    for the I-th argument, the rows of ARGUMENT
    case/NAME/result        the rows of RESULT

    ARGUMENT = input, gradient of L, gradient of S, direction v, gradient of Re <gradient of S, v>
    RESULT = output, weights
    L = Re sum(output * weights), S = Re sum(sin(output) * weights)

Without a derivative only the first row is there. Under its row each array has a dimension of 4, the ranks in C order of
the mesh; what is invariant is repeated. A function is pmod's, with pmod's kwargs, or a program of several collectives,
which test_jax.py spells with pmod and this file with JAX.

A sum over outputs counts a value once per coordinate along the axes on which it varies: V once per rank, I once. So the
gradients are taken *outside* shard_map, of the sum of its global result: there JAX knows one loss and follows just that
convention, whereas jax.grad inside shard_map means one thing or another by check_vma (without it, an I loss counts once
per rank, and the gradient of an I argument is not summed). check_vma=True also proves that each output varies where the
index says it does, and no further.
"""

import json
import math
import zlib
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, PartitionSpec

RING = {"ring": 4}
GRID = {"data": 2, "model": 2}
BOTH, REVERSED = ("data", "model"), ("model", "data")


# The collectives, with pmod's arguments. Dims are made non-negative here: given negative ones, lax.psum_scatter and
# lax.all_to_all fail to lower, or crash.


def pvary(x, axis):
    return lax.pcast(x, axis, to="varying")


def all_gather(x, axis, *, dim=0, tiled=True):
    return lax.all_gather(x, axis, axis=dim % (x.ndim + (not tiled)), tiled=tiled)


def psum_scatter(x, axis, *, dim=0, tiled=True):
    return lax.psum_scatter(x, axis, scatter_dimension=dim % x.ndim, tiled=tiled)


def all_to_all(x, axis, *, split_dim, concat_dim, tiled=True):
    return lax.all_to_all(x, axis, split_dim % x.ndim, concat_dim % x.ndim, tiled=tiled)


def shard(x, axis, *, dim=0):
    length = x.shape[dim] // lax.axis_size(axis)
    return lax.dynamic_slice_in_dim(pvary(x, axis), lax.axis_index(axis) * length, length, dim % x.ndim)


def unshard(x, axis, *, dim=0):
    return lax.all_gather(x, axis, axis=dim % x.ndim, tiled=True, to="invarying")


def ppermute(x, axis, perm):
    """lax.ppermute numbers the devices of a tuple of axes in the mesh's order, whatever the order of the names.

    Everywhere else in JAX, axis_index included, and everywhere in pmod the first name is the slowest: renumbered here.
    """
    if axis == REVERSED:
        place = np.arange(4).reshape(2, 2).T.ravel().tolist()
        perm = [(place[source], place[target]) for source, target in perm]
    return lax.ppermute(x, axis, perm)


def pshift(x, axis, offset=1, *, wrap=True):
    n = lax.axis_size(axis)
    pairs = [(rank, rank + offset) for rank in range(n)]
    return ppermute(x, axis, [(a, b % n) for a, b in pairs if wrap or 0 <= b < n])


COLLECTIVES = {
    "psum": (lax.psum, "V -> I"),
    "pmean": (lax.pmean, "V -> I"),
    "pmax": (lax.pmax, "V -> I"),
    "pmin": (lax.pmin, "V -> I"),
    "pvary": (pvary, "I -> V"),
    "all_gather": (all_gather, "V -> V"),
    "psum_scatter": (psum_scatter, "V -> V"),
    "shard": (shard, "I -> V"),
    "unshard": (unshard, "V -> I"),
    "all_to_all": (all_to_all, "V -> V"),
    "ppermute": (ppermute, "V -> V"),
    "pshuffle": (lax.pshuffle, "V -> V"),
    "pshift": (pshift, "V -> V"),
}


# The programs.


def megatron_mlp(x, w_in, w_out):
    """Column-parallel, then row-parallel, on a batch that is split over data."""
    hidden = jnp.tanh(pvary(x, "model") @ pvary(w_in, "data"))
    return lax.psum(hidden @ pvary(w_out, "data"), "model")


def sequence_parallel_mlp(x, w_in, w_out):
    hidden = jnp.tanh(all_gather(x, "ring") @ w_in)
    return psum_scatter(hidden @ w_out, "ring")


def rms_norm(x, scale):
    """Over features that are split over the ring; the scale is split with them."""
    mean_square = pvary(lax.pmean((x * x).mean(-1, keepdims=True), "ring"), "ring")
    return x * lax.rsqrt(mean_square + 1e-3) * scale


def batch_norm(x):
    centred = x - pvary(lax.pmean(x.mean(0), BOTH), BOTH)
    variance = lax.pmean((centred * centred).mean(0), BOTH)
    return centred * pvary(lax.rsqrt(variance + 1e-3), BOTH)


def ring_attention(query, block):
    """Unnormalized, so that it is short: each block of keys visits every rank."""
    total = jnp.zeros_like(query)
    for _ in range(4):
        total = total + jnp.tanh(query @ block.T) @ block
        block = ppermute(block, "ring", [(i, (i + 1) % 4) for i in range(4)])
    return total


def data_parallel_loss(w, b, x):
    """Replicated parameters, one loss for all."""
    w, b = pvary(w, BOTH), pvary(b, BOTH)
    return lax.pmean(jnp.square(jnp.sin(x @ w + b)).mean(), BOTH)


def weighted_mean(x, weight):
    """pmod.pmean(x, axis, weight=weight), also as a function of the weight."""
    return lax.psum(x * weight, "ring") / lax.psum(weight, "ring")


def fourier_2d(x):
    """Of a matrix whose rows are split: transform, transpose across the ring, transform, transpose back."""
    n = 4
    dft = jnp.exp(-2j * jnp.pi / n * jnp.outer(jnp.arange(n), jnp.arange(n)))
    rows = x @ dft
    columns = all_to_all(rows, "ring", split_dim=1, concat_dim=0)
    return all_to_all(dft @ columns, "ring", split_dim=0, concat_dim=1)


def pipeline(x, w):
    """Stages along the ring: what does not move on is dropped, what does not arrive is zero."""
    for _ in range(3):
        x = pshift(jnp.tanh(x @ w), "ring", wrap=False)
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


# The cases.


def draw(rng, shape, dtype):
    """Sixteenths: exact in float64, and short once compressed."""
    part = rng.integers(-16, 17, shape) / 16
    return (part + 1j * rng.integers(-16, 17, shape) / 16) if dtype == "complex128" else part


def spread(stacked, varies, mesh):
    """From one leading dimension per axis in varies to one dimension for all ranks."""
    local = stacked.shape[len(varies) :]
    absent = [i for i, axis in enumerate(mesh) if axis not in varies]
    return np.broadcast_to(np.expand_dims(stacked, absent), (*mesh.values(), *local)).reshape(-1, *local)


def on_mesh(f, mesh, inputs, output):
    """f on every device: global arrays in and out, with one leading dimension per axis on which each varies."""

    def local(*args):
        args = [x.reshape(x.shape[len(varies) :]) for x, varies in zip(args, inputs, strict=True)]
        return jnp.expand_dims(f(*args), range(len(output)))

    devices = jax.make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=(AxisType.Auto,) * len(mesh))
    specs = tuple(PartitionSpec(*varies) for varies in inputs)
    return jax.jit(jax.shard_map(local, mesh=devices, in_specs=specs, out_specs=PartitionSpec(*output), check_vma=True))


def grad(f, n, reverse):
    """The gradient as PyTorch has it, the steepest ascent. JAX returns its conjugate where the argument is complex."""
    derivative = (jax.grad if reverse else jax.jacfwd)(f, argnums=tuple(range(n)))
    return lambda *args: tuple(jnp.conj(g) for g in derivative(*args))


def arrays_of(name, f, mesh, inputs, output, shapes, dtype, differentiable, reverse=True):
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    stacked = [
        draw(rng, (*(mesh[axis] for axis in varies), *shape), dtype)
        for varies, shape in zip(inputs, shapes, strict=True)
    ]
    program = on_mesh(f, mesh, inputs, output)
    value = program(*stacked)
    arguments, results = [[x] for x in stacked], [value]
    if differentiable:
        weights = draw(rng, value.shape, value.dtype)
        direction = [draw(rng, x.shape, x.dtype) for x in stacked]

        def loss(*args):
            return jnp.sum(program(*args) * weights).real

        def sin_loss(*args):
            return jnp.sum(jnp.sin(program(*args)) * weights).real

        def slope(*args):
            return sum(jnp.sum(jnp.conj(g) * v).real for g, v in zip(gradient(sin_loss)(*args), direction, strict=True))

        def gradient(f):
            return jax.jit(grad(f, len(stacked), reverse))

        columns = [gradient(loss)(*stacked), gradient(sin_loss)(*stacked), direction, gradient(slope)(*stacked)]
        arguments = [[x, *rest] for x, *rest in zip(stacked, *columns, strict=True)]
        results = [value, weights]
    arrays = {f"argument/{i}": (rows, inputs[i]) for i, rows in enumerate(arguments)} | {"result": (results, output)}
    return {key: np.stack([spread(np.asarray(x), axes, mesh) for x in rows]) for key, (rows, axes) in arrays.items()}


def named(axis):
    return (axis,) if isinstance(axis, str) else axis


def with_four(shape, dim):
    """The shape, so long along dim that it can be split there."""
    return tuple(4 if i == dim % len(shape) else length for i, length in enumerate(shape))


def label(value):
    if isinstance(value, list):
        return ",".join("-".join(map(str, v)) if isinstance(v, list) else str(v) for v in value) or "none"
    return str(value)


def collective(function, axis, shape, dtype="float64", **kwargs):
    """One case of a collective: V on the axes that it does not name."""
    mesh = RING if axis == "ring" else GRID
    f, signature = COLLECTIVES[function]
    every, rest = tuple(mesh), tuple(name for name in mesh if name not in named(axis))
    kinds = [every if kind == "V" else rest for kind in signature.split(" -> ")]
    name = ".".join(
        [function, "+".join(named(axis)), "x".join(map(str, shape)) or "scalar"]
        + [f"{key}={label(value)}" for key, value in kwargs.items()]
        + ["complex"] * (dtype == "complex128")
    )
    return dict(
        entry=dict(name=name, function=function, kwargs=kwargs, mesh=list(mesh.items()), axis=axis),
        f=partial(f, axis_name=axis, **kwargs) if f.__module__.startswith("jax") else partial(f, axis=axis, **kwargs),
        mesh=mesh,
        inputs=[kinds[0]],
        output=kinds[1],
        shapes=[shape],
        dtype=dtype,
        differentiable=function not in ("pmax", "pmin"),  # JAX has no derivative there
        # Untiled, JAX's transpose of all_to_all raises unless it keeps the dim; forward mode does without it.
        reverse=function != "all_to_all" or kwargs.get("tiled", True),
    )


def index_case(axis):
    mesh = RING if axis == "ring" else GRID
    return dict(
        entry=dict(
            name=f"axis_index.{'+'.join(named(axis))}",
            function="axis_index",
            kwargs={},
            mesh=list(mesh.items()),
            axis=axis,
        ),
        f=lambda: lax.axis_index(axis),
        mesh=mesh,
        inputs=[],
        output=tuple(name for name in mesh if name in named(axis)),
        shapes=[],
        dtype="float64",
        differentiable=False,
    )


def program(f, mesh, inputs, output, shapes, dtype="float64"):
    axis = next(iter(mesh)) if len(mesh) == 1 else list(mesh)
    return dict(
        entry=dict(name=f.__name__, function=f.__name__, kwargs={}, mesh=list(mesh.items()), axis=axis),
        f=f,
        mesh=mesh,
        inputs=inputs,
        output=output,
        shapes=shapes,
        dtype=dtype,
        differentiable=True,
    )


def cases():
    c = collective
    for function in ("psum", "pmean", "pvary", "pmax", "pmin"):
        for axis in ("ring", "model", "data", BOTH):
            yield c(function, axis, (3, 2))
    for function in ("psum", "pmean", "pvary"):
        yield c(function, "ring", ())
        yield c(function, REVERSED, (2,))
        yield c(function, "ring", (3,), "complex128")

    for dim in (0, 1, -1):
        yield c("all_gather", "ring", (2, 3), dim=dim)
    for dim in (0, 1, 2, -1, -3):
        yield c("all_gather", "ring", (2, 3), dim=dim, tiled=False)
    yield c("all_gather", "ring", (2,))
    yield c("all_gather", "ring", (), tiled=False)
    yield c("all_gather", "ring", (2,), "complex128", dim=-1, tiled=False)
    for dim in (0, 1, -1):
        yield c("psum_scatter", "ring", (4, 4), dim=dim)
    for dim in (0, 1, -1, -3):
        yield c("psum_scatter", "ring", with_four((2, 3, 2), dim), dim=dim, tiled=False)
    yield c("psum_scatter", "ring", (8,))
    yield c("psum_scatter", "ring", (4,), tiled=False)
    yield c("psum_scatter", "ring", (4, 2), "complex128")
    for function in ("all_gather", "psum_scatter", "shard", "unshard"):
        for axis in ("model", BOTH, REVERSED):
            yield c(function, axis, (4, 2))
        if function in ("shard", "unshard"):
            yield c(function, "ring", (2, 4), dim=-1)
            yield c(function, "ring", (4,), "complex128")
        else:
            yield c(function, REVERSED, (2, 4), dim=1, tiled=False)

    for split in (0, 1, -1):
        for concat in (0, 1, -2, -1):
            shape = with_four((2, 3), split)
            yield c("all_to_all", "ring", shape, split_dim=split, concat_dim=concat)
    for split, concat in ((0, 2), (2, 0), (1, -1), (-1, -3), (-2, 1)):
        shape = with_four((2, 3, 2), split)
        yield c("all_to_all", "ring", shape, split_dim=split, concat_dim=concat)
    for split in (0, 1, 2, -1, -3):
        for concat in (0, 1, 2, -1, -2):
            shape = with_four((2, 3, 1), split)
            yield c("all_to_all", "ring", shape, split_dim=split, concat_dim=concat, tiled=False)
    yield c("all_to_all", "ring", (8, 2), split_dim=0, concat_dim=1)
    for axis in ("model", "data", BOTH, REVERSED):
        yield c("all_to_all", axis, (4, 2), split_dim=0, concat_dim=1)
    yield c("all_to_all", "ring", (4, 2), "complex128", split_dim=0, concat_dim=1)

    forward = [[i, (i + 1) % 4] for i in range(4)]
    for perm in (forward, [[0, 2], [2, 0], [1, 3], [3, 1]], [[0, 1], [1, 2]], [[3, 0]], [[1, 1]], []):
        yield c("ppermute", "ring", (2, 2), perm=perm)
    yield c("ppermute", "ring", (2,), "complex128", perm=[[0, 1], [2, 0]])
    yield c("ppermute", "model", (2,), perm=[[0, 1]])
    for axis in (BOTH, REVERSED):
        yield c("ppermute", axis, (2,), perm=forward)
    for perm in ([1, 2, 3, 0], [3, 1, 0, 2], [0, 1, 2, 3]):
        yield c("pshuffle", "ring", (2,), perm=perm)
    yield c("pshuffle", BOTH, (2,), perm=[1, 3, 0, 2])
    yield c("pshuffle", "data", (2,), perm=[1, 0])
    for wrap in (True, False):
        for offset in (1, -1, 3):
            yield c("pshift", "ring", (2,), offset=offset, wrap=wrap)
    yield c("pshift", "ring", (2,), offset=0)
    yield c("pshift", "ring", (2,), offset=-6)
    yield c("pshift", "ring", (2,), offset=5, wrap=False)
    yield c("pshift", "model", (2,))
    yield c("pshift", REVERSED, (2,), wrap=False)

    for axis in ("ring", "data", "model", BOTH, REVERSED):
        yield index_case(axis)

    ring = ("ring",)
    yield program(megatron_mlp, GRID, [("data",), ("model",), ("model",)], ("data",), [(3, 4), (4, 2), (2, 4)])
    yield program(sequence_parallel_mlp, RING, [ring] * 3, ring, [(2, 3), (3, 2), (2, 3)])
    yield program(rms_norm, RING, [ring, ring], ring, [(3, 2), (2,)])
    yield program(batch_norm, GRID, [BOTH], BOTH, [(3, 2)])
    yield program(ring_attention, RING, [ring, ring], ring, [(3, 2), (2, 2)])
    yield program(data_parallel_loss, GRID, [(), (), BOTH], (), [(3, 2), (2,), (2, 3)])
    yield program(weighted_mean, RING, [ring, ring], (), [(3,), ()])
    yield program(fourier_2d, RING, [ring], ring, [(1, 4)], "complex128")
    yield program(pipeline, RING, [ring, ring], ring, [(2, 3), (3, 3)])


def main():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    index, table = [], {}
    for case in cases():
        entry = case.pop("entry")
        arrays = arrays_of(entry["name"], **case)
        assert all(np.isfinite(x).all() for x in arrays.values()), entry["name"]
        index.append(entry | {key: case[key] for key in ("inputs", "output", "differentiable")})
        table |= {f"case/{entry['name']}/{key}": x for key, x in arrays.items()}
    assert len({entry["name"] for entry in index}) == len(index)
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, index=np.array(json.dumps({"jax": jax.__version__, "cases": index})), **table)
    print(f"{len(index)} cases, {len(table)} arrays, {math.ceil(path.stat().st_size / 1000)} kB, JAX {jax.__version__}")


if __name__ == "__main__":
    main()
