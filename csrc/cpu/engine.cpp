// Runs a plan: steps in order, each split over the threads by rows of its last block.
#include "engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif
#include <new>
#include <optional>

#include <sched.h>

#include "engine_bf16.h"
#include "engine_math.h"
#include "engine_rows.h"
#include "ff_api.h"

namespace ff::engine {
namespace {

constexpr int kMaxBlocks = 16;  // of one step

constexpr Produce kProduce[kKinds] = {stem,      separable,   conv,        fuse,           gate,      maps,
                                      apply,     load_planar, conv_planar, head,           deform,    reuse,
                                      blend,     mix,         stem_bf16,   separable_bf16, conv_bf16, fuse_bf16,
                                      maps_bf16, apply_bf16,  head_bf16,   mix_bf16,       to_float,  to_bf16};

// Spins, then yields: steps take tens of microseconds, but there may be more threads than processors.
class Barrier {
 public:
  explicit Barrier(int team) : team_(team) {}
  void wait() {
    if (team_ == 1) return;
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == team_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins > 20000) sched_yield();
    }
  }

 private:
  const int team_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

struct Run {
  const Block *blocks;
  int64_t count;
  float *arena;
  const float *weights;
  const char *image;
  const Picture *picture;
  int64_t anchors;
  float *bbox, *cls, *landmarks;
  int64_t batch, scratch, scratch_size;
  double *seconds;
};

// One step on one thread: the blocks first .. first + count - 1.
class Step {
 public:
  Step(const Run &run, const Block *first, int count, int64_t image, int rank) : count_(count) {
    float *scratch = run.arena + run.scratch + rank * run.scratch_size;
    for (int i = 0; i < count; ++i) {
      const Block &b = first[i];
      const auto map = [&](int64_t base, int64_t row, int64_t ring, int64_t h, int64_t w, int64_t c, int64_t cs,
                           bool in_scratch) {
        if (base < 0) return Map{nullptr, 0, 1, h, w, c, cs};
        return Map{(in_scratch ? scratch : run.arena) + base, row, std::max<int64_t>(ring, 1), h, w, c, cs};
      };
      context_[i] = Context{&b,
                            run.arena,
                            scratch,
                            run.weights,
                            run.image + image * run.picture->image_bytes,
                            run.picture,
                            run.bbox + image * run.anchors * 4,
                            run.cls + image * run.anchors * 2,
                            run.landmarks + image * run.anchors * 10,
                            map(b.a_base, b.a_row, b.a_ring, b.a_h, b.a_w, b.a_c, b.a_cs, b.a_block >= 0),
                            map(b.b_base, b.b_row, b.b_ring, b.b_h, b.b_w, b.b_c, b.b_cs, b.b_block >= 0),
                            map(b.c_base, b.c_row, b.c_ring, b.c_h, b.c_w, b.c_c, b.c_cs, b.c_block >= 0),
                            map(b.o_base, b.o_row, b.o_ring, b.o_h, b.o_w, b.o_c, b.o_cs, b.o_block > 0)};
      next_[i] = -1;
    }
  }

  void run(int64_t begin, int64_t end) {
    start(count_ - 1, begin);
    end_ = end;
    advance(count_ - 1, end - 1);
  }

 private:
  static int64_t source(const Block &b, int i) { return i == 0 ? b.a_block : i == 1 ? b.b_block : b.c_block; }

  // The first row of block i is `row` or, if another consumer wants an earlier one, that.
  void start(int i, int64_t row) {
    row = std::max<int64_t>(row, 0);
    if (next_[i] >= 0 && next_[i] <= row) return;
    next_[i] = row;
    const Block &b = *context_[i].block;
    for (int s = 0; s < 3; ++s)
      if (source(b, s) >= 0) start(static_cast<int>(source(b, s)), row * b.stride - b.pad);
  }

  // Makes rows of block i up to and including `last`.
  void advance(int i, int64_t last) {
    const Block &b = *context_[i].block;
    const int64_t limit = i == count_ - 1 ? end_ : b.o_h;
    last = std::min(last, limit - 1);
    while (next_[i] <= last) {
      const int64_t y = next_[i], n = std::min(b.rows, limit - y);
      for (int s = 0; s < 3; ++s)
        if (source(b, s) >= 0) advance(static_cast<int>(source(b, s)), (y + n - 1) * b.stride - b.pad + b.kernel - 1);
      kProduce[b.kind](context_[i], y, n);
      next_[i] = y + n;
    }
  }

  int count_;
  int64_t end_ = 0;
  Context context_[kMaxBlocks];
  int64_t next_[kMaxBlocks];
};

void work(const Run &run, Barrier &barrier, int rank, int team) {
  std::optional<Tiles> tiles;
  if (run.blocks[0].kind == kStemBf16) tiles.emplace();
  auto started = std::chrono::steady_clock::now();
  for (int64_t image = 0; image < run.batch; ++image)
    for (int64_t i = 0, step = 0; i < run.count; ++step) {
      int64_t end = i;
      while (!run.blocks[end].last) ++end;
      const Block &b = run.blocks[end++];
      const bool single = b.kind == kGate;
      const int64_t rows = single ? 1 : b.o_h;
      const int64_t turn = single ? (rank + step) % team : rank;
      const int64_t from = rows * turn / team, to = rows * (turn + 1) / team;
      if (from < to) Step(run, run.blocks + i, static_cast<int>(end - i), image, rank).run(from, to);
      if (b.sync || run.seconds) barrier.wait();
      if (run.seconds && rank == 0) {
        const auto stop = std::chrono::steady_clock::now();
        run.seconds[end - 1] += std::chrono::duration<double>(stop - started).count();
        started = stop;
      }
      i = end;
    }
}

}  // namespace
}  // namespace ff::engine

extern "C" int ff_cpu_engine_run(const void *plan, int64_t count, void *arena, int64_t scratch, int64_t scratch_size,
                                 const void *weights, const void *image, const int64_t *picture, void *bbox, void *cls,
                                 void *landmarks, int64_t anchors, int64_t batch, void *seconds, int lanes,
                                 int threads) {
  using namespace ff::engine;
  if (lanes != L || threads < 1) return FF_BAD_ARGUMENT;
  const Picture view{picture[0], picture[1], picture[2], picture[3], picture[4], picture[5]};
  const Run run{static_cast<const Block *>(plan),
                count,
                static_cast<float *>(arena),
                static_cast<const float *>(weights),
                static_cast<const char *>(image),
                &view,
                anchors,
                static_cast<float *>(bbox),
                static_cast<float *>(cls),
                static_cast<float *>(landmarks),
                batch,
                scratch,
                scratch_size,
                static_cast<double *>(seconds)};
#ifdef _OPENMP
  if (threads > 1) {
    alignas(64) char storage[sizeof(Barrier)];
    Barrier *barrier = nullptr;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
      barrier = new (storage) Barrier(omp_get_num_threads());
      work(run, *barrier, omp_get_thread_num(), omp_get_num_threads());
    }
    return FF_OK;
  }
  Barrier barrier(1);
  work(run, barrier, 0, 1);
#else
  Barrier barrier(threads);
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) others.emplace_back([&, rank] { work(run, barrier, rank, threads); });
  work(run, barrier, 0, threads);
  for (std::thread &other : others) other.join();
#endif
  return FF_OK;
}

#define FF_ENGINE_NAME(name) #name ","
extern "C" const char *ff_cpu_engine_fields(void) { return FF_ENGINE_FIELDS(FF_ENGINE_NAME); }

extern "C" int ff_cpu_engine_lanes(void) { return ff::engine::L; }

extern "C" int ff_cpu_engine_bf16(void) {
#if defined(__AMX_BF16__)
  return 1;
#else
  return ff::engine::kDots ? 2 : 0;
#endif
}
