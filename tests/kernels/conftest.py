"""Fixtures of the kernels' suite, which runs on a GPU or, with TRITON_INTERPRET=1, interpreted.

Without either no test is collected. `tests/test_interpreter.py` runs this folder in a process of
its own, since the variable must be set before Triton is imported.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# This is Hopper's default. Once it is set, PyTorch takes cuBLAS for deterministic, and the fixture
# below causes no warning at every product. It is read once, when the first product runs.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(scope="session", autouse=True)
def language_patched_once_a_launch():
    """Keep the interpreter from replacing Triton's functions again at every call within a kernel.

    It replaces them when a launch begins, and once more whenever the kernel calls another function,
    though they are replaced until the launch ends. That took nearly half of the suite's time.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()  # the modules of functions that this launch has called

    def patch_once(function):
        module = function.__globals__["__name__"]
        if module not in patched:
            patched.add(module)
            return patch(function)

    def launch_anew(self, *arguments, **named):
        patched.clear()
        return launch(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
        monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Have `torch.empty` return NaN, so that elements which a kernel forgets to write are seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def contracted(monkeypatch):
    """Have the interpreter round a product and its sum once, as a fused multiply-add does.

    Compilers for GPUs fuse wherever they can, and the interpreter never does. A product that is
    reshaped before the sum is still rounded by itself, as is one for a whole row on a GPU.
    """
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder

    def multiply(self, a, b):
        product = self.binary_op(a, b, np.multiply)
        if product.data.dtype == np.float32:
            product.exact = np.multiply(a.data, b.data, dtype=np.float64)
        return product

    def fused(op):
        def add(self, a, b):
            exact_a, exact_b = (getattr(t, "exact", None) for t in (a, b))
            if exact_a is None and exact_b is None:
                return self.binary_op(a, b, op)
            if exact_a is not None:
                total = op(exact_a, b.data, dtype=np.float64)
            else:
                total = op(a.data, exact_b, dtype=np.float64)
            return interpreter.TensorHandle(total.astype(np.float32), a.dtype.scalar)

        return add

    monkeypatch.setattr(builder, "create_fmul", multiply)
    monkeypatch.setattr(builder, "create_fadd", fused(np.add))
    monkeypatch.setattr(builder, "create_fsub", fused(np.subtract))
