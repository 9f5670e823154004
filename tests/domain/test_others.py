"""Models that others wrote, unmodified: value and every gradient are those of one process.

Skipped where one is missing. They need nvidia-physicsnemo==2.2.2 neuraloperator==2.0.0 torch-harmonics==0.9.3
transformers timm, installed by `pip install --no-deps`, and what these import, but for torch.
"""

# pyright: standard, reportMissingImports=false

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.lib.fields import cuttings, held_to, on_all

Tensor = torch.Tensor
Made = tuple[Any, ...]
"""A model, its field, and its other arguments."""

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def complex_is_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of them make complex parameters as torch.cfloat."""
    monkeypatch.setattr(torch, "cfloat", torch.complex128)


@pytest.fixture(autouse=True, scope="module")
def torchvision_of_another_torch() -> Iterator[Any]:
    """torchvision is imported by some of them, of which they use no operator."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield library


def double(model: nn.Module) -> nn.Module:
    model = model.double()
    for p in model.parameters():
        if p.dtype == torch.complex64:
            p.data = p.data.to(torch.complex128)
    return model


def take(module: str, name: str) -> Any:
    pytest.importorskip(module.split(".")[0])
    return getattr(importlib.import_module(module), name)


def field(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def physicsnemo_unet() -> Made:
    return take("physicsnemo.models.unet", "UNet")(
        in_channels=1, out_channels=1, model_depth=2, feature_map_channels=[4, 4, 8, 8], num_conv_blocks=2,
        normalization="groupnorm", normalization_args={"num_groups": 2}), field(2, 1, 12, 8, 8)  # fmt: skip


def physicsnemo_fno() -> Made:
    return take("physicsnemo.models.fno", "FNO")(
        in_channels=1, out_channels=1, latent_channels=8, num_fno_layers=2, num_fno_modes=4, padding=2,
    ), field(2, 1, 16, 12)  # fmt: skip


def physicsnemo_afno() -> Made:
    return take("physicsnemo.models.afno", "AFNO")(
        inp_shape=[16, 12], in_channels=2, out_channels=2, patch_size=[2, 2], embed_dim=8, depth=2, num_blocks=2,
    ), field(2, 2, 16, 12)  # fmt: skip


def physicsnemo_pix2pix() -> Made:
    return take("physicsnemo.models.pix2pix", "Pix2Pix")(
        in_channels=2, out_channels=2, dimension=2, conv_layer_size=4, n_downsampling=2, n_upsampling=2, n_blocks=2,
    ), field(2, 2, 16, 12)  # fmt: skip


def physicsnemo_srresnet() -> Made:
    return take("physicsnemo.models.srrn", "SRResNet")(
        in_channels=1, out_channels=1, n_resid_blocks=2, scaling_factor=2, conv_layer_size=4), field(1, 1, 8, 8, 8)


def physicsnemo_dit() -> Made:
    return take("physicsnemo.models.dit", "DiT")(
        input_size=(16, 12), patch_size=2, in_channels=2, out_channels=2, hidden_size=16, depth=2, num_heads=2,
        attention_backend="timm", layernorm_backend="torch", condition_dim=3,
    ), field(2, 2, 16, 12), field(2).abs(), field(2, 3)  # fmt: skip


def physicsnemo_song() -> Made:
    return take("physicsnemo.models.diffusion_unets", "SongUNet")(
        img_resolution=[16, 16], in_channels=2, out_channels=2, model_channels=8, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=[8],
    ).eval(), field(2, 2, 16, 16), field(2).abs(), None  # fmt: skip


def neuralop_fno(norm: str | None) -> Made:
    return take("neuralop.models", "FNO")(
        n_modes=(6, 6), in_channels=2, out_channels=2, hidden_channels=8, n_layers=2, norm=norm), field(2, 2, 16, 12)


def neuralop_uno() -> Made:
    return take("neuralop.models", "UNO")(
        in_channels=2, out_channels=2, hidden_channels=8, uno_out_channels=[8, 8, 8], uno_n_modes=[[4, 4]] * 3,
        uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2, 2]], channel_mlp_skip="linear", n_layers=3,
    ), field(2, 2, 16, 12)  # fmt: skip


def harmonics_sfno() -> Made:
    return take("torch_harmonics.examples.models", "SphericalFourierNeuralOperator")(
        img_size=(16, 24), in_chans=2, out_chans=2, embed_dim=8, num_layers=2, scale_factor=1), field(2, 2, 16, 24)


def transformers_vit() -> Made:
    config = take("transformers", "ViTConfig")(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_channels=2)  # fmt: skip
    return take("transformers", "ViTModel")(config).eval(), field(2, 2, 16, 16)


def transformers_swin() -> Made:
    config = take("transformers", "SwinConfig")(
        image_size=16, patch_size=2, num_channels=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    return take("transformers", "SwinModel")(config).eval(), field(2, 2, 16, 16)


def timm_resnet() -> Made:
    return take("timm", "create_model")("resnet18", in_chans=2, num_classes=5).eval(), field(1, 2, 64, 32)


def timm_convnext() -> Made:
    return take("timm", "create_model")("convnext_atto", in_chans=2, num_classes=5).eval(), field(1, 2, 64, 32)


MODELS: dict[str, Callable[[], Made]] = {
    "PhysicsNeMo UNet, checkpointed": physicsnemo_unet,
    "PhysicsNeMo FNO": physicsnemo_fno,
    "PhysicsNeMo AFNO": physicsnemo_afno,
    "PhysicsNeMo Pix2Pix": physicsnemo_pix2pix,
    "PhysicsNeMo SRResNet": physicsnemo_srresnet,
    "PhysicsNeMo DiT": physicsnemo_dit,
    "PhysicsNeMo SongUNet": physicsnemo_song,
    "neuraloperator FNO": lambda: neuralop_fno(None),
    "neuraloperator FNO, group norm": lambda: neuralop_fno("group_norm"),
    "neuraloperator FNO, instance norm": lambda: neuralop_fno("instance_norm"),
    "neuraloperator UNO": neuralop_uno,
    "torch-harmonics SFNO": harmonics_sfno,
    "transformers ViT": transformers_vit,
    "transformers Swin": transformers_swin,
    "timm ResNet-18": timm_resnet,
    "timm ConvNeXt": timm_convnext,
}
# they compute in float32 whatever they are given
SINGLE = ("PhysicsNeMo AFNO", "torch-harmonics SFNO")
SECOND = ("PhysicsNeMo UNet, checkpointed", "neuraloperator FNO")


def made(name: str) -> Made:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        if name in SINGLE:
            patch.setattr(torch, "cfloat", torch.complex64)
            model, x, *rest = MODELS[name]()
            return model.float(), x.float(), rest
        model, x, *rest = MODELS[name]()
        return double(model), x, rest


class OfField(nn.Module):
    """A model as a function of its field, the other arguments being buffers."""

    def __init__(self, model: Any, rest: list[Any]) -> None:
        super().__init__()
        self.model = model
        for i, x in enumerate(rest):
            self.register_buffer(f"argument{i}", x)
        self.count = len(rest)

    def forward(self, x: Tensor) -> Tensor:
        rest = [getattr(self, f"argument{i}") for i in range(self.count)]
        y = self.model(x, *rest)
        if isinstance(y, Tensor):
            return y
        return y.last_hidden_state if hasattr(y, "last_hidden_state") else y[0]


def agrees(name: str, kind: str) -> None:
    model, x, rest = made(name)
    options: dict[str, Any] = {"order": 2 if name in SECOND else 1}
    if name in SINGLE:
        options["rtol"] = 1e-5
    cutting = cuttings(*x.shape[2:4])[kind]
    params = [p for p in model.parameters() if p.requires_grad]
    held_to(OfField(model, rest), x, cutting, params, **options)


@pytest.mark.parametrize("kind", ["uneven", "both"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_others_is_that_of_one_process(name: str, kind: str) -> None:
    *_, x, _ = made(name)
    on_all(agrees, cuttings(*x.shape[2:4])[kind], name, kind)
