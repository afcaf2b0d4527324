// Python's view of ff_api.h. The kernels live in shared libraries of their own, one per instruction set and one for
// CUDA; load() opens one and fills the slots of its entries, so no code of a wider instruction set is ever mapped on a
// machine that lacks it. Pointers travel as integers; the GIL is released around every call.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "buffers.h"
#include "ff_api.h"
#include "program.h"

namespace py = pybind11;

#define FF_CPU_ENTRIES(X)           \
  X(ff_cpu_channel_shuffle)         \
  X(ff_cpu_decode)                  \
  X(ff_cpu_detection_workspace)     \
  X(ff_cpu_nms)                     \
  X(ff_cpu_detect)                  \
  X(ff_cpu_preprocess_workspace)    \
  X(ff_cpu_preprocess)              \
  X(ff_cpu_batch_norm_coefficients) \
  X(ff_cpu_batch_norm_gradients)    \
  X(ff_cpu_batch_norm_update)       \
  X(ff_cpu_batch_norm_workspace)    \
  X(ff_cpu_batch_norm_apply)        \
  X(ff_cpu_batch_norm_reduce)       \
  X(ff_cpu_copy_rows)               \
  X(ff_cpu_from_double)             \
  X(ff_cpu_conv_workspace)          \
  X(ff_cpu_multi_head_scatter)      \
  X(ff_cpu_multi_head_gather)       \
  X(ff_cpu_ssh_grouped_weight)      \
  X(ff_cpu_ssh_grouped_unpack)      \
  X(ff_cpu_ssh_grouped_workspace)   \
  X(ff_cpu_ssh_grouped_join)        \
  X(ff_cpu_ssh_grouped_split)       \
  X(ff_cpu_conv_forward)            \
  X(ff_cpu_conv_backward)           \
  X(ff_cpu_engine_run)              \
  X(ff_cpu_engine_fields)           \
  X(ff_cpu_engine_lanes)            \
  X(ff_cpu_engine_bf16)             \
  X(ff_cpu_engine_peak)             \
  X(ff_cpu_deform_conv_workspace)   \
  X(ff_cpu_deform_conv_forward)     \
  X(ff_cpu_deform_conv_backward)    \
  X(ff_cpu_bifpn_fuse)              \
  X(ff_cpu_bifpn_fuse_workspace)    \
  X(ff_cpu_bifpn_fuse_backward)     \
  X(ff_cpu_cbam_workspace)          \
  X(ff_cpu_cbam_maps)               \
  X(ff_cpu_cbam_apply)              \
  X(ff_cpu_cbam_gate_workspace)     \
  X(ff_cpu_cbam_gate)               \
  X(ff_cpu_cbam_gate_gradient)      \
  X(ff_cpu_cbam_spatial_gradient)   \
  X(ff_cpu_cbam_backward)

#define FF_CUDA_ENTRIES(X)                  \
  X(ff_cuda_channel_shuffle)                \
  X(ff_cuda_decode)                         \
  X(ff_cuda_detection_workspace)            \
  X(ff_cuda_nms)                            \
  X(ff_cuda_detect)                         \
  X(ff_cuda_preprocess)                     \
  X(ff_cuda_crop_resize)                    \
  X(ff_cuda_batch_norm_coefficients)        \
  X(ff_cuda_batch_norm_workspace)           \
  X(ff_cuda_batch_norm_statistics)          \
  X(ff_cuda_batch_norm_apply)               \
  X(ff_cuda_batch_norm_reduce)              \
  X(ff_cuda_batch_norm_backward)            \
  X(ff_cuda_conv_forward)                   \
  X(ff_cuda_conv_input_gradient)            \
  X(ff_cuda_conv_weight_gradient_workspace) \
  X(ff_cuda_conv_weight_gradient)           \
  X(ff_cuda_deform_conv_forward)            \
  X(ff_cuda_deform_conv_sample_gradient)    \
  X(ff_cuda_deform_conv_weight_workspace)   \
  X(ff_cuda_deform_conv_weight_gradient)    \
  X(ff_cuda_cbam_workspace)                 \
  X(ff_cuda_cbam_maps)                      \
  X(ff_cuda_cbam_apply)                     \
  X(ff_cuda_cbam_spatial_gradient)          \
  X(ff_cuda_cbam_backward)                  \
  X(ff_cuda_bifpn_fuse)                     \
  X(ff_cuda_bifpn_fuse_workspace)           \
  X(ff_cuda_bifpn_fuse_backward)            \
  X(ff_cuda_seam_join)                      \
  X(ff_cuda_seam_split)                     \
  X(ff_cuda_ssh_grouped_eval)               \
  X(ff_cuda_depthwise_separable_eval)       \
  X(ff_cuda_multi_head_scatter)             \
  X(ff_cuda_multi_head_gather)              \
  X(ff_cuda_device_count)                   \
  X(ff_cuda_error_string)

namespace {

template <class T>
using FromPython = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T to_native(FromPython<T> value) {
  if constexpr (std::is_pointer_v<T>)
    return reinterpret_cast<T>(value);
  else
    return value;
}

template <class R, class... A>
void define(py::module_ &m, const char *name, R (**slot)(A...)) {
  m.def(name, [slot, name](FromPython<A>... args) -> R {
    if (*slot == nullptr) throw std::runtime_error(std::string(name) + ": its library is not loaded");
    py::gil_scoped_release release;
    return (*slot)(to_native<A>(args)...);
  });
}

#define FF_SLOT(entry) decltype(&entry) slot_##entry = nullptr;
FF_CPU_ENTRIES(FF_SLOT)
FF_CUDA_ENTRIES(FF_SLOT)

void *open_library(const std::string &path) {
  void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  return library;
}

template <class F>
F find(void *library, const char *name, const std::string &path) {
  void *symbol = dlsym(library, name);
  if (symbol == nullptr) throw std::runtime_error(path + " has no entry " + name + "; rebuild the package");
  return reinterpret_cast<F>(symbol);
}

// Entries that return an error code can be part of a program.
template <auto *slot, class R, class... A>
void make_known(const char *name, R (*)(A...)) {
  if constexpr (std::is_same_v<R, int>) ff::Program::know<slot>(name);
}

#define FF_FIND(entry) auto found_##entry = find<decltype(&entry)>(library, #entry, path);
#define FF_FILL(entry) slot_##entry = found_##entry;

void load_cpu(const std::string &path) {
  void *library = open_library(path);
  FF_CPU_ENTRIES(FF_FIND)
  FF_CPU_ENTRIES(FF_FILL)
}

void load_cuda(const std::string &path) {
  void *library = open_library(path);
  FF_CUDA_ENTRIES(FF_FIND)
  FF_CUDA_ENTRIES(FF_FILL)
}

#if defined(__x86_64__) && defined(__linux__)
// Whether AMX tiles and AMX-BF16 are there and the kernel lets this process use them; asks it to.
bool amx_usable() {
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;  // leaf 7, edx: AMX-BF16 and AMX-TILE
  constexpr unsigned kXgetbv = 1u << 27;          // leaf 1, ecx: OSXSAVE
  constexpr unsigned kTileState = 3u << 17;       // XCR0: XTILECFG and XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAmx) != kAmx) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXgetbv)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool amx_usable() { return false; }
#endif

// Instruction sets this processor and operating system can run, narrowest first; names as in setup.py.
py::list cpu_instruction_sets() {
  py::list sets;
  sets.append("generic");
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2) sets.append("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) sets.append("avx512");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16) sets.append("avx512_bf16");
  if (avx512_bf16 && amx_usable()) sets.append("amx");
#endif
  return sets;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.def("load_cpu", &load_cpu, py::arg("path"));
  m.def("load_cuda", &load_cuda, py::arg("path"));
  m.def("cpu_instruction_sets", &cpu_instruction_sets);
  m.def("buffer_nhwc", &ff::buffer_nhwc);
  m.def("buffer_bytes", [] { return std::make_pair(ff::Buffers::instance().used(), ff::Buffers::instance().kept()); });
  m.def("release_buffers", [] { ff::Buffers::instance().clear(); });
#define FF_DEFINE(entry) define(m, #entry, &slot_##entry);
  FF_CPU_ENTRIES(FF_DEFINE)
  FF_CUDA_ENTRIES(FF_DEFINE)

#define FF_KNOW(entry) make_known<&slot_##entry>(#entry, decltype (&entry)(nullptr));
  FF_CPU_ENTRIES(FF_KNOW)
  py::class_<ff::Program>(m, "Program")
      .def(py::init<>())
      .def("add", [](ff::Program &self, const std::string &name, const py::args &values) { self.add(name, values); })
      .def("run", &ff::Program::run);
}
