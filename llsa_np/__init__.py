"""Log-linear Sparse Attention (LLSA, arXiv 2512.16615) for any array framework.

Attention over n tokens at a cost of n log n: every query sees the whole sequence on coarse levels and descends, level
by level, into the few tokens that matter to it. `attention` is the whole of it; `select`, `attend`, `attend_backward`
and `pool` are its steps. The NumPy code in this package is the definition; importing it loads NumPy alone.
"""

from llsa_np.backends import BackendName, backends
from llsa_np.coverage import coverage
from llsa_np.functions import attend, attend_backward, attention, pool, precompile, select
from llsa_np.hierarchy import Hierarchy, default_levels
from llsa_np.merge import merge
from llsa_np.options import Layout, Precision, TopK
from llsa_np.selection import Selection
from llsa_np.zorder import zorder

__version__ = "0.1.0"

__all__ = [
    "BackendName",
    "Hierarchy",
    "Layout",
    "Precision",
    "Selection",
    "TopK",
    "__version__",
    "attend",
    "attend_backward",
    "attention",
    "backends",
    "coverage",
    "default_levels",
    "merge",
    "pool",
    "precompile",
    "select",
    "zorder",
]
