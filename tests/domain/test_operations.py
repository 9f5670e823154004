"""Every kind of operation on blocks: equal to the whole's to second order, or refused by name. None is silent."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pmod
from tests.lib import spmd
from tests.lib.fields import cuttings, held_to, on_all

Tensor = torch.Tensor
CUTTINGS = cuttings(8, 6)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def field() -> Tensor:
    return torch.randn(2, 4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def weight(*shape: int) -> Tensor:
    """A constant of the program, made by it."""
    return torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(shape)


def labels(t: Tensor) -> Tensor:
    """A class for each place of the field."""
    return torch.arange(t[:, 0].numel()).reshape(t[:, 0].shape) * 7 % 4


def windows(t: Tensor) -> Tensor:
    """As Swin: windows of 2 x 3, shifted, with attention in each."""
    t = t.roll((-1, -1), (2, 3))
    w = t.reshape(2, 4, 4, 2, 2, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 6, 4)
    w = (w @ w.mT).softmax(-1) @ w
    return w.reshape(2, 4, 2, 2, 3, 4).permute(0, 5, 1, 3, 2, 4).reshape(2, 4, 8, 6).roll((1, 1), (2, 3))


def write_into_zeros(t: Tensor) -> Tensor:
    o = torch.zeros(2, 4, 8, 6, dtype=t.dtype)
    o[:, :, :4, :3] = t[:, :, :4, :3] * 2
    o[:, :, 5:, 3:] = t[:, :, 5:, 3:]
    return o + t


def write_rows(t: Tensor) -> Tensor:
    o = t * 1
    o[:, :, 0] = 0
    o[:, :, :, -1] = 7.0
    o[:, :, 3] = t[:, :, 5]
    o[:, 1] = t[:, 2] * weight(8, 1)
    return o


def in_place(t: Tensor) -> Tensor:
    return (t * 1).add_(t).mul_(2).sub_(weight(6)).relu_()


def scaled(kind: Any, *args: Any, **kwargs: Any) -> Any:
    """A module in float64 whose parameters are not its first ones."""
    module = kind(*args, **kwargs).double()
    for i, p in enumerate(module.parameters()):
        nn.init.normal_(p, generator=torch.Generator().manual_seed(i))
    return module


MODULES = {
    "GroupNorm": scaled(nn.GroupNorm, 2, 4),
    "InstanceNorm2d": scaled(nn.InstanceNorm2d, 4, affine=True),
    "LayerNorm of channels, rows, columns": scaled(nn.LayerNorm, (4, 8, 6)),
    "LayerNorm of columns": scaled(nn.LayerNorm, 6),
    "RMSNorm": scaled(nn.RMSNorm, (4, 8, 6)),
    "BatchNorm2d": scaled(nn.BatchNorm2d, 4),
    "BatchNorm2d in eval": scaled(nn.BatchNorm2d, 4).eval(),
    "Conv2d": scaled(nn.Conv2d, 4, 4, 3, padding=1),
    "Conv2d of stride and dilation": scaled(nn.Conv2d, 4, 4, 3, 2, 2, 2),
    "Conv2d, even, same": scaled(nn.Conv2d, 4, 4, 2, padding="same"),
    "Conv2d in groups, without padding": scaled(nn.Conv2d, 4, 4, 3, groups=2, bias=False),
    "Conv2d, circular": scaled(nn.Conv2d, 4, 4, 3, padding=1, padding_mode="circular"),
    "Conv2d, reflect": scaled(nn.Conv2d, 4, 4, 3, padding=1, padding_mode="reflect"),
    "Conv2d, 1 x 1": scaled(nn.Conv2d, 4, 3, 1),
    "ConvTranspose2d": scaled(nn.ConvTranspose2d, 4, 4, 3, 2, 1, 1),
    "ConvTranspose2d with gaps": scaled(nn.ConvTranspose2d, 4, 4, 2, 3),
    "ConvTranspose2d, dilated": scaled(nn.ConvTranspose2d, 4, 4, 5, 2, 2, dilation=2),
    "MaxPool2d": nn.MaxPool2d(3, 1, 1),
    "MaxPool2d of stride and dilation": nn.MaxPool2d(3, 2, 1, 2),
    "MaxPool2d, ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "AvgPool2d": nn.AvgPool2d(3, 2, 1),
    "AvgPool2d without padding": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "LPPool2d": nn.LPPool2d(2, 2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((3, 5)),
    "AdaptiveAvgPool2d to one": nn.AdaptiveAvgPool2d(1),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d((4, None)),
    "Upsample, nearest": nn.Upsample(scale_factor=1.5),
    "Upsample, bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "Upsample, corners": nn.Upsample(size=(13, 7), mode="bilinear", align_corners=True),
    "Upsample, bicubic": nn.Upsample(scale_factor=2, mode="bicubic"),
    "UpsamplingNearest2d": nn.UpsamplingNearest2d(scale_factor=2),
    "ZeroPad2d": nn.ZeroPad2d(1),
    "ReflectionPad2d": nn.ReflectionPad2d(2),
    "ReplicationPad2d": nn.ReplicationPad2d((1, 2, 3, 0)),
    "CircularPad2d": nn.CircularPad2d(3),
    "ConstantPad2d": nn.ConstantPad2d((1, 2, 3, 4), 2.5),
    "PixelShuffle": nn.PixelShuffle(2),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "Softmax of rows": nn.Softmax(2),
    "Softmax2d": nn.Softmax2d(),
    "PReLU": scaled(nn.PReLU, 4),
    "Linear of columns": scaled(nn.Linear, 6, 5),
    "Linear of pixels": nn.Sequential(nn.Flatten(2), scaled(nn.Linear, 48, 5)),
    "MultiheadAttention": nn.Sequential(nn.Flatten(2), scaled(nn.Linear, 48, 8)),
}

EQUAL: dict[str, Callable[[Tensor], Tensor]] = {
    # element by element
    "add a row": lambda t: t + weight(6),
    "add a column": lambda t: t * weight(8, 1),
    "of two": lambda t: torch.maximum(t, -t) + torch.where(t > 0, t, t.mean()),
    "masked_fill": lambda t: t.masked_fill(t < 0, 0.0),
    "clamp": lambda t: t.clamp(-0.5, 0.5) * t.sigmoid(),
    "in place": in_place,
    "lerp, addcmul": lambda t: torch.lerp(t, t * t, 0.3) + torch.addcmul(t, t, weight(8, 6)),
    "to, type_as": lambda t: t.to(torch.float32).type_as(weight(1)).to(weight(3, 1)),
    # reductions
    "sum of all": lambda t: t * t.sum(),
    "mean of rows": lambda t: t - t.mean(2, keepdim=True),
    "mean without rows": lambda t: t.mean((0, 2)) * t[0, 1:2, :1].sum(2) + t.mean(3)[0].mT.sum(),
    "std": lambda t: t / t.std((2, 3), keepdim=True),
    "var of all": lambda t: t * t.var(),
    "var_mean": lambda t: torch.var_mean(t, 2, correction=0)[0] + t.mean(2),
    "max of all": lambda t: t / t.max(),
    "amax": lambda t: t - t.amax(2, keepdim=True),
    "amin": lambda t: t - t.amin((2, 3), keepdim=True),
    "min of ints": lambda t: (t * 10).round().long().amin(2).double(),
    "aminmax": lambda t: torch.aminmax(t)[0] * t,
    "argmax of channels": lambda t: t * t.argmax(1, keepdim=True),
    "max of channels": lambda t: t.max(1)[0] + t.max(1, keepdim=True).values[:, 0],
    "sort of rows": lambda t: t.sort(2)[0] + t.argsort(2, descending=True) + t.topk(2, 2)[0].sum(2, keepdim=True),
    "sort of channels": lambda t: t.sort(1)[0] + t.topk(2, 1)[0].sum(1, keepdim=True),
    "norm": lambda t: t / t.norm(dim=2, keepdim=True),
    "norms": lambda t: t * t.norm(1) + t.norm(math.inf, dim=3, keepdim=True) + torch.linalg.vector_norm(t, 3),
    "normalize": lambda t: F.normalize(t, dim=2),
    "prod": lambda t: t * (1 + t / 9).prod(2, keepdim=True),
    "any, all": lambda t: t * (t > 2).any() + t * (t > -9).all(2, keepdim=True),
    "logsumexp": lambda t: t.logsumexp(2) + t.logsumexp((2, 3), keepdim=True)[..., 0],
    "log_softmax": lambda t: t.log_softmax(3) + F.softmax(t, dim=2) + F.softmin(t, dim=2),
    "softmax of what is masked": lambda t: t.masked_fill(t < 0, -math.inf).softmax(2).nan_to_num(),
    "cumsum": lambda t: t.cumsum(2) + t.cumsum(1),
    "if": lambda t: t if t.mean() > 0 else -t,
    "item": lambda t: t * t.detach().sum().item() * float(t.detach().abs().max()),
    "equal": lambda t: t * torch.equal(t, t) + t * torch.allclose(t, t + 1),
    "contains": lambda t: t * (1 + (t[0, 0, 0, 0].detach() in t.detach())),
    "count_nonzero": lambda t: t * t.count_nonzero(),
    # shapes that the program asks for
    "shape // 2": lambda t: t[:, :, : t.shape[2] // 2] * t[:, :, t.shape[2] // 2 :],
    "numel": lambda t: t.sum() / t.numel() + t / t.nelement() + len(t[0, 0]) * t.size(-1) * t.size()[2],
    "arange": lambda t: t * torch.arange(t.shape[2], dtype=t.dtype)[:, None],
    "grid": lambda t: torch.cat([t, torch.linspace(0, 1, t.shape[2], dtype=t.dtype)[None, None, :, None].expand(
        t.shape[0], 1, -1, t.shape[3])], 1),
    "meshgrid": lambda t: t + sum(torch.meshgrid(torch.arange(t.size(-2)), torch.arange(t.size(-1)), indexing="ij")),
    "meshgrid of blocks": lambda t: sum(torch.meshgrid(t[0, 0, :, 0], t[0, 0, 0, :], indexing="ij")) * t,
    "ones of a shape": lambda t: t + torch.ones_like(t) + t.new_ones(t.shape) + torch.full(t.shape, 2.0),
    # views
    "reshape": lambda t: t.reshape(2, 4, -1, 2, 6).sum(3),
    "reshape of uneven rows": lambda t: t.reshape(2, 4, 2, 4, 6).transpose(1, 2).reshape(4, 4, 4, 6),
    "tokens": lambda t: t.flatten(2).softmax(-1),
    "tokens and back": lambda t: t.flatten(2).transpose(1, 2).reshape(2, 8, 6, 4).permute(0, 3, 1, 2) * t,
    "view": lambda t: t.contiguous().view(t.size(0), -1).sum(1),
    "unflatten": lambda t: t.unflatten(3, (2, 3)).sum(3)[..., None] + t.unflatten(2, (4, 2)).sum(3)[..., :1].sum(),
    "transpose": lambda t: t.mT @ t + t.transpose(2, 3) @ t + (t.permute(0, 1, 3, 2) @ t),
    "movedim": lambda t: t.movedim(2, 0).movedim((0, 1), (2, 0)).squeeze() * t.swapaxes(0, 0),
    "expand": lambda t: t[:, :1].expand(-1, 4, -1, -1) + t[:, :1].expand_as(t),
    "repeat of channels": lambda t: t.repeat(1, 2, 1, 1)[:, 2:6] * t,
    "repeat_interleave": lambda t: t.repeat_interleave(2, 2) + t.repeat_interleave(2, 1)[:, ::2].repeat_interleave(
        2, 2),
    "unbind": lambda t: torch.stack(t.unbind(1), -1).sum(-1) + torch.stack(list(t.transpose(0, 2)), 0).sum(0).sum(),
    "complex": lambda t: torch.view_as_real(torch.view_as_complex(
        torch.stack([t, t * t], -1)).conj().resolve_conj()).sum(-1),
    "real, imag": lambda t: torch.complex(t, 2 * t).imag * torch.complex(t, t).real.mT.mH,
    "pieces": lambda t: t.chunk(2, 2)[0] * t.split(4, 2)[1] + t.split([1, 3, 4], 2)[2],
    # rows
    "steps": lambda t: t[:, :, ::2] + t[:, :, 1::2],
    "inside": lambda t: t[..., 1:-1, 2:-2],
    "differences": lambda t: t[:, :, 1:] - t[:, :, :-1] + t.diff(dim=2) + t.narrow(2, 1, 7),
    "a row": lambda t: t - t[:, :, 3:4] + t[:, :, 3][:, :, None] - t.select(3, -2)[..., None],
    "new dims": lambda t: t[:, None, :, :, None].sum(1)[..., 0, :],
    "rows by numbers": lambda t: t[:, :, [0, 5, 0]] + t.index_select(2, torch.tensor([3, 7, -1 % 8])),
    "channels by numbers": lambda t: t[:, [0, 2]] + t[:, torch.tensor([1, 3])] + t[[0, 1], :2],
    "embedding": lambda t: weight(9, 3)[(t.abs() * 3).long().clamp(max=8)].sum(-1) * t,
    "F.embedding": lambda t: F.embedding((t.abs() * 3).long().clamp(max=8), weight(9, 3)).sum(-1) * t,
    "gather of channels": lambda t: t.gather(1, t.argmax(1, keepdim=True)) + t.take_along_dim(t.argsort(1), 1),
    "write rows": write_rows,
    "write into zeros": write_into_zeros,
    "write where": lambda t: _written_where(t),
    "roll": lambda t: t.roll((-3, 2), (2, 3)) + t.roll(9, 2),
    "flip": lambda t: t.flip(2) + t.flip(2, 3) * t,
    "cat of rows": lambda t: torch.cat([t, t.flip(2)[:, :, :3], weight(2, 4, 1, 6)], 2),
    "cat of channels": lambda t: torch.cat([t, t.flip(2), weight(2, 1, 8, 6)], 1),
    "stack": lambda t: torch.stack([t, t * 2, weight(2, 4, 8, 6)], 2).sum(2),
    "tril": lambda t: t.tril() + t.triu(1) * 2,
    "crop by pad": lambda t: F.pad(t, (-1, -2, -2, -1)),
    "pad of channels": lambda t: F.pad(t, (0, 0, 0, 0, 1, 2)),
    # products
    "t @ t.mT": lambda t: t @ t.mT,
    "a matrix over rows": lambda t: weight(5, 8) @ t,
    "matmul of a vector": lambda t: (t @ weight(6)) * (weight(8) @ t).sum() + t[0, 0] @ weight(6) + torch.mv(
        t[0, 0].mT.mT, weight(6)),
    "einsum": lambda t: torch.einsum("bchw,bdhw->bcd", t, t),
    "einsum of one": lambda t: torch.einsum("bchw->bhc", t) * torch.einsum("...w,w->...", t, weight(6)).sum(),
    "einsum of weights": lambda t: torch.einsum("bchw,cohw->bohw", t, weight(4, 3, 8, 6)),
    "bmm": lambda t: torch.bmm(t.flatten(0, 1), t.flatten(0, 1).mT) + torch.baddbmm(
        weight(8, 8, 8), t.flatten(0, 1), t.flatten(0, 1).mT),
    "tensordot": lambda t: torch.tensordot(t, weight(4, 8, 3), ([1, 2], [0, 1])),
    "linear attention": lambda t: (t.flatten(2).softmax(-1) @ t.flatten(2).mT) @ t.flatten(2),
    "attention over rows": lambda t: F.scaled_dot_product_attention(t, t, t),
    "attention over tokens": lambda t: F.scaled_dot_product_attention(*[t.flatten(2).mT * i for i in (1, 2, 3)]),
    "causal attention": lambda t: F.scaled_dot_product_attention(t, t, t, is_causal=True),
    "attention with a mask": lambda t: F.scaled_dot_product_attention(t, t, t, weight(8, 8)),
    "attention of whole queries": lambda t: F.scaled_dot_product_attention(t[:, :, :5].mean(0, keepdim=True).expand(
        2, -1, -1, -1) * 0 + weight(5, 6), t, t),
    "windows": windows,
    # spectra
    "rfft": lambda t: torch.fft.rfft(t, dim=2).abs() + torch.fft.rfft(t, dim=2).real,
    "fft and back": lambda t: torch.fft.irfft2(torch.fft.rfft2(t) * 2, s=t.shape[-2:]),
    "low modes": lambda t: torch.fft.irfft2(torch.fft.rfft2(t)[..., :3, :2], s=t.shape[-2:]),
    "fftshift": lambda t: torch.fft.fftshift(torch.fft.fft2(t), dim=(-2, -1)).real,
    "fft of all": lambda t: torch.fft.fftn(t, norm="ortho").imag,
    # resampling
    "down with antialias": lambda t: F.interpolate(t, size=(5, 4), mode="bilinear", antialias=True),
    "area": lambda t: F.interpolate(t, size=(3, 4), mode="area"),
    "to the size of another": lambda t: F.interpolate(F.max_pool2d(t, 2), size=t.shape[2:]) * t,
    "adaptive indices": lambda t: F.adaptive_max_pool2d(t, 3, return_indices=True)[1].double() * t.sum(),
    # losses
    "mse_loss": lambda t: F.mse_loss(t, t.flip(2).detach()) + F.l1_loss(t, weight(2, 4, 8, 6), reduction="sum"),
    "smooth_l1_loss": lambda t: F.smooth_l1_loss(t, weight(2, 4, 8, 6)) + F.huber_loss(
        t, weight(2, 4, 8, 6), delta=0.3),
    "bce": lambda t: F.binary_cross_entropy_with_logits(t, t.sigmoid().detach()) + F.binary_cross_entropy(
        t.sigmoid(), weight(2, 4, 8, 6).abs()),
    "cross_entropy": lambda t: F.cross_entropy(t, labels(t)) + F.cross_entropy(
        t, labels(t), ignore_index=2, reduction="none").square().sum(),
    "nll_loss": lambda t: F.nll_loss(t.log_softmax(1), labels(t), reduction="sum"),
    "cosine_similarity": lambda t: F.cosine_similarity(t, t + 1, dim=2),
}  # fmt: skip


def _written_where(t: Tensor) -> Tensor:
    o = t * 1
    o[t < 0] = 0.5
    return o * t


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t * t

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0] * ctx.saved_tensors[0]


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.ones_like(ctx.saved_tensors[0])


class Times(torch.autograd.Function):
    """It reads shapes, in backward too, and has a context of its own making."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(t, w, t * w)
        ctx.rows = t.shape[2]
        return t * w * t.shape[2] + t.mean()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        t, w, product = ctx.saved_tensors
        (g,) = gradients
        assert g.shape == t.shape == product.shape and t.shape[2] == ctx.rows
        return g * w * ctx.rows + g.sum() / g.numel(), None


class Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Any:
        ctx.save_for_backward(t)
        return t.sin(), t.mean(2, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (t,) = ctx.saved_tensors
        return gradients[0] * t.cos() + gradients[1].expand_as(t) / t.shape[2]


CONSTANT = torch.ones(6, dtype=torch.float64)


def shared_zeros(t: Tensor) -> Tensor:
    o = torch.zeros(2, 4, 8, 6, dtype=t.dtype)
    seen = o[:, :2]
    o += t
    return seen * 2


EQUAL |= {
    "a custom Function": Square.apply,
    "a custom sum": lambda t: Total.apply(t * 2) * t,
    "a custom product": lambda t: Times.apply(t.sin(), weight(8, 1)),
    "a custom function of two": lambda t: sum(Both.apply(t)) * t,
}

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "argmax of rows": (lambda t: t.argmax(2), "argmax: dim 2 is cut"),
    "median of rows": (lambda t: t.median(2)[0], "median: dim 2 is cut"),
    "a mask": (lambda t: t[t > 0], "__getitem__: how many rows a mask finds"),
    "nonzero": (lambda t: (t > 0).nonzero(), "nonzero: of a block it is a number of this rank's"),
    "where of one": (lambda t: torch.where(t > 0)[0], "where: how many it finds"),
    "item of a block": (lambda t: t[0, 0].tolist(), "tolist: of a block"),
    "bool of a block": (lambda t: -t if t[0, 0, :, 0] else t, "__bool__: of a block"),
    "numpy": (lambda t: torch.from_numpy(t.detach().numpy()), "numpy: of a block"),
    "unique": (lambda t: t.round().unique(), "unique"),
    "quantile": (lambda t: t.quantile(0.5), "quantile: it has no exact form where dims"),
    "repeat of rows": (lambda t: t.repeat(1, 1, 2, 1), "repeat: dim 2 is cut"),
    "reshape of prime factors": (lambda t: t.reshape(2, 4, 3, 16), "would be split unevenly"),
    "a constant of the function": (lambda t: t + CONSTANT, "no argument, parameter, buffer or function of torch gave"),
    "torch.ops": (lambda t: torch.ops.aten.cumsum(t, 2), "cumsum: it has no exact form where dims"),
    "out=": (lambda t: torch.add(t, 1, out=torch.empty(2, 4, 8, 6, dtype=t.dtype)), "add: it writes into out="),
    "zeros that a view shows": (shared_zeros, "has a derivative or views"),
    "stride": (lambda t: t * t.stride(0), "stride: of a block"),
    "data_ptr": (lambda t: t * t.data_ptr(), "data_ptr: of a block"),
    "as_strided": (lambda t: t.as_strided((2, 2), (1, 1)), "as_strided: it has no exact form"),
    "resize_": (lambda t: (t * 1).resize_(3), "resize_: it has no exact form"),
    "lengths that do not match": (lambda t: t + weight(3, 6), "lengths 3 and 8 of the whole do not match"),
    "psum": (lambda t: pmod.psum(t.sum(), "lat"), "psum: it goes along \\['lat'\\], over which domain_parallel cuts"),
    "axis_index": (lambda t: t * pmod.axis_index("lat"), "axis_index: it tells ranks apart"),
    "a norm of a matrix": (lambda t: torch.linalg.norm(t[0, 0], "nuc"), "linalg_norm"),
    "unknown attribute": (lambda t: t.__cuda_array_interface__, "__cuda_array_interface__"),
    "dropout in attention": (lambda t: F.scaled_dot_product_attention(t, t, t, dropout_p=0.5), "with dropout"),
}  # fmt: skip


def of(name: str) -> Any:
    return MODULES.get(name) or EQUAL[name]


def is_equal(name: str, cutting: Any) -> None:
    f = of(name)
    params = list(f.parameters()) if isinstance(f, nn.Module) else []
    # flash attention has no second derivative; nor has it in one process
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        held_to(f, field(), cutting, params)


@pytest.mark.parametrize("cutting", CUTTINGS)
@pytest.mark.parametrize("name", [*MODULES, *EQUAL])
def test_equal_to_the_whole(name: str, cutting: str) -> None:
    on_all(is_equal, CUTTINGS[cutting], name, CUTTINGS[cutting])


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    f, words = REFUSED[name]

    def refused() -> None:
        cutting = CUTTINGS["uneven"]
        net = pmod.domain_parallel(f, cutting.spec, sizes=cutting.sizes)
        with pytest.raises(pmod.PmodError, match=words) as raised:
            net(cutting.block(field().requires_grad_()))
        text = str(raised.value)
        assert text.startswith("pmod.domain_parallel: at ") and "test_operations.py:" in text.splitlines()[0]
        assert len(text.splitlines()) == 2, "what to do is on a line of its own"

    on_all(refused, CUTTINGS["uneven"])


def all_of_them(names: list[str], cutting: Any) -> None:
    warnings.simplefilter("ignore")
    for name in names:
        is_equal(name, cutting)


def test_equal_on_processes() -> None:
    cutting = CUTTINGS["uneven"]
    spmd.launch(all_of_them, [*MODULES, *EQUAL], cutting, **cutting.mesh)
