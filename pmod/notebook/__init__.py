"""One process per rank under a notebook: `%load_ext pmod.notebook`, then `%mesh data=2
model=2`, then `%%spmd` cells.

`%mesh data=2 model=2` starts an engine of ipyparallel for each rank, on this machine
and reachable from it only, each with its device, makes the mesh and sets it. A cell
that opens with `%%spmd` runs on all ranks, with `%%spmd model=0` on some; `%%px` works,
too. Another `%mesh` keeps the engines, and their variables, as far as the number of
ranks allows.

Without `%mesh` a `%%spmd` cell runs in the notebook's own process, on a mesh of one
rank: the one that is set, else ``data=1``. Where the notebook's processes are the ranks
already (jupyter-distributed, mpirun) nothing is started.
"""

from pmod.notebook.magics import load_ipython_extension as load_ipython_extension
from pmod.notebook.magics import pull as pull
from pmod.notebook.magics import push as push
from pmod.notebook.magics import unload_ipython_extension as unload_ipython_extension
