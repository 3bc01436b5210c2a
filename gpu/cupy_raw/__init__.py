"""The four operations in CUDA C++, compiled at first use and launched through CuPy (`backend="cupy_raw"`).

One `.cu` file per operation, mirroring `llsa_np/`, with its host side in the `.py` of the same name: which
specialisation a call takes, its workspace and its launches; `transpose` and `unpool` for the gradients. Headers:
`numbers` (elements, arrays), `instructions` (what CUDA C++ has no function for), `tiles` (tiles in shared memory and
their products), `levels` (the list of candidates), `walk` (queries going along it). `program` compiles and launches,
`specialisations` is the one list of what is compiled, `backend` calls the operations.
"""
