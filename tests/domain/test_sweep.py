"""Every function that torch has, called in a few ways on a block: equal to the whole's, or refused. None is silent."""

# pyright: standard

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pmod
from tests.lib.fields import cuttings, joined

Tensor = torch.Tensor
CUTTING = cuttings(8, 6)["both"]
SPACES: dict[str, Any] = {"torch": torch, "functional": F, "Tensor": torch.Tensor, "linalg": torch.linalg,
                          "special": torch.special, "fft": torch.fft}  # fmt: skip

# What follows the field; an argument that is a function is called with it.
CALLS: dict[str, tuple[Any, ...]] = {
    "alone": (),
    "with a number": (2,),
    "with two numbers": (1, 2),
    "with a tuple": ((2, 3),),
    "with another field": (lambda t: t * 0.5,),
    "with one column": (lambda t: (t * 0.5)[..., :1],),
    "with a dim and places": (2, lambda t: torch.zeros(t.shape, dtype=torch.long)),
}

# They draw, know of no field, change the state of the process, or tell objects apart.
NOT_HERE = frozenset("""
    rand randn randint rand_like randn_like randint_like dropout dropout1d dropout2d dropout3d alpha_dropout
    feature_dropout feature_alpha_dropout bernoulli normal multinomial poisson binomial rrelu rrelu_ gumbel_softmax
    cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_ bernoulli_ empty empty_like new_empty
    empty_quantized resize_ set_ seed initial_seed manual_seed get_rng_state set_rng_state set_default_device
    set_default_dtype set_default_tensor_type set_num_threads set_num_interop_threads set_deterministic_debug_mode
    use_deterministic_algorithms prepare_multiprocessing_environment set_flush_denormal set_float32_matmul_precision
    set_grad_enabled set_warn_always inference_mode import_ir_module compile export load save fork wait share_memory_
    cuda xpu ipu hpu mtia pin_memory backward register_hook record_stream retain_grad storage typed_storage module_load
    get_device is_tensor apply_ map_ map2_ has_torch_function has_torch_function_unary has_torch_function_variadic
    __hash__ __dir__ __repr__ __format__ __str__ __reduce__ __reduce_ex__ __deepcopy__ __sizeof__ __setstate__
    __getstate__ __class__ __init_subclass__ __subclasshook__ __new__ __init__
""".split())  # fmt: skip  # noqa: SIM905


def field() -> Tensor:
    return torch.rand(2, 4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1


def functions(space: Any) -> Iterator[tuple[str, Any]]:
    for name in sorted(dir(space)):
        thing = getattr(space, name)
        is_private = name.startswith("_") and not name.startswith("__")
        # what sets the process's state would change the tests that follow
        if name.startswith(("set_", "autocast_")):
            continue
        if callable(thing) and not isinstance(thing, type) and not is_private and name not in NOT_HERE:
            yield name, thing


def listed(y: Any) -> list[Any]:
    return [y] if isinstance(y, Tensor) else list(y)


def is_comparable(y: Any) -> bool:
    if isinstance(y, int | float | bool | Tensor):
        return True
    return isinstance(y, list | tuple) and all(isinstance(of, Tensor | int) for of in y)


def found_on_blocks(f: Any, wanted: Any) -> str:
    """In a rank: "equal", "refused", or what is wrong."""
    net = pmod.domain_parallel(lambda x: f(x * 1), CUTTING.spec, sizes=CUTTING.sizes)
    try:
        y = net(CUTTING.block(field()))
    except pmod.PmodError:
        return "refused"
    except Exception as error:
        # torch's words for its own arguments are not one of pmod's
        return f"{type(error).__name__}: {error}"
    if isinstance(wanted, int | float):
        return "equal" if y == wanted else f"{y}, not {wanted}"
    pairs = list(zip(listed(y), listed(wanted), strict=True))
    for ours, expected in pairs:
        if not isinstance(ours, Tensor):
            if ours != expected:
                return f"{ours}, not {expected}"
            continue
        whole = joined(ours, pmod.cut_of(ours))
        if whole.shape != expected.shape or whole.dtype != expected.dtype:
            return f"{whole.dtype} {tuple(whole.shape)}, not {expected.dtype} {tuple(expected.shape)}"
        same = torch.isclose(whole.to(torch.complex128), expected.to(torch.complex128), equal_nan=True)
        if not same.all():
            return "another value"
    return "equal"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("space", SPACES)
def test_none_is_silent(space: str, call: str) -> None:
    wrong: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name, function in functions(SPACES[space]):

        def f(x: Tensor, function: Any = function) -> Any:
            return function(x, *[of(x) if callable(of) else of for of in CALLS[call]])

        try:
            wanted = f(field())
        except Exception:
            # torch does not take it so
            continue
        if not is_comparable(wanted):
            continue
        (found, *_) = pmod.simulate(found_on_blocks, f, wanted, **CUTTING.mesh)
        counts[found] += 1
        if found not in ("equal", "refused"):
            wrong[name] = found
    assert not wrong
    # of most spaces and calls some are equal
    assert counts["equal"] or space in ("linalg", "fft", "special") or not counts
