// Threads that take a group of images through the sampling loop in lockstep.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>

namespace fastdit {

inline int64_t nanoseconds() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

// A barrier at which each thread writes a flag of its own and reads those of the others, so that a
// cache line crosses between two CPUs once. A thread spins first, since the others are seldom late,
// and then yields the CPU, since they may be waiting for it. It sleeps only if another is held up
// for long: to wake up takes longer than a layer, so the thread that arrives next would sleep too,
// and so on at every barrier.
class Barrier {
 public:
  explicit Barrier(int64_t threads) : flags_(new Flag[threads]) {}

  // Waits for the first `size` threads, of which the caller is `id`. Returns the nanoseconds that
  // it had to wait, or 0 if it was no longer than usual.
  int64_t wait(int64_t id, int64_t size) {
    Flag& mine = flags_[id];
    const uint32_t turn = mine.turn.load(std::memory_order_relaxed) + 1;
    mine.turn.store(turn);
    if (mine.sleepers.load()) mine.turn.notify_all();
    int64_t waited = 0;
    for (int64_t other = 0; other < size; other++) waited += wait_for(flags_[other], turn);
    return waited;
  }

 private:
  struct alignas(64) Flag {
    std::atomic<uint32_t> turn{0}, sleepers{0};
    bool reached(uint32_t wanted) const { return int32_t(turn.load() - wanted) >= 0; }
  };

  static int64_t wait_for(Flag& flag, uint32_t turn) {
    for (int i = 0; i < 2000; i++)
      if (flag.reached(turn)) return 0;
    const int64_t start = nanoseconds();
    for (int i = 0; i < 1000 && !flag.reached(turn); i++) std::this_thread::yield();
    if (!flag.reached(turn)) {
      flag.sleepers.fetch_add(1);
      while (!flag.reached(turn)) flag.turn.wait(turn - 1);  // no thread is two turns behind
      flag.sleepers.fetch_sub(1);
    }
    return nanoseconds() - start;
  }

  std::unique_ptr<Flag[]> flags_;
};

// How many threads the CPUs have time for, where threads share images. Other programs may keep some of them busy, and
// a team is as slow as its slowest thread. What one call finds out holds for the next calls too,
// for a pause that doubles, up to a second, each time that more threads are tried in vain.
class Limit {
 public:
  int64_t threads(int64_t wanted) const {
    return nanoseconds() < retry_.load() ? std::min(wanted, most_.load()) : wanted;
  }
  void lower(int64_t most) {
    const int64_t now = nanoseconds(), retry = retry_.load();
    int64_t pause = pause_.load();
    if (now > retry + LONGEST)  // so long more threads did well
      pause = SHORTEST;
    else if (now >= retry)  // they were tried in vain
      pause = std::min(2 * pause, LONGEST);
    most_.store(most);
    pause_.store(pause);
    retry_.store(now + pause);
  }

 private:
  static constexpr int64_t SHORTEST = 10'000'000, LONGEST = 1'000'000'000;
  std::atomic<int64_t> most_{1}, retry_{0}, pause_{SHORTEST};
};

// What the threads of a team share besides their memory.
struct TeamState {
  explicit TeamState(int64_t threads) : barrier(threads) {}

  Barrier barrier;
  int64_t others = 0;  // threads of the call that are in other teams
  // Even steps use one element and odd steps the other, since the first thread sets the next step's
  // while others still read this step's.
  alignas(64) std::atomic<int64_t> waited[2]{};  // the longest that a thread waited
  int64_t sizes[2]{};                            // of the team
  // When the time that is watched began, and how much of it was waited.
  int64_t began = 0, lost = 0;

  void watch_from(int64_t now) { began = now, lost = 0; }
};

// The threads that share a group of images, and the calling thread's place among them.
struct Team {
  int64_t id, size;
  TeamState* state;
  Limit* limit;
  bool fresh = true;   // the thread has done nothing else in this call, so all should be there
  int64_t waited = 0;  // since this step began

  void wait() {
    if (size > 1) waited += state->barrier.wait(id, size);
  }

  // Waits for the others between two steps. Returns whether this thread takes the next one: a team
  // whose threads wait for each other most of the time goes on with fewer, which is no slower and
  // leaves a CPU to those that kept it waiting. No sum depends on the number of threads.
  bool take_step(int64_t step) {
    if (size == 1) return true;
    auto& longest = state->waited[step % 2];
    if (waited > longest.load()) longest.store(waited);  // a lost update is of no consequence
    waited = state->barrier.wait(id, size);
    if (step == 0 && !fresh) waited = 0;
    const int64_t now_size = step ? std::min(size, state->sizes[step % 2]) : size;
    if (id == 0) state->sizes[(step + 1) % 2] = next_size(step, now_size, longest.exchange(0));
    size = now_size;
    return id < size;
  }

 private:
  // Returns the size after the step that begins. Called by the first thread, with the longest that
  // a thread waited in the step that has ended.
  int64_t next_size(int64_t step, int64_t now_size, int64_t longest) {
    const int64_t now = nanoseconds();
    if (step == 0 || now_size < size) state->watch_from(now);
    state->lost += longest;
    const int64_t taken = now - state->began, lost = state->lost;
    if (taken < WATCHED) return now_size;
    state->watch_from(now);
    if (lost < 0.55 * taken || now_size == 1) return now_size;
    const int64_t fewer = now_size - std::max<int64_t>(1, now_size / 8);
    limit->lower(fewer + state->others);
    return fewer;
  }

  // Two threads that take turns on one CPU each wait for a little more than half of the time.
  // Over less time than this, a CPU that has to wake up would count as a busy one.
  static constexpr int64_t WATCHED = 2'000'000;
};

}  // namespace fastdit
