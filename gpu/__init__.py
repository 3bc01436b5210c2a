"""The four operations as CUDA kernels: an empty room so far.

Each backend gets a folder here whose files mirror the NumPy reference one for one: `pool`, `select`, `attend` and
`attend_backward`. `numba_cuda/` will hold the kernels to read, `cupy_raw/` the fast ones in CUDA C++.
`llsa_np.backends()` tells what can serve on this machine and why the others cannot.
"""
