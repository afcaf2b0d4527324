// Splitting a range over threads: OpenMP's, or new ones where there is no OpenMP. Static and contiguous, so the same
// range always goes to the same thread.
#pragma once
#include <algorithm>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#else
#include <thread>
#include <vector>
#endif

namespace ff {

// Calls body(rank, begin, end) on up to `threads` threads; each gets at least `grain` of the `count` items. Ranks count
// from zero and name the scratch memory and partial sums of a thread. Returns how many ranks there were.
template <class Body>
inline int parallel_ranks(int64_t count, int64_t grain, int threads, const Body &body) {
  if (count <= 0) return 0;
  const int64_t most = std::max<int64_t>(1, count / std::max<int64_t>(1, grain));
  const int64_t workers = std::min<int64_t>(threads, most);
  if (workers > 1) {
#ifdef _OPENMP
    int ranks = 1;
#pragma omp parallel num_threads(static_cast<int>(workers))
    {
      const int64_t team = omp_get_num_threads(), rank = omp_get_thread_num();
      if (rank == 0) ranks = static_cast<int>(team);
      body(static_cast<int>(rank), count * rank / team, count * (rank + 1) / team);
    }
    return ranks;
#else
    const auto part = [&](int64_t rank) {
      body(static_cast<int>(rank), count * rank / workers, count * (rank + 1) / workers);
    };
    std::vector<std::thread> others;
    for (int64_t rank = 1; rank < workers; ++rank) others.emplace_back(part, rank);
    part(0);
    for (std::thread &other : others) other.join();
    return static_cast<int>(workers);
#endif
  }
  body(0, 0, count);
  return 1;
}

// The same without ranks.
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, int threads, const Body &body) {
  parallel_ranks(count, grain, threads, [&](int, int64_t begin, int64_t end) { body(begin, end); });
}

}  // namespace ff
