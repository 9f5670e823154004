"""Losses of classes: each place of a field has its own, or all have one."""

from __future__ import annotations

import torch
from torch import Tensor

from pmod._domain.blocks import Blocks
from pmod._domain.refusals import along_cut, no_exact_form
from pmod._domain.rules.joins import REDUCTIONS
from pmod._domain.rules.table import Function, rule


@rule("cross_entropy_loss", "nll_loss_nd", "nll_loss", "nll_loss2d")
def cross_entropy(
    b: Blocks,
    func: Function,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    name = func.__name__
    d = 0 if x.dim() == 1 else 1
    if b.layout(x)[d] is not None:
        right = (
            "Cut other dims; pmod.nn.functional.cross_entropy takes a cut vocabulary."
        )
        raise along_cut(name, d, right)
    if weight is not None or label_smoothing or target.is_floating_point():
        right = "Write it with log_softmax."
        raise no_exact_form(name, "with weights, smoothing or soft targets", right)

    def spelled_out() -> Tensor:
        logs = x.log_softmax(d) if name == "cross_entropy_loss" else x
        counts = target != ignore_index
        places = torch.where(counts, target, 0).unsqueeze(d)
        losses = torch.where(counts, -logs.gather(d, places).squeeze(d), 0)
        if REDUCTIONS[reduction] == "none":
            return losses
        whole = losses.sum()
        return whole / counts.sum() if REDUCTIONS[reduction] == "mean" else whole

    return b.follow(spelled_out)
