"""The NumPy reference as a backend: its four operations, and that it serves whatever lies on the host."""

from __future__ import annotations

from typing import Any

from llsa_np.attend import attend
from llsa_np.attend_backward import attend_backward
from llsa_np.pool import pool
from llsa_np.select import select


class NumpyBackend:
    """Serves every case, on the cores of this machine. It makes room for itself, so the one it is lent is empty."""

    name = "numpy"

    def refusals(self, case: object) -> list[str]:
        """None: whatever passes the checks is served."""
        return []

    def spaces(self, work: object) -> list[tuple[tuple[int, ...], str]]:
        """None."""
        return []

    def precompile(self, *arguments: object) -> None:
        """Nothing to compile."""

    def pool(self, *arguments: Any) -> None:
        """Fill levels 1..L."""
        pool(*arguments[:-1])

    def select(self, *arguments: Any) -> None:
        """Fill S_1 .. S_L."""
        select(*arguments[:-1])

    def attend(self, *arguments: Any) -> None:
        """Fill out and lse."""
        attend(*arguments[:-1])

    def attend_backward(self, *arguments: Any) -> None:
        """Fill dq, dk and dv, each unless None."""
        attend_backward(*arguments[:-1])


backend = NumpyBackend()
