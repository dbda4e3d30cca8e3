"""OpenVINO and ONNX Runtime as rivals of fastdit on a CPU, each in a process of its own.

In one process, the thread pools of several runtimes would compete for the CPUs. A rival's process
makes its model itself, so that no weights are sent, and is idle while other ways are timed.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _harness import seconds, settled_seconds
from torch import Tensor, nn

if TYPE_CHECKING:
    from _ways import Way

Inputs = tuple[Tensor, Tensor, Tensor]  # x [B, C, H, W], t [B] and y [B]
Network = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx")}
MOST_SPINNING_S = 10.0


def obstacle(rival: str, device: torch.device) -> str | None:
    """Return why a rival cannot be timed here, or None."""
    if device.type != "cpu":
        return "is timed on a CPU only"
    missing = [name for name in PACKAGES[rival] if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}; pip install 'fastdit[rivals]'" if missing else None


def openvino_network(model: nn.Module, inputs: Inputs, threads: int) -> Network:
    """Convert a model to OpenVINO for the shapes of its inputs, and compile it in float32."""
    os.environ["CI"] = "true"  # elsewhere, the converter reports its use to OpenVINO's makers
    import openvino

    shapes = [tuple(value.shape) for value in inputs]
    network = openvino.convert_model(model, example_input=inputs, input=shapes)
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # the default is bfloat16 on CPUs that have it
        "INFERENCE_NUM_THREADS": threads,
    }
    request = openvino.Core().compile_model(network, "CPU", options).create_infer_request()
    return lambda *values: request.infer(values, share_inputs=True)[0]


def onnxruntime_network(model: nn.Module, inputs: Inputs, threads: int) -> Network:
    """Export a model to ONNX for the shapes of its inputs, and load it into ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # The exporter without `dynamo` needs no further package but fails on shapes that are computed
    # in the model; after torch.export they are constants. Where the weights exceed the 2 GB of a
    # protobuf file, it writes them to files beside it.
    fixed = torch.export.export(model, inputs).module()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = str(Path(folder, "model.onnx"))
        as_it_is = torch.onnx.TrainingMode.PRESERVE  # an exported module cannot change its mode
        torch.onnx.export(fixed, inputs, path, dynamo=False, opset_version=20, training=as_it_is)
        del fixed
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *values: session.run(None, dict(zip(names, values, strict=True)))[0]


CONVERTERS = {"openvino": openvino_network, "onnxruntime": onnxruntime_network}


class Converted(nn.Module):
    """A model as a runtime runs it, converted for the shapes of the first call."""

    def __init__(self, model: nn.Module, rival: str, threads: int) -> None:
        super().__init__()
        self.model: nn.Module | None = model.eval()
        self.convert, self.threads = CONVERTERS[rival], threads
        self.network: Network | None = None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if self.network is None:
            assert self.model is not None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tracing, which fixes the shapes on purpose
                self.network = self.convert(self.model, (x, t, y), self.threads)
            self.model = None  # the network has its own copy of the weights
        return torch.from_numpy(self.network(x.numpy(), t.numpy(), y.numpy()))


class Rival:
    """A way to sample that runs in a process of its own.

    An error ends the process, since a way that has failed takes no more turns. Otherwise `close`
    ends it. It also ends by itself as soon as its parent process has ended.
    """

    def __init__(self, name: str, make: Callable[[], Way]) -> None:
        """Start the process and wait until it has made its way.

        Args:
            name: how errors name it.
            make: makes the way in the new process; it must be possible to pickle it.
        """
        self.name = name
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        context = multiprocessing.get_context("spawn")
        self._connection, other_end = context.Pipe()
        arguments = (other_end, make, self._folder.name)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with other_end:  # closed here, so that the death of the process is seen as an end of file
            self.process.start()
        self._receive()

    def __call__(self, labels: Tensor, given: tuple[Tensor, Tensor] | None) -> Tensor:
        """Sample as any other way."""
        return torch.from_numpy(self._ask(labels, given, settled=False)[1])

    def seconds(self, labels: Tensor) -> float:
        """Sample, and return the seconds that it took inside the process."""
        wait_until_idle()
        return self._ask(labels, None, settled=True)[0]

    def close(self) -> None:
        """End the process, whatever it is doing, and remove its temporary files."""
        self.process.kill()
        self.process.join()
        self._connection.close()
        self._folder.cleanup()

    def _ask(
        self, labels: Tensor, given: tuple[Tensor, Tensor] | None, settled: bool
    ) -> tuple[float, np.ndarray]:
        # Tensors would be sent as shared memory, which takes further processes and files.
        arrays = given and tuple(value.numpy() for value in given)
        try:
            self._connection.send((labels.numpy(), arrays, settled))
        except ConnectionError:
            pass  # it has died, and _receive says how
        return self._receive()

    def _receive(self) -> Any:
        """Return the next answer of the process; on an error, end the process and raise."""
        answer = None
        try:
            error, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            error = _cause_of_death(self.process.exitcode)
        if error is not None:
            self.close()
            raise RuntimeError(f"{self.name}: {error}")
        return answer


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"its process ended with exit code {exit_code}"
    hint = ", perhaps for want of memory" if exit_code == -signal.SIGKILL else ""
    return f"its process was ended by {signal.Signals(-exit_code).name}{hint}"


def wait_until_idle() -> None:
    """Wait until the threads of this process, which may spin after their work, use no CPU."""
    deadline = time.monotonic() + MOST_SPINNING_S
    while time.monotonic() < deadline:
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return
    raise RuntimeError(f"threads still used the CPU {MOST_SPINNING_S:g} s after their work")


def _serve(connection: Connection, make: Callable[[], Way], folder: str) -> None:
    """Make a way and run it on request, until the other end is closed or an error is raised.

    Answers are pairs: an error or None, and (seconds, images) of a run or None.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    tempfile.tempdir = folder
    images: list[Tensor] = []
    try:
        way = make()
        connection.send((None, None))
        while True:
            labels, given, settled = connection.recv()
            y = torch.from_numpy(labels)
            noise = given and (torch.from_numpy(given[0]), torch.from_numpy(given[1]))
            call = lambda y=y, noise=noise: images.append(way(y, noise))  # noqa: E731
            taken = (settled_seconds if settled else seconds)(call, torch.device("cpu"))
            wait_until_idle()
            connection.send((None, (taken, images[-1].numpy())))
            images.clear()
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        text = f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}"
        connection.send((text, None))


def _end_with_parent(folder: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)  # an exported model may have gigabytes
    os._exit(1)
