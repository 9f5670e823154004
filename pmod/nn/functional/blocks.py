"""Windows laid out as columns, and channels as pixels: unfold, fold, pixel shuffles."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pmod._collectives.cuts import Cut
from pmod._core.arguments import check_tensor, wrong
from pmod._errors import ShapeError, quoted
from pmod._mesh.axis import Axis
from pmod.nn.functional.conv import check_length, sprayed
from pmod.nn.functional.given import (
    Axes,
    Held,
    Ints,
    Sizes,
    Spread,
    Wrong,
    bound,
    check_kind,
    cuts_told,
    held_of,
    ints,
    shape_error,
    spatial,
)
from pmod.nn.functional.windows import (
    Slide,
    Spray,
    not_empty,
    rows_of,
    without,
)


def _slides(
    kernel_size: object,
    dilation: object,
    padding: object,
    stride: object,
    error: Wrong,
) -> dict[int, Slide]:
    kernel = ints(kernel_size, "kernel_size", 2, 1, error)
    dilations = ints(dilation, "dilation", 2, 1, error)
    pads = [(p, p) for p in ints(padding, "padding", 2, 0, error)]
    strides = ints(stride, "stride", 2, 1, error)
    of = map(Slide, kernel, strides, pads, dilations)
    return dict(zip((-2, -1), of, strict=True))


def unfold(
    input: Tensor,
    kernel_size: Ints,
    dilation: Ints = 1,
    padding: Ints = 0,
    stride: Ints = 1,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return the windows of this rank's rows, as torch.nn.functional.unfold has them.

    They are the columns of the whole's result whose windows begin in this rank's block:
    h' x w' of them, row by row. Where rows alone are cut, these are one run of the
    whole's columns.

    V -> V. Shapes: input (..., channels, h/ranks, w) -> (..., channels * kernel *
    kernel, h'/ranks * w'), h' being as long as `out_sizes` says.
    Cost: as `conv2d`. Raises: ShapeError for shapes, numbers or sizes that do not fit.

    >>> def columns():
    ...     return pmod.nn.functional.unfold(torch.ones(1, 2, 4), 2, axis="y").shape
    >>> pmod.simulate(columns, y=2)
    [torch.Size([4, 6]), torch.Size([4, 3])]
    """
    function = "nn.functional.unfold"
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, -2)
    first = bounds[0][1]
    check_tensor(input, function, first, name="input")
    check_kind(input, "floating or complex", function, first)
    error = shape_error(function, first)
    if input.dim() not in (3, 4):
        raise error(f"input is {tuple(input.shape)}", "Pass an input of 3 or 4 dims.")
    dims = _slides(kernel_size, dilation, padding, stride, error)

    def check(at: int, rows: int, of: Axis) -> None:
        check_length(dims[at], rows, f" along dim {at}", shape_error(function, of))

    cuts = cuts_told(function, spread, bounds)
    held = held_of(function, cuts, input, spatial(2, "unfolded"), check)
    x = input
    left: list[int] = []
    for at, of in dims.items():
        if at in held:
            x = rows_of(x, at, held[at], of)
        left.append(0 if at in held else of.padding[0])
    x, empty = not_empty(x, {at: dims[at].extent for at in held})
    # by the place of each dim: torch's stubs take tuples alone
    rows, columns = dims.values()
    y = F.unfold(
        x,
        (rows.kernel, columns.kernel),
        (rows.dilation, columns.dilation),
        tuple(left),
        (rows.stride, columns.stride),
    )
    return without(y, [-1] * bool(empty))


def fold(
    input: Tensor,
    output_size: Ints,
    kernel_size: Ints,
    dilation: Ints = 1,
    padding: Ints = 0,
    stride: Ints = 1,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.fold of all ranks' windows.

    It is the transpose of `unfold`: the input is laid out as that gives it, the windows
    of h' rows and w' columns. output_size: that of the whole. dim: -2 for rows of
    windows, which is the default, or -1 for columns; sizes: how many of them each rank
    has, to be told where both are cut.

    V -> V. Shapes: input (..., channels * kernel * kernel, h'/ranks * w') -> (...,
    channels, h/ranks, w), h being as long as `out_sizes` says.
    Cost: each row of windows that reaches rows of another rank, once to it.
    Raises: ShapeError for shapes, numbers or sizes that do not fit.

    >>> def there_and_back():
    ...     columns = pmod.nn.functional.unfold(torch.ones(1, 2, 4), 2, axis="y")
    ...     return pmod.nn.functional.fold(columns, 4, 2, axis="y")[0, :, 1]
    >>> pmod.simulate(there_and_back, y=2)
    [tensor([2., 4.]), tensor([4., 2.])]
    """
    function = "nn.functional.fold"
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, -2)
    first = bounds[0][1]
    check_tensor(input, function, first, name="input")
    check_kind(input, "floating or complex", function, first)
    error = shape_error(function, first)
    wanted = ints(output_size, "output_size", 2, 1, error)
    slides = _slides(kernel_size, dilation, padding, stride, error)
    counts = [of.length(n) for of, n in zip(slides.values(), wanted, strict=True)]
    if min(counts) < 1:
        said = f"output_size is {quoted(output_size)}, which no window fits into"
        raise error(said, "Pass a larger one, or more padding.")
    dims: dict[int, Spray] = {}
    for at, n, count in zip((-2, -1), wanted, counts, strict=True):
        dims[at] = fold_spray(slides[at], n, count)
    cuts = cuts_told(function, spread, bounds)
    counted: dict[int, int] = dict(zip((-2, -1), counts, strict=True))
    told = _own_counts(input, cuts, counted, error)

    def check(at: int, rows: int, of: Axis) -> None:
        if rows != counts[at]:
            said = f"the whole has {rows} windows along dim {at}, and output_size is {quoted(output_size)}"
            raise wrong(ShapeError, function, of, said, f"Pass {counts[at]} of them.")

    x = input.unflatten(-1, (told[-2], told[-1]))
    return _folded(x, dims, held_of(function, cuts, x, spatial(2, "folded"), check))


def _own_counts(
    x: Tensor, cuts: list[Cut], counts: dict[int, int], error: Wrong
) -> dict[int, int]:
    """Return how many rows and columns of windows this rank has."""
    told = dict(counts)
    for cut in cuts:
        at = cut.dim if isinstance(cut.dim, int) else 0
        if at not in told:
            right = "Pass -2 where rows of windows are cut, -1 where columns are."
            raise error(f"dim is {quoted(cut.dim)}", right)
        if cut.sizes is not None:
            told[at] = cut.sizes[cut.axis.index]
        elif len(cuts) == 1:
            # the other dim is whole
            told[at] = int(x.shape[-1]) // counts[-3 - at]
        else:
            raise error("sizes are left out and two dims are cut", "Pass sizes.")
    if x.dim() not in (2, 3) or x.shape[-1] != told[-2] * told[-1]:
        said = f"input is {tuple(x.shape)}, and this rank has {told[-2]} x {told[-1]} windows"
        raise error(said, "Pass (..., channels * kernel * kernel, windows).")
    return told


def fold_spray(of: Slide, length: int, count: int) -> Spray:
    """Return what fold does along a dim: the transpose of what unfold does."""
    spray = Spray(of.kernel, of.stride, of.padding[0], of.dilation)
    return spray._replace(output_padding=length - spray.length(count))


def _folded(x: Tensor, dims: dict[int, Spray], held: dict[int, Held]) -> Tensor:
    """Add up the windows of this rank's rows."""
    x, kept = sprayed(x, dims, held)
    x, _ = not_empty(x, dict.fromkeys(held, 1))
    made: list[int] = []
    padding: list[int] = []
    for at, of in dims.items():
        length = (x.shape[at] - 1) * of.stride + of.extent
        if at in kept:
            padding.append(0)
            made.append(max(length, sum(kept[at])))
        else:
            padding.append(of.padding)
            made.append(of.length(x.shape[at]))
    rows, columns = dims.values()
    y = F.fold(
        x.flatten(-2),
        tuple(made),
        (rows.kernel, columns.kernel),
        (rows.dilation, columns.dilation),
        tuple(padding),
        (rows.stride, columns.stride),
    )
    for at, (first, rows) in kept.items():
        y = y.narrow(at, first, rows)
    return y


# --- channels and pixels --------------------------------------------------------------


def pixel_shuffle(
    input: Tensor,
    upscale_factor: int,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.pixel_shuffle of the whole.

    V -> V. Shapes: input (..., channels * r * r, h/ranks, w) -> (..., channels,
    h/ranks * r, w * r).
    Cost: nothing is sent.
    Raises: ShapeError for shapes, numbers or sizes that do not fit.

    >>> def larger():
    ...     return pmod.nn.functional.pixel_shuffle(torch.ones(4, 2, 3), 2, axis="y").shape
    >>> pmod.simulate(larger, y=2)[0]
    torch.Size([1, 4, 6])
    """
    function = "nn.functional.pixel_shuffle"
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, -2)
    check_tensor(input, function, bounds[0][1], name="input")
    error = shape_error(function, bounds[0][1])
    (factor,) = ints(upscale_factor, "upscale_factor", 1, 1, error)
    if input.dim() < 3 or input.shape[-3] % factor**2:
        said = f"input is {tuple(input.shape)} and upscale_factor {factor}"
        raise error(said, "Pass channels that the square of the factor divides.")
    # torch's own does nothing to an empty shard
    x = input.unflatten(-3, (input.shape[-3] // factor**2, factor, factor))
    return x.movedim((-4, -3), (-3, -1)).flatten(-2).flatten(-3, -2)


def pixel_unshuffle(
    input: Tensor,
    downscale_factor: int,
    *,
    axis: Axes,
    dim: int | None = None,
    sizes: Sizes | None = None,
) -> Tensor:
    """Return this rank's shard of torch.nn.functional.pixel_unshuffle of the whole.

    V -> V. Shapes: input (..., channels, h/ranks, w) -> (..., channels * r * r,
    h'/ranks, w / r), h' being as long as `out_sizes` says.
    Cost: the rows of blocks that a border cuts, once; nothing where r divides the
    shards.
    Raises: ShapeError for shapes, numbers or sizes that do not fit.

    >>> def smaller():
    ...     x = torch.ones(1, (3, 1)[pmod.axis_index("y")], 4)
    ...     return pmod.nn.functional.pixel_unshuffle(x, 2, axis="y").shape
    >>> pmod.simulate(smaller, y=2)
    [torch.Size([4, 2, 2]), torch.Size([4, 0, 2])]
    """
    function = "nn.functional.pixel_unshuffle"
    spread = Spread(axis, dim, sizes)
    bounds = bound(function, spread, -2)
    check_tensor(input, function, bounds[0][1], name="input")
    error = shape_error(function, bounds[0][1])
    (factor,) = ints(downscale_factor, "downscale_factor", 1, 1, error)
    if input.dim() < 3:
        raise error(
            f"input is {tuple(input.shape)}", "Pass an input of 3 dims or more."
        )

    def check(at: int, rows: int, of: Axis) -> None:
        if rows % factor:
            said = f"the whole has {rows} rows along dim {at}"
            raise wrong(ShapeError, function, of, said, f"Pass a multiple of {factor}.")

    cuts = cuts_told(function, spread, bounds)
    held = held_of(function, cuts, input, spatial(2, "unshuffled"), check)
    # torch's own does nothing to an empty shard
    x = input
    for at, cut in held.items():
        x = rows_of(x, at, cut, Slide(factor, factor, (0, 0), 1))
    x = x.unflatten(-1, (x.shape[-1] // factor, factor))
    x = x.unflatten(-3, (x.shape[-3] // factor, factor))
    return x.movedim((-3, -1), (-4, -3)).flatten(-5, -3)
