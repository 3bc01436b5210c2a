"""The four operations as CUDA kernels.

Each backend gets a folder here whose files mirror the NumPy reference one for one: `pool`, `select`, `attend` and
`attend_backward`. `numba_cuda/` holds the kernels to read, `cupy_raw/` will hold the fast ones in CUDA C++.
`llsa_np.backends()` tells what can serve on this machine and why the others cannot.
"""
