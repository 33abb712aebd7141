"""Fixtures for every test: seeds, poisoned memory, shared data, and ranks as threads."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

if not torch.cuda.is_available():  # before a kernel's file is imported, which reads it
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.patch()

from shardlens.kernels import implementation
from shardlens.parallel import TensorParallel

# A shell's background jobs ignore these, and so would every program that a test starts.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Tokenizers, configs and a trained model that do not ship with the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the test data in {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A trained LLaMA of 260,000 parameters, in Hugging Face layout."""
    return shared_data / "stories260K-hf"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The tensors of tests are too small to share between threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: a GPU, or the CPU in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["triton", "reference"])
def either(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs twice: on the kernels, and on their references."""
    with implementation(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that reading what nobody wrote shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


RunRanks = Callable[[int, Callable[[TensorParallel], Any]], list[Any]]


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    return run_ranks_as_threads


def run_ranks_as_threads(size: int, body: Callable[[TensorParallel], Any]) -> list[Any]:
    """Run body(parallel) on `size` ranks that exchange real data; the results in rank order.

    Ranks are threads of this process, which takes milliseconds instead of seconds to start. The
    first error of any rank is raised.
    """
    if size == 1:
        return [body(TensorParallel.single())]
    results: list[Any] = [None] * size
    errors: list[BaseException] = []
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    store = dist.HashStore()
    grad, deterministic = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()

    def rank_main(rank: int) -> None:
        try:
            torch.set_grad_enabled(grad)
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            results[rank] = body(TensorParallel.from_group())
        except BaseException as error:
            errors.append(error)
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    threads = [
        threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    stuck = any(thread.is_alive() for thread in threads)
    threaded._uninstall_threaded_pg()
    threaded.ProcessLocalGroup.reset()
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if errors:
        raise errors[0]
    assert not stuck, "a rank hangs"
    return results
