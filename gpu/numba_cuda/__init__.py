"""The four operations as CUDA kernels to be read, written in Python and compiled by Numba (`backend="numba_cuda"`).

One file per operation, mirroring `llsa_np/`: `pool`, `select`, `attend`, `attend_backward`, with `transpose` for the
selection as keys see it and `tiles` for what all of them do with tiles. `backend` calls them; `cuda` is the one place
that imports numba.cuda. Names of the kernels' variables: sizes in capitals, `i_` for ids, `o_` for offsets; a tag such
as `# [BT, BD]` gives the shape of a tile.
"""
