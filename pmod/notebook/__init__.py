"""One process per rank under a notebook, for cells that open with `%%spmd`.

It takes `%load_ext pmod.notebook`, then `%mesh data=2 model=2`, which starts an engine
of ipyparallel for each rank, makes the mesh and sets it. The engines run on this machine
and can be reached from it only. Each has its device. A cell that opens with `%%spmd`
runs on all ranks, with `%%spmd model=0` on some; `%%px` works, too. Another `%mesh`
keeps the engines, and their variables, as far as the number of ranks allows.

Without `%mesh` a `%%spmd` cell runs in the notebook's own process, on a mesh of one
rank: the one that is set, else ``data=1``. If the notebook's processes are themselves
the ranks (jupyter-distributed, mpirun), no engines are started.
"""

from pmod.notebook.magics import load_ipython_extension as load_ipython_extension
from pmod.notebook.magics import pull as pull
from pmod.notebook.magics import push as push
from pmod.notebook.magics import unload_ipython_extension as unload_ipython_extension
