"""`pmod.nn.tensor_parallel`: models with some layers cut give the values and gradients of one process."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import pmod
from pmod.nn import column
from tests.lib import spmd

Tensor = torch.Tensor
DOUBLE: dict[str, Any] = {"dtype": torch.float64}


class Attention(nn.Module):
    """Queries, keys and values in one layer, or in three with fewer heads of keys and values."""

    def __init__(self, width: int, heads: int, kv_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_kv_heads = heads, width // heads, kv_heads or heads
        self.hidden_size = width
        self.fused = kv_heads is None
        if self.fused:
            self.qkv = nn.Linear(width, 3 * width, **DOUBLE)
        else:
            self.q_proj = nn.Linear(width, width, **DOUBLE)
            self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False, **DOUBLE)
            self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, **DOUBLE)
        self.proj = nn.Linear(width, width, **DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(-3, 0).transpose(-2, -3)
        else:
            counts = self.num_heads, self.num_kv_heads, self.num_kv_heads
            layers = self.q_proj, self.k_proj, self.v_proj
            q, k, v = (f(x).unflatten(-1, (n, -1)).transpose(-2, -3) for f, n in zip(layers, counts, strict=True))
        k, v = (y.repeat_interleave(self.num_heads // self.num_kv_heads, -3) for y in (k, v))
        y = torch.softmax(q @ k.mT / self.head_dim**0.5, -1) @ v  # torch's own has no second derivative
        return self.proj(y.transpose(-2, -3).reshape(*x.shape[:-1], self.hidden_size))


class Transformer(nn.Module):
    """Numbers in, scores out; the embedding and the last layer are one parameter."""

    def __init__(self, kv_heads: int | None) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8, padding_idx=3, **DOUBLE)
        self.norm1, self.norm2 = nn.LayerNorm(8, **DOUBLE), nn.LayerNorm(8, **DOUBLE)
        self.attn = Attention(8, 4, kv_heads)
        self.fc1, self.fc2 = nn.Linear(8, 13, **DOUBLE), nn.Linear(13, 8, **DOUBLE)
        self.head = nn.Linear(8, 11, bias=False, **DOUBLE)
        self.head.weight = self.wte.weight

    def forward(self, numbers: Tensor) -> Tensor:
        x = self.wte(numbers)
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(torch.tanh(self.fc1(self.norm2(x))))
        return self.head(x)


class Convolutions(nn.Module):
    """A column layer of features alone, and one whose whole result comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(3, 8, 1, **DOUBLE), nn.Tanh(), nn.Conv2d(8, 4, 3, stride=2, padding=1, **DOUBLE)
        )
        self.last = nn.Conv2d(4, 5, 1, **DOUBLE)
        self.table = nn.Embedding(6, 4, **DOUBLE)

    def forward(self, numbers: Tensor) -> Tensor:
        x = torch.linspace(-1, 1, 3 * 24, **DOUBLE).reshape(3, 4, 6).sin() * numbers.sum()
        y = self.last(self.mlp(x))
        return y * self.table(numbers % 6).sum().sin()


def transformer() -> nn.Module:
    return Transformer(None)


def grouped_queries() -> nn.Module:
    return Transformer(2)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "fused": (transformer, {"*.qkv": column(groups=3), "*.proj": "row", "*.fc1": "column", "*.fc2": "row"}),
    "tied": (transformer, {"wte": "row", "head": column(gather=True), "fc1": "column", "fc2": "row"}),
    "widths": (transformer, {"*.qkv": column(groups=(8, 8, 8)), "*.proj": "row"}),
    "separate": (grouped_queries, {"attn.[qkv]_proj": "column", "attn.proj": "row"}),
    "convolutions": (Convolutions, {"mlp.0": "column", "mlp.2": "row", "last": column(groups=(4, 1), gather=True),
                                    "table": column(gather=True)}),
}  # fmt: skip
NUMBERS = torch.tensor([[1, 5, 3, 10], [0, 2, 3, 7]])


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


def penalty(model: nn.Module, cut: set[str]) -> tuple[Tensor, list[Tensor]]:
    """A loss, and the gradients of it with a part of its own gradient added: the second order too.

    cut: the parameters of which a rank has a part, whose squares would have to be summed over the ranks.
    """
    held = dict(model.named_parameters())
    y = model(NUMBERS)
    loss = (y.sin() * torch.arange(y.numel(), **DOUBLE).reshape(y.shape)).mean()
    first = torch.autograd.grad(loss, list(held.values()), create_graph=True)
    whole = [p.square().sum() for name, p in zip(held, first, strict=True) if name not in cut]
    return loss, list(torch.autograd.grad(loss + sum(whole), list(held.values())))


def check(name: str, whole: nn.Module) -> None:
    model = copy.deepcopy(whole)
    with torch.no_grad():
        for p in model.parameters():  # the first rank's values are everybody's
            p.mul_(1 + pmod.axis_index("model"))
    assert pmod.nn.tensor_parallel(model, MODELS[name][1], "model") is model
    expected = whole.state_dict()
    found = model.state_dict()
    assert list(found) == list(expected)
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
    cut = {key for key, p in model.named_parameters() if expected[key].shape != p.shape}
    assert bool(cut) == (pmod.axis_size("model") > 1)
    (loss, gradients), (right, rights) = penalty(model, cut), penalty(whole, cut)
    torch.testing.assert_close(loss, right, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.copy_(g)
    found = model.state_dict()
    for (key, _), g in zip(whole.named_parameters(), rights, strict=True):
        torch.testing.assert_close(found[key], g, rtol=1e-10, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")
    model.load_state_dict(expected)
    for again in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(again(NUMBERS), whole(NUMBERS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model(name: str, ranks: int) -> None:
    """Value, every gradient, the second order, and what is saved and loaded: those of one process."""
    if name == "separate" and ranks == 4:
        with pytest.raises(pmod.ShapeError, match=r"attn.num_kv_heads is 2, which does not divide by 4.\nA head stays"):
            pmod.simulate(check, name, made(name), model=4)
        return
    pmod.simulate(check, name, made(name), model=ranks)


def check_all() -> None:
    for name in MODELS:
        check(name, made(name))


def test_on_processes() -> None:
    spmd.launch(check_all, model=2)


def test_uneven_parts() -> None:
    """13 features of a perceptron over 3 ranks, and two axes as one."""
    def cut() -> list[Any]:
        mlp = nn.Sequential(nn.Linear(4, 13, **DOUBLE), nn.ReLU(), nn.Linear(13, 2, **DOUBLE))
        pmod.nn.tensor_parallel(mlp, {"0": "column", "2": "row"}, ("a", "b"))
        x = torch.ones(4, **DOUBLE)
        whole = nn.Sequential(nn.Linear(4, 13, **DOUBLE), nn.ReLU(), nn.Linear(13, 2, **DOUBLE))
        whole.load_state_dict(mlp.state_dict())
        torch.testing.assert_close(mlp(x), whole(x))
        return list(mlp[0].weight.shape)

    assert pmod.simulate(cut, a=3, b=1) == [[5, 4], [5, 4], [3, 4]]
    assert pmod.simulate(cut, a=2, b=2) == [[4, 4], [3, 4], [3, 4], [3, 4]]


def test_transforms() -> None:
    """torch.func's gradient, and a call without gradients."""
    def gradients() -> None:
        whole = made("fused")
        model = copy.deepcopy(whole)
        pmod.nn.tensor_parallel(model, MODELS["fused"][1], "model")
        held = dict(model.named_parameters())
        found = torch.func.grad(lambda p: functional_call(model, p, (NUMBERS,)).sin().sum())(held)
        whole(NUMBERS).sin().sum().backward()
        torch.testing.assert_close(found["norm1.weight"], whole.get_parameter("norm1.weight").grad)
        with torch.no_grad():
            torch.testing.assert_close(model(NUMBERS), whole(NUMBERS))

    # in processes: the ranks of a simulation would draw from one generator
    spmd.launch(gradients, model=2)


def compiled_on_rank() -> None:
    torch._dynamo.reset()
    whole = made("tied")
    model = copy.deepcopy(whole)
    pmod.nn.tensor_parallel(model, MODELS["tied"][1], "model")
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(NUMBERS)
    torch.testing.assert_close(y, whole(NUMBERS))
    y.sin().sum().backward()
    whole(NUMBERS).sin().sum().backward()
    torch.testing.assert_close(model.get_parameter("norm1.weight").grad, whole.get_parameter("norm1.weight").grad)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled() -> None:
    spmd.launch(compiled_on_rank, model=2)


@pytest.mark.parametrize("name", MODELS)
def test_under_debug(name: str) -> None:
    """What the layers hold is V, and what comes and goes is I: debug finds nothing amiss."""
    whole = made(name)

    def step() -> None:
        model = copy.deepcopy(whole)
        pmod.nn.tensor_parallel(model, MODELS[name][1], "model")
        with pmod.debug():
            model(NUMBERS).square().sum().backward()
            model.state_dict()

    pmod.simulate(step, model=2)


def test_autocast() -> None:
    """The bias of a row layer, added after the sum, takes the dtype of the product, as torch's own does."""
    def dtypes() -> Any:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        pmod.nn.tensor_parallel(model, {"0": "column", "1": "row"}, "model")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(torch.ones(2, 4)).dtype

    assert pmod.simulate(dtypes, model=2) == [torch.bfloat16] * 2


def encoder() -> None:
    torch.manual_seed(0)
    whole = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **DOUBLE), 2).eval()
    model = copy.deepcopy(whole)
    pmod.nn.tensor_parallel(model, {"*.linear1": "column", "*.linear2": "row"}, "model")
    x = torch.randn(2, 3, 8, **DOUBLE)
    # in inference torch's layer hands the weights themselves to a kernel
    with torch.inference_mode():
        torch.testing.assert_close(model(x), whole(x))


def test_torchs_encoder_in_inference() -> None:
    spmd.launch(encoder, model=2)


# --- what is refused ----------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A norm of each head, whose scale all heads share."""

    def __init__(self, *, gate: bool = False) -> None:
        super().__init__()
        self.head_dim = 2
        self.q_proj, self.norm, self.proj = nn.Linear(4, 4), nn.LayerNorm(2), nn.Linear(4, 4)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.q_proj(x).unflatten(-1, (-1, 2))).flatten(-2)
        if self.gate:
            y = y * pmod.psum(pmod.pvary(x.mean(-1, keepdim=True), "model"), "model")
        return self.proj(y)


def test_a_whole_parameter_among_cut_features() -> None:
    """Its gradient would be this rank's part: the first call says so, and share_parameters makes it right."""
    def gradients(share: bool, gate: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Normed(gate=gate)
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape).sin() + i)
        whole = copy.deepcopy(model)
        pmod.nn.tensor_parallel(model, {"q_proj": "column", "proj": "row"}, "model")
        if share:
            pmod.share_parameters(model.norm, "model")
        x = torch.linspace(0, 1, 12).reshape(3, 4).requires_grad_()
        with torch.no_grad():
            model(x)
        for of in (model, whole):
            of(x).square().sum().backward()
        return [model.norm.weight.grad, whole.norm.weight.grad]

    text = r"the parameter norm.weight of Normed is whole, and is used on this rank's features alone.\nIts gradient"
    with pytest.raises(pmod.MismatchError, match=text):
        pmod.simulate(gradients, False, False, model=2)
    for found, right in pmod.simulate(gradients, True, False, model=2):
        torch.testing.assert_close(found, right)
    with pytest.raises(pmod.MismatchError, match=r"the result of a collective, one value .I., meets this"):
        pmod.simulate(gradients, True, True, model=2)


def with_hook() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda *_: None)
    return model


def with_attributes(layer: nn.Module, name: str, **attributes: Any) -> nn.Module:
    model = nn.Sequential(nn.Module())
    setattr(model[0], name, layer)
    for key, value in attributes.items():
        setattr(model[0], key, value)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    return model


WRONG: dict[str, tuple[Callable[[], Any], Any, type[Exception], str]] = {
    "no module": (lambda: 3, {}, pmod.ArgumentError, "module is a int."),
    "no plan": (tied, ["0"], pmod.ArgumentError, "plan is ['0'].\nPass {pattern: "),
    "an unknown cut": (tied, {"0": "col"}, pmod.ArgumentError, "plan['0'] is 'col'.\nPass 'column', 'row' or "),
    "no such layer": (tied, {"*.fc1": "row"}, pmod.ArgumentError, "no layer has a name like '*.fc1'.\nThe names are "),
    "a container": (tied, {"*": "row"}, pmod.ArgumentError, "1.weight and 0.weight are one "),
    "named twice": (tied, {"0": "row", "[01]": "column"}, pmod.ArgumentError, "two patterns of the plan name 0 and"),
    "a norm": (lambda: nn.Sequential(nn.LayerNorm(4)), {"0": "row"}, pmod.ArgumentError, "0 is a LayerNorm.\nName"),
    "torch's attention": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), {"0": "row"}, pmod.ArgumentError,
        "0 is a MultiheadAttention.\nIt does not call its projections."),
    "its projection": (
        lambda: nn.Sequential(nn.MultiheadAttention(4, 2)), {"0.out_proj": "row"}, pmod.ArgumentError,
        "0.out_proj is a NonDynamicallyQuantizableLinear."),
    "groups of a convolution": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), {"0": "row"}, pmod.ArgumentError,
        "0 is a Conv1d with groups=2 and padding_mode='zeros'.\nLeave it whole"),
    "an embedding with a norm": (
        lambda: nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), {"0": "row"}, pmod.ArgumentError,
        "0 is a Embedding with max_norm, scale_grad_by_freq or sparse."),
    "too few rows": (
        lambda: nn.Sequential(nn.Embedding(1, 4)), {"0": "row"}, pmod.ShapeError,
        "of the 1 features or rows of 0 a rank would have none.\nLeave it whole."),
    "a hook": (with_hook, {"0": "column"}, pmod.ArgumentError, "0 has hooks, of share_parameters, "),
    "tied": (tied, {"1": "column"}, pmod.ArgumentError, "1.weight and 0.weight are one parameter, and are not "),
    "tied otherwise": (tied, {"0": "column", "1": "column"}, pmod.ArgumentError, "1.weight and 0.weight are one "),
    "groups": (
        lambda: nn.Sequential(nn.Linear(4, 8)), {"0": column(groups=3)}, pmod.ShapeError,
        "0 has 8 output features and groups is 3.\nPass groups that add up"),
    "heads": (
        lambda: with_attributes(nn.Linear(6, 18), "qkv", num_heads=3), {"0.qkv": column(groups=3)}, pmod.ShapeError,
        "0.num_heads is 3, which does not divide by 2.\nA head stays on one rank"),
    "heads by their length": (
        lambda: with_attributes(nn.Linear(6, 6), "q_proj", head_dim=2), {"0.q_proj": "column"}, pmod.ShapeError,
        "0.q_proj has 3 heads (head_dim is 2), which do not divide by 2.\nA head"),
    "fused": (
        lambda: with_attributes(nn.Linear(4, 12), "qkv", num_heads=2), {"0.qkv": "column"}, pmod.ArgumentError,
        "0.qkv makes 12 features of 4.\nIs it queries, keys and values in one? Pass "),
    "unknown heads": (
        lambda: with_attributes(nn.Linear(4, 12), "qkv", h=2), {"0.qkv": column(groups=3)}, pmod.ArgumentError,
        "nothing says how many heads 0.qkv has.\nPass column(heads=...)"),
    "heads of no such name": (
        lambda: with_attributes(nn.Linear(4, 12), "qkv", h=2.0), {"0.qkv": column(groups=3, heads="h")},
        pmod.ArgumentError, "heads is 'h', and 0 has no int of this name."),
    "an unknown layer beside heads": (
        lambda: with_attributes(nn.Linear(4, 4), "layer", num_heads=2), {"0.layer": "column"}, pmod.ArgumentError,
        "0.layer may make heads: 0 has num_heads.\nPass column(heads='num_heads'), or column(heads=False)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    """On every rank, before anything is sent or changed."""
    make, plan, error, text = WRONG[name]

    def cut() -> None:
        model = make()
        before = repr(model)
        with pytest.raises(error, match=re.escape(text)) as raised, pmod.trace() as sent:
            pmod.nn.tensor_parallel(model, plan, "model")
        assert str(raised.value).startswith("pmod.nn.tensor_parallel(axis='model') at (model=")
        assert repr(model) == before and not sent.events

    pmod.simulate(cut, model=2)


def test_attributes_of_this_rank() -> None:
    """The heads told, with the width of the layers beside them; a perceptron's module keeps its own."""
    def cut(layer: str, **how: Any) -> Any:
        model = with_attributes(nn.Linear(4, 4), layer, h=2, n_heads=2, dim=4, d_model=8)
        pmod.nn.tensor_parallel(model, {f"0.{layer}": column(**how)}, "model")
        return [getattr(model[0], name) for name in ("h", "n_heads", "dim", "d_model")]

    assert pmod.simulate(lambda: cut("to_q", heads="h"), model=2)[0] == [1, 1, 2, 8]
    assert pmod.simulate(lambda: cut("to_q"), model=2)[0] == [2, 1, 2, 8]
    assert pmod.simulate(lambda: cut("fc1"), model=2)[0] == [2, 2, 4, 8]
    assert pmod.simulate(lambda: cut("layer", heads=False), model=2)[0] == [2, 2, 4, 8]

    def twice() -> None:
        model = made("separate")
        pmod.nn.tensor_parallel(model, {"*.q_proj": "column"}, "model")
        pmod.nn.tensor_parallel(model, {"*.k_proj": "column"}, "model")

    with pytest.raises(pmod.ArgumentError, match=r"a part of attn is cut already.\nCut all layers of a module in one"):
        pmod.simulate(twice, model=2)


def test_wrong_columns() -> None:
    for groups in (0, (), (2, -1), "3", 1.5, True):
        with pytest.raises(pmod.ShapeError, match=re.escape(f"pmod.nn.column: groups is {groups!r}.\nPass an int")):
            column(groups)
    with pytest.raises(pmod.ArgumentError, match=r"pmod.nn.column: heads is 3.\nPass the name of an attribute, or Fal"):
        column(heads=3)
    with pytest.raises(pmod.ArgumentError, match=r"pmod.nn.column: gather is 1"):
        column(gather=1)


def test_wrong_inputs() -> None:
    def calls() -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Embedding(6, 2))
        pmod.nn.tensor_parallel(model, {"1": "row", "2": "row"}, "model")
        with pytest.raises(pmod.ShapeError, match=r"a row layer gets 4 features, and this rank holds 2 of 4"):
            model[1](torch.ones(4))
        for number in (-1, 6):
            with pytest.raises(IndexError):
                model[2](torch.tensor([0, number]))
        state = model.state_dict()
        with pytest.raises(RuntimeError, match=r"size mismatch for 1.weight: the state_dict has \(4, 2\), the whole"):
            model.load_state_dict({**state, "1.weight": torch.ones(4, 2)})
        with pytest.raises(RuntimeError, match=r"Missing key"):
            model.load_state_dict({key: value for key, value in state.items() if key != "1.weight"})
        whole = torch.arange(16.0).reshape(4, 4)
        model.load_state_dict({**state, "1.weight": whole}, assign=True)
        assert torch.equal(model[1].weight, whole.chunk(2, 1)[pmod.axis_index("model")])

    pmod.simulate(calls, model=2)


def test_what_is_sent() -> None:
    """A psum forward for a row layer, one backward for a column layer; nothing else in a step."""
    def step() -> list[Any]:
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
        pmod.nn.tensor_parallel(model, {"0": "column", "2": "row"}, "model")
        x = torch.ones(2, 4, requires_grad=True)
        with pmod.trace() as sent:
            model(x).sum().backward()
        return [(event.function, event.nbytes) for event in sent.events if event.nbytes]

    first = pmod.simulate(step, model=2)[0]
    assert first == [("tensor_parallel", 32), ("the backward of tensor_parallel", 32)]


# --- models of others ---------------------------------------------------------------------------------------------

GPT2 = {"*.c_attn": column(groups=3), "*.c_fc": "column", "*.c_proj": "row"}
PROJECTIONS = {"*.[qkv]_proj": "column", "*.o_proj": "row"}
OF_OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # the model, its configuration, the plan
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 24, "n_layer": 2, "n_head": 4}, GPT2),
    "gpt2 with its embedding": (
        "GPT2LMHeadModel", {"n_embd": 24, "n_layer": 2, "n_head": 4},
        {**GPT2, "*.wte": "row", "lm_head": column(gather=True)}),
    "llama": (
        "LlamaForCausalLM", {"num_key_value_heads": 2},
        {**PROJECTIONS, "*.gate_proj": "column", "*.up_proj": "column", "*.down_proj": "row"}),
    "neox": (
        "GPTNeoXForCausalLM", {},
        {"*.query_key_value": column(groups=1), "*.attention.dense": "row", "*.dense_h_to_4h": "column",
         "*.dense_4h_to_h": "row"}),
}  # fmt: skip
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}


def of_others(name: str) -> None:
    import transformers

    kind, options, plan = OF_OTHERS[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    usual = {"vocab_size": 37, "bos_token_id": 0, "eos_token_id": 0}
    if not kind.startswith("GPT2"):
        usual |= SMALL
    whole = model_class(model_class.config_class(**usual, **options)).double().eval()  # eval: without dropout
    numbers = torch.randint(37, (2, 9))
    model = pmod.nn.tensor_parallel(copy.deepcopy(whole), plan, "model")
    losses = [of(numbers, labels=numbers).loss for of in (model, whole)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    for loss in losses:
        loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    found = model.state_dict()
    for key, p in whole.named_parameters():
        torch.testing.assert_close(found[key], p.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OF_OTHERS)
def test_models_of_transformers(name: str) -> None:
    """In one line: the loss and every gradient are those of one process."""
    pytest.importorskip("transformers")
    spmd.launch(of_others, name, model=2)
