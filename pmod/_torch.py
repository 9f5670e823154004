"""Every private name of torch that pmod uses, and the versions of torch that have it.

Each has one alias or function. No other file of pmod names one
(tests/layout/test_layout.py), and tests/core/test_torch.py says of each what breaks
without it. An alias is the thing of torch itself, so that a hot path pays nothing for it. On a torch that lacks a name
`import pmod` works all the same: what stands in its place raises where it is used, with
the version of that torch.
"""

from __future__ import annotations

import operator
import pkgutil
import re
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
import torch.autograd.profiler as profiler
from torch import Tensor

from pmod._errors import PmodError, phrase
from pmod._site import call_site

if TYPE_CHECKING:
    from enum import Enum

    from torch.distributed import ProcessGroup
    from torch.fx import Graph

T = TypeVar("T")

NEWEST = (2, 14)
"""The newest torch on which pmod was tested."""

ALL = ("2.11.0", "2.12.0", "2.13.0", "2.14.1")
SEEN: dict[str, tuple[str, ...]] = {}
"""Of each private name, as "module:attribute", the versions of torch in which it was
seen.
"""


def newer_than_tested(version: str) -> str:
    """Return what to say of a torch newer than the newest tested; "" of another."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return ""
    newest = ".".join(map(str, NEWEST))
    given = f"pmod was tested with torch up to {newest}, and this is torch {version}"
    right = "What this torch lacks raises where it is used. To silence this, before `import pmod`:\n"
    right += 'warnings.filterwarnings("ignore", "pmod was tested with torch"), or python -W with the same words.'
    return f"{given}.\n{right}"


if _newer := newer_than_tested(torch.__version__):
    warnings.warn(_newer, UserWarning, stacklevel=2)

# --- looking a name up ----------------------------------------------------------------


def _lacking(path: str) -> PmodError:
    name, versions = path.replace(":", "."), SEEN[path]
    first, last = (
        ".".join(version.split(".")[:2]) for version in (versions[0], versions[-1])
    )
    given = f"torch {torch.__version__} has no {name}, which this needs"
    right = f"It was seen in torch {first} to {last}: install one of these, or a pmod that was tested with this torch."
    return PmodError(phrase(call_site()[0], given, right))


class _Lacking:
    """What stands in the place of what this torch lacks: it raises where it is called,
    or asked for its instances.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise _lacking(self._path)

    def __instancecheck__(self, instance: object) -> NoReturn:
        raise _lacking(self._path)


def _resolved(path: str) -> Any:
    owner, _, name = path.rpartition(".")
    # its instances have what the class only announces
    if owner == "torch.nn:Module":
        return getattr(torch.nn.Module(), name)
    return pkgutil.resolve_name(path)


def _seen(path: str, versions: tuple[str, ...] = ALL) -> Any:
    """Return what torch has under this name, or what stands in its place."""
    SEEN[path] = versions
    try:
        return _resolved(path)
    except (ImportError, AttributeError):
        return _Lacking(path)


def _with(*paths: str) -> Callable[[T], T]:
    """Let a function that needs these names stand as it is, where this torch has them."""
    lacking = [found for found in map(_seen, paths) if isinstance(found, _Lacking)]

    def decide(f: T) -> T:
        stand_in: Any = lacking[0] if lacking else f
        return stand_in

    return decide


def _later(path: str, versions: tuple[str, ...] = ALL) -> Callable[[], Any]:
    """Return a function that brings a name which `import torch` leaves out.

    Its module takes long to import.
    """
    SEEN[path] = versions

    def bring() -> Any:
        try:
            return _resolved(path)
        except (ImportError, AttributeError) as error:
            raise _lacking(path) from error

    return bring


class Interpreter(Protocol):
    """What runs one level of torch.func."""

    def key(self) -> Enum: ...


# --- transforms and modes: who takes part in an operation -----------------------------

are_transforms_active: Callable[[], bool] = _seen(
    "torch._C:_are_functorch_transforms_active"
)
no_transforms: Callable[[], AbstractContextManager[None]] = _seen(
    "torch._C:_DisableFuncTorch"
)
no_interpreters: Callable[[], AbstractContextManager[None]] = _seen(
    "torch._functorch.pyfunctorch:temporarily_clear_interpreter_stack"
)
interpreters: Callable[[], Sequence[Interpreter] | None] = _seen(
    "torch._C:_functorch.get_interpreter_stack"
)
transform_level: Callable[[], int | None] = _seen(
    "torch._C:_functorch.maybe_current_level"
)
is_wrapped: Callable[[Tensor], bool] = _seen(
    "torch._C:_functorch.is_functorch_wrapped_tensor"
)
is_batched: Callable[[Tensor], bool] = _seen("torch._C:_functorch.is_batchedtensor")
unwrap: Callable[[Tensor], Tensor] = _seen("torch._C:_functorch.get_unwrapped")

count_function_modes: Callable[[], int] = _seen("torch._C:_len_torch_function_stack")
count_dispatch_modes: Callable[[], int] = _seen("torch._C:_len_torch_dispatch_stack")


@_with("torch._C:_get_dispatch_mode", "torch._C:_TorchDispatchModeKey.FUNCTIONAL")
def is_traced() -> bool:
    """Whether a compiler writes down what is done, below all transforms."""
    if are_transforms_active():
        return False
    functional: Any = torch._C._TorchDispatchModeKey.FUNCTIONAL
    return torch._C._get_dispatch_mode(functional) is not None


no_function_modes: Callable[[], AbstractContextManager[None]] = _seen(
    "torch._C:DisableTorchFunction"
)
no_function_subclasses: Callable[[], AbstractContextManager[None]] = _seen(
    "torch._C:DisableTorchFunctionSubclass"
)
no_dispatch_modes: Callable[[], AbstractContextManager[object]] = _seen(
    "torch.utils._python_dispatch:_disable_current_modes"
)

# autograd's own vmap, older than torch.func's
add_batch_dim: Callable[[Tensor, int, int], Tensor] = _seen("torch:_add_batch_dim")
remove_batch_dim: Callable[[Tensor, int, int, int], Tensor] = _seen(
    "torch:_remove_batch_dim"
)
_enter_older_vmap: Callable[[], int] = _seen("torch._C:_vmapmode_increment_nesting")
_leave_older_vmap: Callable[[], int] = _seen("torch._C:_vmapmode_decrement_nesting")


@_with("torch._C:_vmapmode_increment_nesting", "torch._C:_vmapmode_decrement_nesting")
def older_vmap_level() -> int:
    """Return how many of autograd's own vmaps run."""
    level = _enter_older_vmap() - 1
    _leave_older_vmap()
    return level


def _asks_for_older_vmap() -> Callable[[], bool]:
    key_of: Callable[[str], object] = _seen("torch._C:_dispatch_key_parse")
    included: Callable[[object], bool] = _seen(
        "torch._C:_dispatch_tls_is_dispatch_key_included"
    )
    try:
        key = key_of("VmapMode")
    except (PmodError, RuntimeError):
        # no such function, or no such key
        return _Lacking("torch._C:_dispatch_key_parse")
    return partial(included, key)


is_in_older_vmap: Callable[[], bool] = _asks_for_older_vmap()

# --- autograd -------------------------------------------------------------------------

backward_here: Callable[[], int] = _seen("torch._C:_current_graph_task_id")
"""The number of the backward pass that runs on this thread, or -1."""

saving_hooks: Callable[[bool], object] = _seen(
    "torch._C:_autograd._top_saved_tensors_default_hooks"
)
next_number: Callable[[], int] = _seen("torch._C:_autograd._get_sequence_nr")
"""The number that this thread's next node gets."""

at_end_of_backward: Callable[[Callable[[], None]], None] = _seen(
    "torch.autograd:Variable._execution_engine.queue_callback"
)
with_forward_mode: Callable[[bool], AbstractContextManager[object]] = _seen(
    "torch.autograd.forward_ad:_set_fwd_grad_enabled"
)
below_views: Callable[[], AbstractContextManager[None]] = _seen(
    "torch._C:_AutoDispatchBelowADInplaceOrView"
)
below_autograd: Callable[[], AbstractContextManager[None]] = _seen(
    "torch._C:_AutoDispatchBelowAutograd"
)
is_one_level_allowed: Callable[[], bool] = _seen(
    "torch._C:_functorch.get_single_level_autograd_function_allowed"
)
allow_one_level: Callable[[bool], None] = _seen(
    "torch._C:_functorch.set_single_level_autograd_function_allowed"
)


@_with("torch._C:_after_autograd_keyset")
def after_autograd(keyset: Any) -> Any:
    """Return those of these dispatch keys that come after autograd's."""
    return keyset & torch._C._after_autograd_keyset


@_with("torch.autograd.forward_ad:_current_level")
def forward_level() -> int:
    """Return the innermost level of forward mode, or -1."""
    return forward_ad._current_level


@_with("torch._functorch.eager_transforms:JVP_NESTING")
def swap_forward_nesting(levels: int) -> int:
    """Let torch.func.jvp take this many levels of forward mode for its own; return how
    many it took before.
    """
    transforms: Any = sys.modules["torch._functorch.eager_transforms"]
    before, transforms.JVP_NESTING = transforms.JVP_NESTING, levels
    return before


_users: Callable[[int], int] = _seen("torch._C:_storage_Use_Count")


def is_memory_shared(x: Tensor) -> bool:
    """Return whether other tensors hold the memory of x."""
    # what is asked holds it, too
    alone = torch.empty(0)
    return _users(memory_of(x)) > _users(memory_of(alone))


@_with("torch._C:_FunctionBase._sequence_nr")
def number_of(node: Any) -> int:
    """Return the place of a node in the order of backward, which takes the highest first."""
    return node._sequence_nr()


@_with("torch._C:_FunctionBase._set_sequence_nr")
def set_number(node: Any, number: int) -> None:
    """Give a node of autograd's graph another place in the order of backward."""
    node._set_sequence_nr(number)


_CHECKPOINTS = "torch.utils.checkpoint:_checkpoint_without_reentrant_generator"
# the one that torch calls since 2.14
_CHECKPOINTS_NOW = f"{_CHECKPOINTS}_impl"
_seen(_CHECKPOINTS_NOW, ALL[3:])


@_with(_CHECKPOINTS)
def replace_checkpoints(f: Callable[[Any], Any]) -> None:
    """Put f of it in the place of the generator that runs a checkpoint, once a process."""
    module: Any = sys.modules["torch.utils.checkpoint"]
    older, newer = _CHECKPOINTS.split(":")[1], _CHECKPOINTS_NOW.split(":")[1]
    name = newer if hasattr(module, newer) else older
    generator = getattr(module, name)
    if not hasattr(generator, "__wrapped__"):
        setattr(module, name, f(generator))


def _one_level() -> Any:
    base: Any = _seen("torch.autograd.function:_SingleLevelFunction")
    key: Any = _seen("torch.autograd:Function._compiled_autograd_key")
    # a class needs a base, also where all that it can do is raise
    if isinstance(base, _Lacking):
        base = type("Lacking", (), {"apply": staticmethod(base)})

    class OneLevel(base):
        _compiled_autograd_key = staticmethod(key)  # asked for by compiled autograd

    return OneLevel


OneLevel: Any = _one_level()
"""What torch makes an autograd.Function of for each level of torch.func: the same, of
one level.
"""

# --- tensors and modules --------------------------------------------------------------

is_view: Callable[[Tensor], bool] = _seen("torch:Tensor._is_view")
has_storage: Callable[[Tensor], bool] = _seen("torch._C:_has_storage")
lazy_clone: Callable[[Tensor], Tensor] = _seen("torch:_lazy_clone")
unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = _seen(
    "torch.ops:aten._unsafe_view.default"
)
swap_values: Callable[[Tensor, Tensor], None] = _seen("torch._C:_swap_tensor_impl")
make_wrapper: Callable[..., Any] = _seen("torch:Tensor._make_wrapper_subclass")
count_uses: Callable[[Tensor], int] = _seen("torch:Tensor._use_count")
TYPED_STORAGE = "_typed_storage"  # a method of tensors, by the name under which function modes see it
_seen("torch:Tensor._typed_storage")

FOREACH = "_foreach"  # how the names of functions on lists of tensors begin


@_with("torch:Tensor._version")
def version_of(x: Tensor) -> int:
    """Return how often a tensor was changed in place."""
    return x._version


version_untraced: Callable[[Tensor], int] = _with("torch:Tensor._version")(
    operator.attrgetter("_version")
)
"""The same in half the time, where torch.compile does not follow: it knows no
attrgetter.
"""


@_with("torch:Tensor._base")
def base_of(x: Tensor) -> Tensor | None:
    """Return the tensor that x is a view of."""
    return x._base


@_with("torch:Tensor._base")
def gets_base(getter: Any) -> bool:
    """Whether this is what reads the tensor that another is a view of."""
    return getter.__self__ is Tensor._base


@_with("torch:Tensor._post_accumulate_grad_hooks")
def accumulation_hooks(x: Tensor | None) -> dict[int, Callable[..., object]]:
    """Return the hooks that run when a gradient was added into x.grad, by their number."""
    return getattr(x, "_post_accumulate_grad_hooks", None) or {}


@_with("torch:UntypedStorage._cdata")
def memory_of(x: Tensor) -> int:
    """Return what names the storage of a tensor, the same for all that share it."""
    return x.untyped_storage()._cdata


@_with("torch.nn:Module._parameters")
def parameters_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter | None]:
    """Return the parameters of a module, without those of the modules within."""
    return module._parameters


@_with("torch.nn:Module._forward_hooks")
def forward_hooks(module: torch.nn.Module) -> dict[int, Callable[..., object]]:
    """Return the hooks that run after the module was called, by their number."""
    return module._forward_hooks


@_with("torch.nn:Module._forward_pre_hooks")
def forward_pre_hooks(module: torch.nn.Module) -> dict[int, Any]:
    """Return the hooks that run before the module is called, by their number."""
    return module._forward_pre_hooks


# --- process groups -------------------------------------------------------------------

is_agents_store: Callable[[], bool] = _seen(
    "torch.distributed.rendezvous:_torchelastic_use_agent_store"
)
"""Whether torchrun's agent serves the store."""

default_store: Callable[[], Any] = _seen(
    "torch.distributed.distributed_c10d:_get_default_store"
)
make_group: Callable[..., tuple[ProcessGroup, object]] = _seen(
    "torch.distributed.distributed_c10d:_new_process_group_helper"
)


@_with("torch.distributed.distributed_c10d:_world")
def groups_known() -> list[ProcessGroup]:
    """Return the process groups that torch.distributed knows."""
    return list(torch.distributed.distributed_c10d._world.pg_map)


@_with("torch.distributed.distributed_c10d:_world")
def note_ranks(group: ProcessGroup, ranks: Sequence[int]) -> None:
    """Tell torch.distributed which ranks a group is of, in the order of the group: what
    new_group does at its end.
    """
    numbers = {rank: index for index, rank in enumerate(ranks)}
    torch.distributed.distributed_c10d._world.pg_group_ranks[group] = numbers


def _method(name: str) -> Callable[[object], Callable[..., Any]]:
    """Return what finds a method of process groups, and of what stands in for one."""

    def find(group: object) -> Any:
        return getattr(group, name)

    return _with(f"torch.distributed:ProcessGroup.{name}")(find)


all_gather_of = _method("_allgather_base")
reduce_scatter_of = _method("_reduce_scatter_base")


@_with("torch.distributed:ProcessGroup._get_backend")
def own_backend(group: Any, device: torch.device) -> Any:
    """Return what sends for a group, whose own methods go through torch's dispatcher first.

    It is the group where it has no backend of torch's, as one in Python.
    """
    try:
        return group._get_backend(device)
    except (AttributeError, RuntimeError):
        return group


# --- operators ------------------------------------------------------------------------

Operator: Any = _seen("torch._ops:OpOverload")
OperatorPacket: Any = _seen("torch._ops:OpOverloadPacket")
HigherOrderOperator: Any = _seen("torch._ops:HigherOrderOperator")


@_with("torch:ops.aten.add_.Tensor._schema")
def schema_of(func: Any) -> Any:
    """Return what an operator says of its arguments."""
    return func._schema


_registry: Any = _seen("torch._library.simple_registry:singleton")
_effects: Any = _seen("torch._library.effects:EffectType")


@_with("torch._library.simple_registry:singleton", "torch._library.effects:EffectType")
def _register_ordered(name: str) -> None:
    _registry.find(name).effect.register(_effects.ORDERED)


def keep_calls(name: str) -> Callable[[], None]:
    """Tell compilers neither to drop a call of an operator nor to change the order of
    its calls.

    Return what raises where torch cannot be told: an operator that may be dropped must
    not go into a compiled graph.
    """
    try:
        _register_ordered(name)
    except (AttributeError, TypeError):
        # it takes them in another way
        return _Lacking("torch._library.simple_registry:singleton")
    except PmodError:
        stand_in: Any = _register_ordered
        return stand_in
    return lambda: None


# --- the compiler ---------------------------------------------------------------------

_MARK = "_dynamo_marked_constant"


def constant_in_graphs(f: T) -> T:
    """Let torch.compile call f while it traces, and take the result for a constant.

    This is what torch.compiler.assume_constant_result sets; that one imports
    torch._dynamo (2 s), and this does not.
    """
    setattr(f, _MARK, True)
    return f


def untraced(f: Callable[..., T]) -> Callable[..., T]:
    """Return f such that the compiler, if it was imported, does not look into it.

    To import it takes 2 s.
    """
    if "torch._dynamo" not in sys.modules:
        return f
    unseen: Any = torch.compiler.disable(f)
    return unseen


class _Uncompiled:
    """The stance of the compiler, which is the process's: threads come and go in any
    order, and the last one puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stance: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        with self._lock:
            # to import the compiler takes 2 s
            if self._inside == 0 and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            stance, is_last = self._stance, self._inside == 0
            if is_last and stance is not None:
                self._stance = None
                stance.__exit__(None, None, None)


uncompiled = _Uncompiled()
"""A context in which what was compiled runs as it was written."""


_translator = _later("torch._dynamo.symbolic_convert:InstructionTranslator.current_tx")
_traced_tensor = _later("torch._dynamo.variables.tensor:TensorVariable")
_traced_modes = _later(
    "torch._dynamo.variables.torch_function:can_dispatch_torch_function"
)


def graph_traced() -> Graph:
    """Return the graph that torch.compile writes, while it traces."""
    return _translator()().output.graph


def assignments_traced() -> tuple[type, Callable[..., bool]] | None:
    """Return the class by which torch.compile follows tensors, and whether function
    modes see what is done to one.

    None where this torch has no such names: `pmod._shard.traced` finds writes in the
    graph, too.
    """
    try:
        return _traced_tensor(), _traced_modes()
    except PmodError:
        return None


def is_inductor_loaded() -> bool:
    """Whether Inductor was imported, which takes seconds."""
    return "torch._inductor.lowering" in sys.modules


kernel_made = _later("torch._inductor.ir:FallbackKernel.create")
node_class = _later("torch._inductor.ir:IRNode")
box_made = _later("torch._inductor.ir:TensorBox.create")
lowering_registered = _later("torch._inductor.lowering:register_lowering")
graph_lowered = _later("torch._inductor.virtualized:V")
map_only: Callable[..., Any] = _seen("torch.utils._pytree:tree_map_only")


_functional = _later("torch.ops:_c10d_functional")
_shapes = _later("torch.distributed._functional_collectives:wait_tensor")


def functional_collectives() -> Any:
    """Return torch's functional collectives, with the shapes of their results."""
    # the module tells torch the shapes; it takes a tenth of a second to import
    _shapes()
    return _functional()


traced_graph = _later("torch.fx.experimental.proxy_tensor:make_fx")
core_decompositions = _later("torch._inductor.decomposition:select_decomp_table")


def ordered_effect() -> object:
    """Return the effect of an operator whose calls stay in order."""
    return _effects.ORDERED


# --- the profiler, the demo and the benchmark -----------------------------------------


@_with("torch.autograd.profiler:_is_profiler_enabled")
def is_profiled() -> bool:
    """Whether torch.profiler runs."""
    return profiler._is_profiler_enabled


reduce_differentiably = _later("torch.distributed._functional_collectives:all_reduce")
gather_differentiably = _later(
    "torch.distributed._functional_collectives:all_gather_tensor_autograd"
)
scatter_differentiably = _later(
    "torch.distributed._functional_collectives:reduce_scatter_tensor_autograd"
)
exchange_differentiably = _later(
    "torch.distributed._functional_collectives:all_to_all_single_autograd"
)
fake_store = _later("torch.testing._internal.distributed.fake_pg:FakeStore")
set_element = _later("torch.distributed.checkpoint._traverse:set_element")
layout_made = _later("torch.serialization:_get_layout")
memory_formats = _later("torch.distributed.checkpoint.metadata:_MEM_FORMAT_ENCODING")
storage_info = _later("torch.distributed.checkpoint.filesystem:_StorageInfo")
storage_prefix = _later("torch.distributed.checkpoint.filesystem:_StoragePrefix")
