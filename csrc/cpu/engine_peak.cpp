// What the processor can do: products per second of loops that do nothing else.
#include <chrono>

#include "engine_bf16.h"
#include "ff_api.h"
#include "parallel.h"

namespace ff::engine {
namespace {

// Sums that are independent of each other, enough to hide an instruction's latency.
constexpr int kSums = kRegisters == 32 ? 24 : 12;
constexpr int64_t kRounds = 1 << 20;

template <class Product>
FF_INLINE float repeat(const Product &product) {
  V sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = V(float(i));
  for (int64_t round = 0; round < kRounds; ++round)
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sums[i] = product(sums[i]);
  V total = sums[0];
  for (int i = 1; i < kSums; ++i) total += sums[i];
  return total.sum();
}

// Multiplies and adds; returns how often one thread did, and a value that depends on all of it.
double multiply(bool low, float factor, float *kept) {
  const V x(factor), y(1.0f - factor);
  if (!low) {
    *kept = repeat([&](V sum) { return fma(sum, x, y); });
    return double(kRounds) * kSums * L;
  }
#if defined(__AMX_BF16__)
  alignas(64) float zeros[kTilePixels * kTileChannels] = {};
  Tiles tiles;
  constexpr int64_t kRow = kTileDepth * sizeof(bf16);
  tile_load<0>(zeros, kRow), tile_load<1>(zeros, kRow), tile_load<2>(zeros, kRow), tile_load<3>(zeros, kRow);
  tile_load<4>(zeros, kRow), tile_load<5>(zeros, kRow), tile_load<6>(zeros, kRow), tile_load<7>(zeros, kRow);
  for (int64_t round = 0; round < kRounds; ++round) {
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
  tile_store<0>(zeros, kRow);
  *kept = zeros[0];
  return double(kRounds) * 4 * kTilePixels * kTileDepth * kTileChannels;
#elif defined(FF_ENGINE_DOTS)
  const __m512i a = _mm512_castps_si512(x.v), b = _mm512_castps_si512(y.v);
  *kept = repeat([&](V sum) -> V { return _mm512_dpbf16_ps(sum.v, (__m512bh)a, (__m512bh)b); });
  return double(kRounds) * kSums * L * 2;
#else
  return 0;
#endif
}

}  // namespace
}  // namespace ff::engine

extern "C" double ff_cpu_engine_peak(int low, int threads) {
  using namespace ff::engine;
  if (low && ff_cpu_engine_bf16() == 0) return 0;
  double done[256];
  float kept[256];
  threads = std::min(std::max(threads, 1), 256);
  const auto started = std::chrono::steady_clock::now();
  const int ranks = ff::parallel_ranks(
      threads, 1, threads, [&](int rank, int64_t, int64_t) { done[rank] = multiply(low != 0, 0.5f, &kept[rank]); });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  double products = 0;
  for (int rank = 0; rank < ranks; ++rank) products += kept[rank] == kept[rank] ? done[rank] : 0;
  return 2 * products / seconds;
}
