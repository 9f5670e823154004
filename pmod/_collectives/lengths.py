"""The length of the whole, which a user may give in place of the lengths of shards."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pmod._core.arguments import as_int, shares, wrong
from pmod._errors import ShapeError, quoted
from pmod._mesh.axis import Axis


def shares_of(length: object, function: str, axis: Axis) -> tuple[int, ...]:
    """Return the sizes of `split_sizes` for a whole length that a user gave."""
    whole = as_int(length)
    if whole is None or whole < 0:
        right = "Pass the whole length, 0 or more."
        raise wrong(ShapeError, function, axis, f"length is {quoted(length)}", right)
    return shares(whole, axis)


def shares_joined(
    length: object, beside: Mapping[str, object], tiled: bool, axis: Axis
) -> tuple[int, ...]:
    """Return the sizes along all_to_all's concat_dim.

    beside: the arguments that length stands for, which are not given then.
    """
    names = [name for name, sizes in beside.items() if sizes is not None]
    if not tiled:
        names.append("tiled=False")
    if names:
        given = f"length and {' and '.join(names)} are given"
        right = "Pass length alone, with tiled=True, or both lists of sizes."
        raise wrong(ShapeError, "all_to_all", axis, given, right)
    return shares_of(length, "all_to_all", axis)


def check_joined(
    x: Tensor, cut: int, joined: int, held: tuple[int, ...], axis: Axis
) -> None:
    """Check that x is a rank's shard along all_to_all's concat_dim, and no other dim."""
    whole = f"length is {sum(held)}"
    if cut == joined:
        given = f"{whole} and both dims are dim {cut} of x"
        right = "Pass two different dims, or the lengths sent and received as split_sizes and concat_sizes."
        raise wrong(ShapeError, "all_to_all", axis, given, right)
    own = held[axis.index]
    if x.shape[joined] != own:
        given = f"{whole}, so that this rank holds {own} along concat_dim, but x has {x.shape[joined]}"
        right = "Pass the whole length that shard cut, or the lengths that the ranks hold as concat_sizes."
        raise wrong(ShapeError, "all_to_all", axis, given, right)
