"""What each private name of torch is for: a use of pmod that needs it, tried where torch seems to lack the name.

A process that has imported torch, and not pmod, forks a child for each try, since pmod is imported anew there:

    python -m tests.lib.lacking [compiler]

reads a name a line, and writes for each a line of JSON: what the use raised, "" where it raised nothing.
"""

# pyright: standard

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

USES: dict[str, Callable[[], object]] = {}
"""By the name that it needs; its docstring says what breaks without that."""
COMPILED: set[str] = set()
"""Those names whose use runs the compiler."""
HARMLESS: set[str] = set()
"""Those without which nothing breaks."""

Use = Callable[[], object]


def needs(*names: str, compiled: bool = False, harmless: bool = False) -> Callable[[Use], Use]:
    def noted(use: Use) -> Use:
        for name in names:
            assert name not in USES and use.__doc__
            USES[name] = use
            COMPILED.update([name] if compiled else [])
            HARMLESS.update([name] if harmless else [])
        return use

    return noted


def on_two(f: Callable[..., Any], *args: Any) -> Any:
    import pmod

    return pmod.simulate(f, *args, x=2)


@contextlib.contextmanager
def alone() -> Any:
    import pmod

    with pmod.set_mesh(pmod.make_mesh(x=1)):
        yield


def psum(x: Tensor) -> Tensor:
    import pmod

    return pmod.psum(x, "x")


@contextlib.contextmanager
def fake_ranks() -> Any:
    """A mesh of 2 x 2 ranks, of which this process is the first and the others do not exist."""
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    import pmod

    importlib.import_module("torch.testing._internal.distributed.fake_pg")  # it registers the backend
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    dist.init_process_group("fake", store=store, rank=0, world_size=4)
    yield pmod.make_mesh({"x": 2, "y": 2}, topology=pmod.Topology(rank=0, world_size=4))


# --- transforms and modes -----------------------------------------------------------------------------------------


@needs("torch._C:_are_functorch_transforms_active", "torch._C:_len_torch_function_stack",
       "torch._C:_len_torch_dispatch_stack", "torch._C:_dispatch_key_parse",
       "torch._C:_dispatch_tls_is_dispatch_key_included", "torch.autograd.forward_ad:_current_level",
       "torch.autograd.profiler:_is_profiler_enabled")  # fmt: skip
def a_collective() -> None:
    """A collective does not know who else takes part: a transform, a mode, forward mode or the profiler."""
    on_two(psum, torch.ones(2))


@needs("torch.utils.checkpoint:_checkpoint_without_reentrant_generator")
def a_domain() -> None:
    """A checkpoint inside of domain_parallel would run again on blocks that nobody follows."""
    import pmod

    on_two(lambda: pmod.domain_parallel(torch.relu, pmod.P("x"))(torch.ones(1)))


@needs("torch.utils.checkpoint:_checkpoint_without_reentrant_generator_impl", harmless=True)
def a_checkpoint() -> None:
    """Nothing before torch 2.14; since then a checkpoint inside of domain_parallel raises when it runs again."""
    import pmod

    on_two(lambda: pmod.domain_parallel(torch.relu, pmod.P("x"))(torch.ones(1)))


@needs("torch._C:_storage_Use_Count")
def written_into_zeros() -> None:
    """domain_parallel cannot tell whether what a block is written into has views."""
    import pmod

    on_two(lambda: pmod.domain_parallel(lambda x: torch.zeros(2).add_(x), pmod.P("x"))(torch.ones(1)))


@needs("torch._functorch.eager_transforms:JVP_NESTING")
def a_simulation() -> None:
    """simulate cannot hold a level of forward mode open for its threads."""
    on_two(psum, torch.ones(2))


@needs("torch._C:_DisableFuncTorch", "torch._C:DisableTorchFunction")
def lengths_exchanged() -> None:
    """Plain numbers cannot be exchanged in the middle of a transform or a mode."""
    import pmod

    on_two(lambda: pmod.all_to_all_v(torch.ones(3), "x", send_sizes=[1, 2]))


@needs("torch._C:_functorch.is_batchedtensor")
def rows_of_a_vmap() -> None:
    """Rows that vmap maps are not told from others."""
    import pmod

    rows = [torch.tensor([0]), torch.tensor([1])]
    on_two(lambda: pmod.indexed_all_to_all_v(torch.ones(2), "x", indices=rows))


@needs("torch._C:_functorch.get_interpreter_stack", "torch._C:_functorch.is_functorch_wrapped_tensor",
       "torch._C:_functorch.get_unwrapped")  # fmt: skip
def debug_in_a_transform() -> None:
    """debug cannot compare what is inside a transform."""
    import pmod

    def f() -> None:
        with pmod.debug():
            torch.func.grad(lambda x: pmod.pvary(x, "x").sum())(torch.ones(2))

    on_two(f)


@needs("torch._functorch.pyfunctorch:temporarily_clear_interpreter_stack")
def a_wait_in_a_transform() -> None:
    """What was started outside a transform cannot be waited for inside."""
    import pmod

    def f() -> None:
        pending = pmod.start(pmod.psum, torch.ones(2), "x")
        torch.func.grad(lambda x: (x * pending.wait()).sum())(torch.ones(2))

    on_two(f)


@needs("torch.utils._python_dispatch:_disable_current_modes")
def a_wait_in_a_mode() -> None:
    """What was started outside a mode cannot be waited for inside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    import pmod

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def f() -> None:
        pending = pmod.start(pmod.psum, torch.ones(2), "x")
        with Mode():
            pending.wait()

    on_two(f)


@needs("torch:_add_batch_dim", "torch:_remove_batch_dim", "torch._C:_vmapmode_increment_nesting",
       "torch._C:_vmapmode_decrement_nesting")  # fmt: skip
def autograds_own_vmap() -> None:
    """is_grads_batched has no rule for collectives."""

    def f() -> None:
        x = torch.ones(2, requires_grad=True)
        torch.autograd.grad(psum(x), x, torch.eye(2), is_grads_batched=True)

    on_two(f)


# --- autograd -----------------------------------------------------------------------------------------------------


@needs("torch.autograd.function:_SingleLevelFunction", "torch._C:_AutoDispatchBelowADInplaceOrView",
       "torch:Tensor._is_view")  # fmt: skip
def a_gradient() -> None:
    """Collectives have no derivative, or one that shares memory with others."""

    def f() -> None:
        psum(torch.ones(2, requires_grad=True)).sum().backward()

    on_two(f)


@needs("torch.autograd.forward_ad:_set_fwd_grad_enabled", "torch._C:_AutoDispatchBelowAutograd",
       "torch._C:_functorch.get_single_level_autograd_function_allowed",
       "torch._C:_functorch.set_single_level_autograd_function_allowed", "torch._C:_after_autograd_keyset",
       "torch:UntypedStorage._cdata")  # fmt: skip
def a_transform() -> None:
    """torch.func cannot differentiate collectives."""
    on_two(lambda: torch.func.grad(lambda x: psum(x).sum())(torch.ones(2)))


@needs("torch.autograd:Function._compiled_autograd_key", compiled=True)
def compiled_autograd() -> None:
    """Compiled autograd cannot tell one collective's node from another."""
    with alone():
        from torch._dynamo import compiled_autograd

        from pmod._collectives.values import PSUM, SUM
        from pmod._core.bind import carry
        from pmod._mesh.ambient import resolve

        call = PSUM.along(resolve("x", "psum"), SUM)
        x = torch.ones(2, requires_grad=True)
        with compiled_autograd._enable(torch.compile(backend="eager")):
            carry(call, [x])[0].sum().backward()


@needs("torch._C:_current_graph_task_id", "torch._C:_autograd._top_saved_tensors_default_hooks",
       "torch:Tensor._make_wrapper_subclass", "torch._C:DisableTorchFunctionSubclass", "torch:Tensor._use_count",
       "torch._C:_swap_tensor_impl")  # fmt: skip
def a_started_function() -> None:
    """start cannot give a user's function a tensor that is under way."""
    import pmod

    on_two(lambda: pmod.start(lambda x: psum(x), torch.ones(2)).wait())


@needs("torch.autograd:Variable._execution_engine.queue_callback")
def gradients_averaged() -> None:
    """data_parallel does not know when backward ends."""
    import pmod

    def f() -> None:
        layer = pmod.data_parallel(nn.Linear(2, 2), "x")
        layer(torch.ones(1, 2)).sum().backward()

    on_two(f)


@needs("torch._C:_FunctionBase._set_sequence_nr", "torch:Tensor._post_accumulate_grad_hooks",
       "torch.nn:Module._parameters", "torch.nn:Module._forward_hooks",
       "torch._C:_autograd._get_sequence_nr")  # fmt: skip
def parameters_shared() -> None:
    """share_parameters can neither put copies in a module nor let their sums run last."""
    import pmod

    def f() -> None:
        layer = nn.Linear(2, 2)
        pmod.share_parameters(layer, "x")
        layer(torch.ones(1, 2)).sum().backward()

    on_two(f)


@needs("torch.nn:Module._forward_pre_hooks")
def layers_cut() -> None:
    """tensor_parallel does not know whether a layer has hooks, which a layer in its place would lose."""
    import pmod

    on_two(lambda: pmod.nn.tensor_parallel(nn.Sequential(nn.Linear(2, 2)), {"0": "column"}, "x"))


# --- tensors ------------------------------------------------------------------------------------------------------


@needs("torch:_lazy_clone")
def an_axis_of_one() -> None:
    """Along an axis of one rank memory would be copied each time."""
    with alone():
        psum(torch.ones(1 << 20))


@needs("torch.ops:aten._unsafe_view.default")
def several_tensors() -> None:
    """What travels in one message would come out as views of it."""
    import pmod

    on_two(lambda: pmod.psum([torch.ones(2, 2), torch.ones(3)], "x"))


def mapped(f: Callable[..., Any], *args: Any) -> None:
    """f in a shard_map along an axis, which all of its arguments are cut along."""
    import pmod

    specs = tuple(pmod.P("x") for _ in args)
    on_two(lambda: pmod.shard_map(f, in_specs=specs, out_specs=pmod.P("x"))(*args))


@needs("torch._C:_functorch.maybe_current_level", "torch:Tensor._version", "torch._ops:OpOverload",
       "torch._ops:OpOverloadPacket", "torch._ops:HigherOrderOperator")  # fmt: skip
def kinds_followed() -> None:
    """shard_map cannot follow what varies."""
    mapped(lambda x: x + 1, torch.ones(2))


@needs("torch:Tensor._base", "torch._C:_has_storage")
def a_change_in_place() -> None:
    """shard_map does not see that another view of a tensor changes."""
    mapped(lambda x: x.clone().add_(1), torch.ones(2))


@needs("torch:ops.aten.add_.Tensor._schema")
def an_operator() -> None:
    """shard_map does not see whether an operator writes its arguments."""
    mapped(lambda x: torch.ops.aten.add.Tensor(x, x), torch.ones(2))


@needs("torch._C:_FunctionBase._sequence_nr")
def a_captured_tensor() -> None:
    """shard_map cannot tell what was computed before its body from what was computed in it."""
    import pmod

    def f(x: Tensor) -> Tensor:
        outside = torch.ones(2, requires_grad=True) * 2
        return pmod.shard_map(lambda x: x * outside.sum(), in_specs=pmod.P("x"), out_specs=pmod.P("x"))(x)

    on_two(f, torch.ones(2))


@needs("torch:Tensor._typed_storage", harmless=True)
def a_storage_read() -> None:
    """Nothing: the name is one of those by which shard_map knows that memory is read."""
    mapped(lambda x: x + 1, torch.ones(2))


# --- process groups -----------------------------------------------------------------------------------------------


@needs("torch.distributed.distributed_c10d:_get_default_store",
       "torch.distributed.distributed_c10d:_new_process_group_helper",
       "torch.distributed.distributed_c10d:_world")  # fmt: skip
def a_group_of_some() -> None:
    """Only all ranks could make a group, and all at once."""
    with fake_ranks() as mesh:
        mesh.group("x")


@needs("torch.distributed.rendezvous:_torchelastic_use_agent_store")
def a_meeting() -> None:
    """A rank does not know whether torchrun's agent serves the store, or it must do so itself."""
    from datetime import timedelta

    import pmod
    from pmod._ranks.connect import _meet
    from tests.lib.started import free_ports

    _meet("127.0.0.1", free_ports(1)[0], pmod.Topology(rank=0, world_size=2), timedelta(seconds=60))


@needs("torch.distributed:ProcessGroup._allgather_base")
def gathered_by_nccl() -> None:
    """all_gather on NCCL cannot fill one tensor."""
    from pmod._wire.traffic import Metered

    Metered(Group(), 2, 0)._allgather_base(torch.ones(4), torch.ones(2))


@needs("torch.distributed:ProcessGroup._reduce_scatter_base")
def reduced_by_nccl() -> None:
    """psum_scatter on NCCL cannot read one tensor."""
    from pmod._wire.traffic import Metered

    Metered(Group(), 2, 0)._reduce_scatter_base(torch.ones(2), torch.ones(4))


@needs("torch.distributed:ProcessGroup._get_backend")
def sent_again() -> None:
    """A call that was made before does not find what sends for its group."""
    import pmod

    with fake_ranks() as mesh:
        for _ in range(3):
            pmod.psum(torch.ones(2), mesh["x"])


class Group:
    """In the place of a process group."""

    def _allgather_base(self, *args: Any) -> None:
        pass

    def _reduce_scatter_base(self, *args: Any) -> None:
        pass


# --- the compiler -------------------------------------------------------------------------------------------------


def compiled_with(backend: str, f: Callable[..., Any], *args: Any) -> Any:
    return torch.compile(f, fullgraph=True, backend=backend)(*args)


@needs("torch._library.simple_registry:singleton", "torch._library.effects:EffectType", compiled=True)
def a_compiled_collective() -> None:
    """A compiler may drop a call that other ranks wait for, or change the order of calls."""
    with fake_ranks() as mesh:
        import pmod

        compiled_with("eager", lambda x: pmod.psum(x, mesh["x"]), torch.ones(2))


@needs("torch._inductor.ir:FallbackKernel.create", "torch._inductor.ir:IRNode", "torch._inductor.ir:TensorBox.create",
       "torch._inductor.lowering:register_lowering", "torch._inductor.virtualized:V",
       "torch.utils._pytree:tree_map_only", compiled=True)  # fmt: skip
def inductors_order() -> None:
    """Inductor may change the order of calls."""
    with fake_ranks() as mesh:
        import pmod

        # of truth values, which torch's functional collectives do not carry
        compiled_with("inductor", lambda x: pmod.pick(x, mesh["x"]), torch.ones(2) > 0)


@needs("torch.ops:_c10d_functional", "torch.distributed._functional_collectives:wait_tensor",
       "torch.fx.experimental.proxy_tensor:make_fx", "torch._inductor.decomposition:select_decomp_table",
       compiled=True)  # fmt: skip
def written_by_inductor() -> None:
    """Compiled code cannot send by torch's functional collectives."""
    with fake_ranks() as mesh:
        import pmod

        compiled_with("inductor", lambda x: pmod.psum(x, mesh["x"]), torch.ones(2))


@needs("torch._C:_get_dispatch_mode", "torch._C:_TorchDispatchModeKey.FUNCTIONAL", compiled=True)
def moved_nowhere() -> None:
    """What moves nothing cannot be told from what a compiler traces."""
    with fake_ranks() as mesh:
        import pmod

        compiled_with("aot_eager", lambda x: pmod.pvary(x, mesh["x"]), torch.ones(2))


def compiled_mapped() -> None:
    """A compiled function around a shard_map in which a tensor is written by an assignment."""
    import pmod

    def body(x: Tensor) -> Tensor:
        y = x + 1
        y[0] = 0.0
        return y

    with fake_ranks() as mesh:
        f = pmod.shard_map(body, mesh=mesh["x"], in_specs=(pmod.P("x"),), out_specs=pmod.P("x"))
        compiled_with("eager", f, torch.ones(4))


@needs("torch._dynamo.symbolic_convert:InstructionTranslator.current_tx", compiled=True)
def writes_in_a_graph() -> None:
    """In compiled code shard_map does not see all that changes a tensor."""
    compiled_mapped()


@needs("torch._dynamo.variables.tensor:TensorVariable",
       "torch._dynamo.variables.torch_function:can_dispatch_torch_function", compiled=True, harmless=True)  # fmt: skip
def assignments_in_a_graph() -> None:
    """Nothing: what changes is found in the graph, and where shard_map cannot follow it, it says so."""
    import pmod

    with fake_ranks() as mesh:
        f = pmod.shard_map(lambda x: x + 1, mesh=mesh["x"], in_specs=(pmod.P("x"),), out_specs=pmod.P("x"))
        compiled_with("eager", f, torch.ones(4))


# --- the demo and the benchmark -----------------------------------------------------------------------------------


@needs("torch.testing._internal.distributed.fake_pg:FakeStore")
def the_benchmark() -> None:
    """The benchmark cannot measure the host without other ranks."""
    from pmod.bench import sections

    with sections.fake_ranks(2):
        pass


@needs("torch.distributed._functional_collectives:all_reduce",
       "torch.distributed._functional_collectives:all_gather_tensor_autograd",
       "torch.distributed._functional_collectives:reduce_scatter_tensor_autograd",
       "torch.distributed._functional_collectives:all_to_all_single_autograd")  # fmt: skip
def the_peers() -> None:
    """The benchmark cannot measure pmod beside torch's functional collectives."""
    with fake_ranks():
        from pmod.bench import peers

        for collective in peers.functional().values():
            collective(torch.ones(4, 4))


@needs("torch.serialization:_get_layout", "torch.distributed.checkpoint.metadata:_MEM_FORMAT_ENCODING",
       "torch.distributed.checkpoint.filesystem:_StorageInfo",
       "torch.distributed.checkpoint.filesystem:_StoragePrefix")  # fmt: skip
def a_checkpoint_opened() -> None:
    """The demo cannot open a checkpoint that holds nothing but tensors."""
    importlib.import_module("pmod.demo.stored")


@needs("torch.distributed.checkpoint._traverse:set_element")
def a_number_of_a_checkpoint() -> None:
    """The demo cannot put what is not a tensor in its place."""
    import io
    from types import SimpleNamespace as Names

    from pmod.demo.stored import _LoadPlanner

    planner: Any = object.__new__(_LoadPlanner)
    planner.mappings, planner.original_state_dict = {"epoch": ("epoch",)}, {}
    written = io.BytesIO()
    torch.save(3, written)
    written.seek(0)
    planner.load_bytes(Names(dest_index=Names(fqn="epoch")), written)
    assert planner.original_state_dict == {"epoch": 3}


# --- trying -------------------------------------------------------------------------------------------------------


def hide(name: str) -> None:
    """From what looks a name up, not from torch, which needs it itself."""
    found = pkgutil.resolve_name

    def resolve_name(asked: str) -> Any:
        if asked == name:
            raise AttributeError(f"{name} is hidden")
        return found(asked)

    pkgutil.resolve_name = resolve_name
    if name.startswith("torch.nn:Module."):
        init, missing = nn.Module.__init__, name.rpartition(".")[2]

        def without(self: nn.Module) -> None:
            init(self)
            del vars(self)[missing]

        nn.Module.__init__ = without  # while pmod is imported


def tried(name: str, hidden: bool) -> dict[str, str]:
    """Where the import and the use of a name ended, and what they raised."""
    init = nn.Module.__init__
    if hidden:
        hide(name)
    try:
        importlib.import_module("pmod")
    except BaseException:
        return {"ended": "import", "raised": traceback.format_exc()}
    nn.Module.__init__ = init
    try:
        USES[name]()
    except BaseException:
        return {"ended": "use", "raised": traceback.format_exc()}
    return {"ended": "use", "raised": ""}


def serve() -> None:
    for line in sys.stdin:
        name, hidden = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)  # what a use prints is no answer
            with os.fdopen(write, "w") as answer:
                answer.write(json.dumps(tried(name, hidden)))
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            print(answer.read(), flush=True)
        os.waitpid(child, 0)


if __name__ == "__main__":
    if "compiler" in sys.argv:
        importlib.import_module("torch._inductor.lowering")
    serve()
