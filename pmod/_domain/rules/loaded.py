"""All rules, registered by being imported."""

from pmod._domain.rules import attention as attention
from pmod._domain.rules import classes as classes
from pmod._domain.rules import indexing as indexing
from pmod._domain.rules import joins as joins
from pmod._domain.rules import matmul as matmul
from pmod._domain.rules import norms as norms
from pmod._domain.rules import pointwise as pointwise
from pmod._domain.rules import random as random
from pmod._domain.rules import reductions as reductions
from pmod._domain.rules import spectra as spectra
from pmod._domain.rules import views as views
from pmod._domain.rules import windows as windows
