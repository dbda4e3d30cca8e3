"""Teams of threads: who leaves when, and that no bit depends on it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdit
from fastdit import DiffusionScheduler, Sampler
from fastdit.testing import randomize

KERNELS = Path(fastdit.__file__).resolve().parent.parent / "kernels" / "cpu"
PROGRAM = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "team.h"

using namespace fastdit;
static Limit limit;

// Takes steps of `work` microseconds with a team, whose last thread takes `late` more in each.
// Prints how many steps every thread took, and the most threads that a next call would have.
static void run(int threads, int steps, int work, int late) {
  TeamState state(threads);
  std::vector<int> taken(threads);
  std::vector<std::thread> all;
  for (int id = 0; id < threads; id++)
    all.emplace_back([&, id] {
      Team team{id, threads, &state, &limit};
      for (int step = 0; step < steps && team.take_step(step); step++) {
        const int extra = id == threads - 1 ? late : 0;
        std::this_thread::sleep_for(std::chrono::microseconds(work + extra));
        team.wait();
        taken[id]++;
      }
    });
  for (auto& thread : all) thread.join();
  for (int count : taken) std::printf("%d ", count);
  std::printf("%d\n", (int)limit.threads(threads));
}

int main() {
  run(3, 12, 20000, 0);  // all on time
  run(3, 12, 0, 20000);  // the last one is late
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  std::printf("%d\n", (int)limit.threads(3));
  for (int i = 0; i < 3; i++) {  // late again at once, each time
    while (limit.threads(3) < 3) std::this_thread::yield();
    const int64_t start = nanoseconds();
    run(3, 20, 0, 3000);
    while (limit.threads(3) < 3) std::this_thread::yield();
    std::printf("%d\n", (int)((nanoseconds() - start) / 1000000));
  }
}
"""


def test_a_team_goes_on_without_a_thread_that_keeps_it_waiting(tmp_path):
    """Threads that sleep need no CPU, and their steps are long for a busy machine too."""
    (tmp_path / "team.cpp").write_text(PROGRAM)
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [*"-std=c++20 -O1 -pthread -Wall -Werror".split(), f"-I{KERNELS}"]
    subprocess.run([*compiler, *flags, "team.cpp", "-o", "team"], cwd=tmp_path, check=True)
    done = subprocess.run([tmp_path / "team"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    on_time, late, calm, *again = [list(map(int, row.split())) for row in done.stdout.splitlines()]
    assert on_time == [12, 12, 12, 3]
    assert late[:2] == [12, 12] and 1 <= late[2] <= 4
    assert calm == [3]
    pauses = [milliseconds for (milliseconds,) in again[1::2]]
    assert pauses[0] < pauses[1] < pauses[2]  # the longer the more often it was in vain


@pytest.fixture
def busy_cpus():
    """Keep all CPUs busy with other processes while a test runs."""
    command = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(command) for _ in range(len(os.sched_getaffinity(0)))]
    yield
    for other in others:
        other.kill()
        other.wait()


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_busy_cpus_change_no_bit(threads, request):
    """A team may lose threads in the middle of an image, at other steps in every call."""
    before = torch.get_num_threads()
    model = fastdit.DiT(img_size=16, hidden=128, n_heads=4, n_layers=4)
    randomize(model)
    sampler = Sampler(model, DiffusionScheduler(60, schedule="cosine"), execution="trajectory")
    torch.set_num_threads(threads)
    try:
        expected = sampler([5], seed=7)
        request.getfixturevalue("busy_cpus")
        assert all(torch.equal(sampler([5], seed=7), expected) for _ in range(8))
    finally:
        torch.set_num_threads(before)
