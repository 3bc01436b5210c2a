"""The NumPy reference as a backend: its four operations, and that it serves whatever lies on the host."""

from __future__ import annotations

from llsa_np.attend import attend
from llsa_np.attend_backward import attend_backward
from llsa_np.pool import pool
from llsa_np.select import select


class NumpyBackend:
    """Serves every case, on the cores of this machine."""

    name = "numpy"
    pool = staticmethod(pool)
    select = staticmethod(select)
    attend = staticmethod(attend)
    attend_backward = staticmethod(attend_backward)

    def refusals(self, case: object) -> list[str]:
        """None: whatever passes the checks is served."""
        return []


backend = NumpyBackend()
