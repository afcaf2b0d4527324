// CUDA on the CPU, for tests: found before the toolkit's header of the same name, it lets g++ compile the kernels of
// csrc/cuda unchanged (translate.py rewrites only `<<<...>>>` and `__shared__`, which C++ cannot parse). A block's
// threads are fibres; runtime.cpp schedules them and checks every access. It knows what the kernels use, not all of
// CUDA: a missing name is a compile error here.
#ifndef FF_EMULATION_CUDA_RUNTIME_H
#define FF_EMULATION_CUDA_RUNTIME_H

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define FF_CUDA_EMULATION 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define FF_VECTOR(type, base, n, ...)                                          \
  struct alignas(sizeof(base) * (n == 3 ? 1 : n)) type {                       \
    base __VA_ARGS__;                                                          \
  };                                                                           \
  template <class... A>                                                        \
  inline type make_##type(A... a) {                                            \
    static_assert(sizeof...(A) == n, #type " takes another number of values"); \
    return type{static_cast<base>(a)...};                                      \
  }
FF_VECTOR(float2, float, 2, x, y)
FF_VECTOR(float3, float, 3, x, y, z)
FF_VECTOR(float4, float, 4, x, y, z, w)
FF_VECTOR(int2, int, 2, x, y)
FF_VECTOR(int4, int, 4, x, y, z, w)
FF_VECTOR(uint2, unsigned, 2, x, y)
FF_VECTOR(uint3, unsigned, 3, x, y, z)
FF_VECTOR(uint4, unsigned, 4, x, y, z, w)
FF_VECTOR(ushort2, unsigned short, 2, x, y)
FF_VECTOR(ushort4, unsigned short, 4, x, y, z, w)
FF_VECTOR(uchar4, unsigned char, 4, x, y, z, w)
#undef FF_VECTOR

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
using cudaStream_t = struct CUstream_st *;

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream = nullptr);

namespace emulation {

// Where a kernel's text calls a synchronising function: threads must meet at the same place.
struct Site {
  const char *what, *file;
  int line;
};

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

// All threads of the block. Returns the number of threads with a true predicate.
int barrier(Site site, bool predicate);

// All lanes of `mask`. The last to arrive runs `complete` on everyone's `payload`, indexed by lane. `orders`: accesses
// before the meeting happen before those behind it.
void meet(Site site, unsigned mask, void *payload, void (*complete)(void **payloads, unsigned mask),
          bool orders = true);

void *shared_variable(const void *key, const char *name, size_t bytes);
void *dynamic_shared_memory();
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

enum class Kind { read, write, atomic };
void touch(const volatile void *pointer, size_t bytes, Kind kind, const void *pc);
// A read of a row of a matrix, which must lie in shared memory at a multiple of its size.
void touch_shared(const void *pointer, size_t bytes, const void *pc);

cudaError_t allow_dynamic_shared_memory(const void *kernel, int bytes);
void execute(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, void (*run)(void *),
             void *body);

struct Launch {
  const char *name;
  dim3 grid, block;
  size_t shared = 0;
  cudaStream_t stream = nullptr;
  Launch(const char *name, dim3 grid, dim3 block, size_t shared = 0, cudaStream_t stream = nullptr)
      : name(name), grid(grid), block(block), shared(shared), stream(stream) {}

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), const A &...arguments) const {
    std::tuple<P...> values(static_cast<P>(arguments)...);
    auto body = [&] { std::apply(kernel, values); };
    const auto run = [](void *pointer) { (*static_cast<decltype(body) *>(pointer))(); };
    execute(name, reinterpret_cast<const void *>(kernel), grid, block, shared, run, &body);
  }
};

// A `__shared__` variable. Its key is the type of the lambda at its declaration: one per instantiation of a template.
template <class T, class Key>
T &shared(const char *name, Key) {
  static const char key = 0;
  return *static_cast<T *>(shared_variable(&key, name, sizeof(T)));
}

template <class T>
struct Shuffle {
  T value;
  int source;
  T result;

  static void complete(void **payloads, unsigned mask) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      auto &mine = *static_cast<Shuffle *>(payloads[lane]);
      if (!(mask >> mine.source & 1))
        fail("a shuffle of lane %d reads lane %d, which its mask leaves out", lane, mine.source);
      mine.result = static_cast<Shuffle *>(payloads[mine.source])->value;
    }
  }
};

template <class T>
T shuffle(Site site, unsigned mask, T value, int source) {
  Shuffle<T> mine{value, source, value};
  meet(site, mask, &mine, Shuffle<T>::complete);
  return mine.result;
}

struct Vote {
  bool predicate;
  unsigned result;

  static void complete(void **payloads, unsigned mask) {
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) ballot |= unsigned(static_cast<Vote *>(payloads[lane])->predicate) << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) static_cast<Vote *>(payloads[lane])->result = ballot;
  }
};

inline unsigned vote(Site site, unsigned mask, bool predicate) {
  Vote mine{predicate, 0};
  meet(site, mask, &mine, Vote::complete);
  return mine.result;
}

inline int lane() {
  const dim3 t = thread_index(), b = block_size();
  return int((t.x + b.x * (t.y + b.y * t.z)) % 32);
}

inline int segment(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("a shuffle's width is %d, not a power of two up to 32", width);
  return lane() & ~(width - 1);
}

template <class T>
T shuffle_up(Site site, unsigned mask, T value, unsigned delta, int width) {
  const int source = lane() - int(delta);
  return shuffle(site, mask, value, source < segment(width) ? lane() : source);
}

template <class T>
T shuffle_down(Site site, unsigned mask, T value, unsigned delta, int width) {
  const int source = lane() + int(delta);
  return shuffle(site, mask, value, source >= segment(width) + width ? lane() : source);
}

template <class T>
T shuffle_xor(Site site, unsigned mask, T value, int bits, int width) {
  const int source = lane() ^ bits;
  return shuffle(site, mask, value, source >= segment(width) + width ? lane() : source);
}

template <class T>
T shuffle_from(Site site, unsigned mask, T value, int source, int width) {
  return shuffle(site, mask, value, segment(width) + (source & (width - 1)));
}

template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T atomic(T *pointer, F next) {
  touch(pointer, sizeof(T), Kind::atomic, __builtin_return_address(0));
  const T before = *pointer;
  *pointer = next(before);
  return before;
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())
constexpr int warpSize = 32;

#define FF_SITE(what) (::emulation::Site{what, __FILE__, __LINE__})
#define __syncthreads() ((void)::emulation::barrier(FF_SITE("__syncthreads"), false))
#define __syncthreads_or(p) (::emulation::barrier(FF_SITE("__syncthreads_or"), p) > 0)
#define __syncthreads_count(p) (::emulation::barrier(FF_SITE("__syncthreads_count"), p))
#define FF_FIRST(first, ...) first
#define __syncwarp(...) \
  ((void)::emulation::vote(FF_SITE("__syncwarp"), FF_FIRST(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu), false))
#define __ballot_sync(mask, p) (::emulation::vote(FF_SITE("__ballot_sync"), mask, p))
#define __any_sync(mask, p) (::emulation::vote(FF_SITE("__any_sync"), mask, p) != 0)
#define __all_sync(mask, p) (::emulation::vote(FF_SITE("__all_sync"), mask, !(p)) == 0)
#define FF_WIDTH(width, ...) width
#define __shfl_sync(mask, value, source, ...) \
  (::emulation::shuffle_from(FF_SITE("__shfl_sync"), mask, value, source, FF_WIDTH(__VA_ARGS__ __VA_OPT__(, ) 32)))
#define __shfl_up_sync(mask, value, delta, ...) \
  (::emulation::shuffle_up(FF_SITE("__shfl_up_sync"), mask, value, delta, FF_WIDTH(__VA_ARGS__ __VA_OPT__(, ) 32)))
#define __shfl_down_sync(mask, value, delta, ...) \
  (::emulation::shuffle_down(FF_SITE("__shfl_down_sync"), mask, value, delta, FF_WIDTH(__VA_ARGS__ __VA_OPT__(, ) 32)))
#define __shfl_xor_sync(mask, value, bits, ...) \
  (::emulation::shuffle_xor(FF_SITE("__shfl_xor_sync"), mask, value, bits, FF_WIDTH(__VA_ARGS__ __VA_OPT__(, ) 32)))

template <class F>
cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute, int bytes) {
  return emulation::allow_dynamic_shared_memory(reinterpret_cast<const void *>(kernel), bytes);
}

template <class T>
T atomicAdd(T *pointer, std::common_type_t<T> value) {
  return emulation::atomic(pointer, [=](T before) { return T(before + value); });
}
template <class T>
T atomicMax(T *pointer, std::common_type_t<T> value) {
  return emulation::atomic(pointer, [=](T before) { return before < value ? value : before; });
}
template <class T>
T atomicMin(T *pointer, std::common_type_t<T> value) {
  return emulation::atomic(pointer, [=](T before) { return value < before ? value : before; });
}
template <class T>
T atomicOr(T *pointer, std::common_type_t<T> value) {
  return emulation::atomic(pointer, [=](T before) { return T(before | value); });
}
template <class T>
T atomicExch(T *pointer, std::common_type_t<T> value) {
  return emulation::atomic(pointer, [=](T) { return value; });
}
template <class T>
T atomicCAS(T *pointer, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return emulation::atomic(pointer, [=](T before) { return before == expected ? value : before; });
}

using std::max;
using std::min;

template <class T>
T __ldg(const T *pointer) {
  return *pointer;
}
template <class To, class From>
inline To ff_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline unsigned __float_as_uint(float v) { return ff_bits<unsigned>(v); }
inline int __float_as_int(float v) { return ff_bits<int>(v); }
inline float __uint_as_float(unsigned v) { return ff_bits<float>(v); }
inline float __int_as_float(int v) { return ff_bits<float>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

#endif
