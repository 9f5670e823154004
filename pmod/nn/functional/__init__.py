"""torch.nn.functional of a tensor that is cut over ranks.

    y = pmod.nn.functional.conv2d(x, weight, bias, padding="same", axis="space")  # rows cut over "space"
    y = pmod.nn.functional.conv2d(x, weight, bias, padding=1, axis={-2: "y", -1: "x"})  # rows and columns

x is this rank's shard of a whole tensor, in the order of the ranks, each as long as it
likes, empty ones included. The result is this rank's shard of what torch.nn.functional
gives on the whole. A rank fetches the rows around its own that its windows reach into,
as `halo_exchange` does, and runs torch's function on them: values, gradients and higher
derivatives are torch's. So is the memory format: of a channels_last x, and of a slice
of one, the result of a convolution is channels_last.

Names, arguments and defaults are torch's. These follow, by keyword:

- axis: the mesh axis; or, for several dims, {dim: axis}.
- dim: the dim of x that is cut where axis is one axis, by default the first spatial
  one.
- sizes: the length of each rank's shard along dim; {dim: sizes} where axis is a
  mapping. Without them the ranks exchange them: one small message more per dim, and on
  cuda a wait for it; under torch.compile they must be given.

Which rank has which row of the result: row j is where row j * stride of x is (of an
upsampled one, where row floor(j * length / new length) is); rows past the end of x are
on the last rank. With stride 1, shards keep their lengths; only the last ones shrink or
grow when the result is shorter or longer than x. With a larger stride, each shard
starts at ceil(start / stride). Neighbours alone talk where shards are as long as a
window with its padding, and patches (a stride as long as the window, that divides the
shards) need no message. `out_sizes` says what the lengths are, for the next layer's
`sizes`: nothing is sent for that.

`pmod.start(conv2d, ...)` sends the rows of the first dim that is cut and returns;
`wait` computes.

Tensors and parameters are V. A weight that every rank holds (I) goes through `pvary`
once, as everywhere: then its gradient arrives already summed, and without it each rank
has the part of its own rows.
"""

from pmod.nn.functional.along import cumsum as cumsum
from pmod.nn.functional.along import index_select as index_select
from pmod.nn.functional.along import log_softmax as log_softmax
from pmod.nn.functional.along import softmax as softmax
from pmod.nn.functional.along import sort as sort
from pmod.nn.functional.along import take_along_dim as take_along_dim
from pmod.nn.functional.along import topk as topk
from pmod.nn.functional.attention import (
    scaled_dot_product_attention as scaled_dot_product_attention,
)
from pmod.nn.functional.attention import zigzag as zigzag
from pmod.nn.functional.blocks import fold as fold
from pmod.nn.functional.blocks import pixel_shuffle as pixel_shuffle
from pmod.nn.functional.blocks import pixel_unshuffle as pixel_unshuffle
from pmod.nn.functional.blocks import unfold as unfold
from pmod.nn.functional.conv import conv1d as conv1d
from pmod.nn.functional.conv import conv2d as conv2d
from pmod.nn.functional.conv import conv3d as conv3d
from pmod.nn.functional.conv import conv_transpose1d as conv_transpose1d
from pmod.nn.functional.conv import conv_transpose2d as conv_transpose2d
from pmod.nn.functional.conv import conv_transpose3d as conv_transpose3d
from pmod.nn.functional.losses import l1_loss as l1_loss
from pmod.nn.functional.losses import mse_loss as mse_loss
from pmod.nn.functional.losses import relative_l2_loss as relative_l2_loss
from pmod.nn.functional.moves import cat as cat
from pmod.nn.functional.moves import diff as diff
from pmod.nn.functional.moves import flip as flip
from pmod.nn.functional.moves import pad as pad
from pmod.nn.functional.moves import recut as recut
from pmod.nn.functional.moves import roll as roll
from pmod.nn.functional.neighborhood import (
    neighborhood_attention1d as neighborhood_attention1d,
)
from pmod.nn.functional.neighborhood import (
    neighborhood_attention2d as neighborhood_attention2d,
)
from pmod.nn.functional.neighborhood import (
    neighborhood_attention3d as neighborhood_attention3d,
)
from pmod.nn.functional.norms import batch_norm as batch_norm
from pmod.nn.functional.norms import group_norm as group_norm
from pmod.nn.functional.norms import instance_norm as instance_norm
from pmod.nn.functional.norms import layer_norm as layer_norm
from pmod.nn.functional.norms import rms_norm as rms_norm
from pmod.nn.functional.pools import avg_pool1d as avg_pool1d
from pmod.nn.functional.pools import avg_pool2d as avg_pool2d
from pmod.nn.functional.pools import avg_pool3d as avg_pool3d
from pmod.nn.functional.pools import lp_pool1d as lp_pool1d
from pmod.nn.functional.pools import lp_pool2d as lp_pool2d
from pmod.nn.functional.pools import lp_pool3d as lp_pool3d
from pmod.nn.functional.pools import max_pool1d as max_pool1d
from pmod.nn.functional.pools import max_pool2d as max_pool2d
from pmod.nn.functional.pools import max_pool3d as max_pool3d
from pmod.nn.functional.resample import adaptive_avg_pool1d as adaptive_avg_pool1d
from pmod.nn.functional.resample import adaptive_avg_pool2d as adaptive_avg_pool2d
from pmod.nn.functional.resample import adaptive_avg_pool3d as adaptive_avg_pool3d
from pmod.nn.functional.resample import adaptive_max_pool1d as adaptive_max_pool1d
from pmod.nn.functional.resample import adaptive_max_pool2d as adaptive_max_pool2d
from pmod.nn.functional.resample import adaptive_max_pool3d as adaptive_max_pool3d
from pmod.nn.functional.resample import interpolate as interpolate
from pmod.nn.functional.sizes import out_sizes as out_sizes
from pmod.nn.functional.vocabulary import cross_entropy as cross_entropy
from pmod.nn.functional.vocabulary import embedding as embedding
from pmod.nn.functional.vocabulary import linear as linear
