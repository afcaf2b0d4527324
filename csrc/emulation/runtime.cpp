// Runs the blocks of a launch one after another, in an order drawn from a seed; a block's threads are fibres of one
// operating system thread, also in drawn order. What is checked, each fault ending the launch with
// cudaErrorLaunchFailure and a sentence from cudaGetErrorString:
//   - barriers and warp functions that not all threads, or all lanes of the mask, reach at the same place;
//   - data races, exactly (happens-before): two accesses to one byte of shared or global memory, one of them a write
//   and
//     not both atomic, by threads that no barrier and no warp function orders, or by different blocks;
//   - shared memory read before the block wrote it; accesses outside a shared variable;
//   - misaligned accesses, array indices out of range, signed overflow, shifts and divisions that C++ leaves undefined;
//   - accesses outside live allocations, where the process has AddressSanitizer's runtime (LD_PRELOAD=libasan.so);
//   - launches that no device takes.
// The compiler reports the accesses: kernels are compiled with -fsanitize=thread,alignment,bounds,..., and this file,
// in place of the sanitizers' runtimes, defines the functions that the instrumented code calls.
#include "cuda_runtime.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

extern "C" void *__asan_region_is_poisoned(void *begin, size_t bytes) __attribute__((weak));

namespace {

using emulation::Kind;
using emulation::Site;

constexpr size_t kMaxThreads = 1024, kStackBytes = 128 << 10;
constexpr size_t kMaxStaticShared = 48 << 10, kMaxShared = 227 << 10, kRedzone = 128;
constexpr size_t kArenaBytes = 1 << 20;

// ---- fibres

#if defined(__x86_64__)
struct Context {
  void *stack_pointer = nullptr;
};

// Saves the registers that a call must preserve, changes stacks, restores them.
extern "C" void ff_emulation_switch(void **save, void *load);
asm(R"(
.text
.hidden ff_emulation_switch
.globl ff_emulation_switch
.type ff_emulation_switch, @function
ff_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ff_emulation_switch, .-ff_emulation_switch
)");

void switch_context(Context &from, Context &to) { ff_emulation_switch(&from.stack_pointer, to.stack_pointer); }

void make_context(Context &context, char *stack, void (*entry)()) {
  auto *top = reinterpret_cast<void **>(stack + kStackBytes);
  top[-1] = nullptr;  // the ABI wants the stack 8 bytes off a multiple of 16 at a function's entry
  top[-2] = reinterpret_cast<void *>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 8;
}
#else
struct Context {
  ucontext_t context;
};

void switch_context(Context &from, Context &to) { swapcontext(&from.context, &to.context); }

void make_context(Context &context, char *stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStackBytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

enum class State { ready, at_barrier, at_meeting, exited };

struct Thread {
  Context context;
  unsigned linear;
  dim3 index;
  State state;
  Site site;
  bool predicate;
  unsigned mask;
  void *payload;
  void (*complete)(void **, unsigned);
  uint32_t seen[32];  // per lane of the warp: its accesses up to this time happened before
};

// ---- accesses

struct Access {
  uint32_t block, time;
  const void *pc;
  uint16_t thread;
  uint8_t bytes;
  bool present, atomic;
};

struct Cell {  // of one byte: its last write and up to two reads since by threads that are not ordered
  uint64_t launch;
  Access write, reads[2];
};

constexpr size_t kPageBytes = 512;
struct Page {
  Cell cells[kPageBytes];
};

struct SharedVariable {
  const void *key;
  const char *name;
  size_t begin, bytes;
};

struct Machine {
  std::mutex mutex;
  Context scheduler;
  std::vector<Thread> threads;
  std::vector<unsigned> ready;
  char *stacks = nullptr;
  char *arena = nullptr;
  std::vector<uint8_t> arena_state;  // 0: outside every variable, 1: not written yet, 2: written
  std::vector<SharedVariable> variables;
  size_t arena_used, static_bytes, dynamic_bytes, dynamic_begin, most_shared;

  const char *kernel = "";
  dim3 grid, block, block_index;
  uint32_t block_linear = 0;
  uint64_t launch = 0;
  uint32_t now, last_barrier;
  unsigned exited;
  int barrier_count;
  void (*run)(void *);
  void *body;

  uint64_t random = 0;
  bool failed = false;
  std::string message, launched;
  cudaError_t last_error = cudaSuccess;
  std::unordered_map<const void *, size_t> dynamic_limit;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  uintptr_t cached_number = ~uintptr_t(0);
  Cell *cached_page = nullptr;

  unsigned draw(unsigned n) {  // splitmix64
    uint64_t z = (random += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return unsigned((z ^ (z >> 31)) >> 32) % n;
  }
};

Machine &machine() {
  static Machine *m = new Machine;
  return *m;
}

thread_local Thread *current = nullptr;

std::string at(unsigned linear, dim3 size) {
  char text[64];
  snprintf(text, sizeof text, "(%u,%u,%u)", linear % size.x, linear / size.x % size.y, linear / size.x / size.y);
  return text;
}

// "file:line" of a return address, from the library's debug information.
std::string where(const void *pc) {
  Dl_info info;
  if (dladdr(pc, &info) == 0 || info.dli_fname == nullptr) return "an unknown place";
  const size_t offset = static_cast<const char *>(pc) - 1 - static_cast<const char *>(info.dli_fbase);
  char command[4096];
  snprintf(command, sizeof command, "LD_PRELOAD= addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  std::string line;
  if (FILE *pipe = popen(command, "r")) {
    char text[1024];
    if (fgets(text, sizeof text, pipe)) line = text;
    pclose(pipe);
  }
  line.erase(std::min(line.size(), line.find_first_of(" \n")));
  if (line.rfind("./", 0) == 0) line.erase(0, 2);
  snprintf(command, sizeof command, "%s+0x%zx", info.dli_fname, offset);
  return line.empty() || line[0] == '?' ? command : line;
}

std::string place(Site site) { return std::string(site.what) + " at " + site.file + ":" + std::to_string(site.line); }

void record_failure(const std::string &text) {
  Machine &m = machine();
  if (m.failed) return;
  m.failed = true;
  m.message = std::string(m.kernel) + ", block " + at(m.block_linear, m.grid) + ": " + text;
}

[[noreturn]] void stop(const std::string &text) {
  if (current == nullptr) {
    fprintf(stderr, "CUDA emulation: %s\n", text.c_str());
    abort();
  }
  record_failure("thread " + at(current->linear, machine().block) + " " + text);
  Thread *self = current;
  switch_context(self->context, machine().scheduler);
  abort();
}

void yield() { switch_context(current->context, machine().scheduler); }

void enter() {
  Machine &m = machine();
  m.run(m.body);
  current->state = State::exited;
  ++m.exited;
  yield();
}

// A new variable of the block, between bytes that no access may touch. Returns its offset.
size_t place_variable(const void *key, const char *name, size_t bytes) {
  Machine &m = machine();
  const size_t begin = (m.arena_used + kRedzone + 127) / 128 * 128;
  m.variables.push_back({key, name, begin, bytes});
  m.arena_used = begin + bytes;
  memset(&m.arena_state[begin], 1, bytes);
  return begin;
}

// ---- the race detector

Cell *cells(uintptr_t address) {
  Machine &m = machine();
  const uintptr_t number = address / kPageBytes;
  if (number != m.cached_number) {
    auto &page = m.pages[number];
    if (!page) page = std::make_unique<Page>();
    m.cached_number = number;
    m.cached_page = page->cells;
  }
  return m.cached_page + address % kPageBytes;
}

bool ordered(const Access &before) {
  const Machine &m = machine();
  if (before.block != m.block_linear) return false;
  if (before.thread == current->linear || before.time <= m.last_barrier) return true;
  return before.thread / 32 == current->linear / 32 && before.time <= current->seen[before.thread % 32];
}

std::string memory_name(uintptr_t address) {
  const Machine &m = machine();
  const size_t offset = address - reinterpret_cast<uintptr_t>(m.arena);
  char text[160];
  if (offset >= kArenaBytes) {
    snprintf(text, sizeof text, "global memory %#zx", size_t(address));
    return text;
  }
  for (const SharedVariable &v : m.variables)
    if (offset + kRedzone >= v.begin && offset < v.begin + v.bytes + kRedzone) {
      snprintf(text, sizeof text, "byte %ld of shared %s (%zu bytes)", long(offset) - long(v.begin), v.name, v.bytes);
      return text;
    }
  return "shared memory that no variable has";
}

const char *verb(Kind kind) {
  return kind == Kind::read ? "reads" : kind == Kind::write ? "writes" : "atomically updates";
}

void race(uintptr_t address, Kind kind, const void *pc, const Access &before, const char *what) {
  const Machine &m = machine();
  const bool other_block = before.block != m.block_linear;
  const std::string other =
      (other_block ? "block " + at(before.block, m.grid) + " " : "") + "thread " + at(before.thread, m.block);
  stop(std::string(verb(kind)) + " " + memory_name(address) + " at " + where(pc) + ", which " + other + " " + what +
       " at " + where(before.pc) + (other_block ? "; blocks have no order" : "; no barrier orders the two"));
}

void check(uintptr_t address, bool in_shared, Kind kind, const void *pc, uint8_t bytes) {
  const Machine &m = machine();
  Cell &cell = *cells(address);
  if (cell.launch != m.launch ||
      (in_shared && (cell.write.present ? cell.write : cell.reads[0]).block != m.block_linear)) {
    cell.launch = m.launch;
    cell.write.present = cell.reads[0].present = cell.reads[1].present = false;
  }
  const bool atomic = kind == Kind::atomic;
  if (cell.write.present && !(atomic && cell.write.atomic) && !ordered(cell.write))
    race(address, kind, pc, cell.write, "wrote");
  const Access access{m.block_linear, m.now, pc, uint16_t(current->linear), bytes, true, atomic};
  if (kind == Kind::read) {
    if (!cell.reads[0].present || ordered(cell.reads[0]))
      cell.reads[0] = access;
    else if (!cell.reads[1].present || ordered(cell.reads[1]))
      cell.reads[1] = access;
    return;
  }
  for (Access &read : cell.reads) {
    if (read.present && !ordered(read)) race(address, kind, pc, read, "read");
    read.present = false;
  }
  cell.write = access;
}

}  // namespace

namespace emulation {

dim3 thread_index() { return current->index; }
dim3 block_index() { return machine().block_index; }
dim3 block_size() { return machine().block; }
dim3 grid_size() { return machine().grid; }

void fail(const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  stop(std::string("fails: ") + text);
}

int barrier(Site site, bool predicate) {
  current->state = State::at_barrier;
  current->site = site;
  current->predicate = predicate;
  yield();
  return machine().barrier_count;
}

void meet(Site site, unsigned mask, void *payload, void (*complete)(void **, unsigned), bool orders) {
  Machine &m = machine();
  const unsigned warp = current->linear / 32 * 32;
  const unsigned lanes = std::min<unsigned>(32, unsigned(m.threads.size()) - warp);
  if (lanes < 32) {
    // A full mask names lanes that a last, partial warp does not have; they count as exited.
    if (mask == 0xffffffffu) mask = (1u << lanes) - 1;
    if (mask >> lanes) stop("calls " + place(site) + " with a mask that names lanes beyond the block");
  }
  if (!(mask >> (current->linear % 32) & 1)) stop("calls " + place(site) + " but its mask leaves the caller out");
  current->state = State::at_meeting;
  current->site = site;
  current->mask = mask;
  current->payload = payload;
  current->complete = complete;

  void *payloads[32] = {};
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread &other = m.threads[warp + lane];
    const bool here = other.state == State::at_meeting && other.mask == mask && other.complete == complete &&
                      other.site.line == site.line && strcmp(other.site.file, site.file) == 0;
    if (!here) {
      yield();
      return;
    }
    payloads[lane] = other.payload;
  }
  complete(payloads, mask);
  uint32_t seen[32] = {};
  if (orders) {
    for (unsigned lane = 0; lane < lanes; ++lane)
      if (mask >> lane & 1)
        for (unsigned i = 0; i < 32; ++i) seen[i] = std::max(seen[i], m.threads[warp + lane].seen[i]);
    for (unsigned lane = 0; lane < lanes; ++lane)
      if (mask >> lane & 1) seen[lane] = m.now;
    ++m.now;
  }
  for (unsigned lane = 0; lane < lanes; ++lane)
    if (mask >> lane & 1) {
      Thread &other = m.threads[warp + lane];
      if (orders) memcpy(other.seen, seen, sizeof seen);
      other.state = State::ready;
      m.ready.push_back(warp + lane);
    }
  yield();
}

void *shared_variable(const void *key, const char *name, size_t bytes) {
  Machine &m = machine();
  for (const SharedVariable &v : m.variables)
    if (v.key == key) return m.arena + v.begin;
  m.static_bytes += bytes;
  if (m.static_bytes > kMaxStaticShared) fail("%zu bytes of static shared memory; 48 KiB are allowed", m.static_bytes);
  if (m.static_bytes + m.dynamic_bytes > m.most_shared)
    fail("%zu bytes of static and %zu of dynamic shared memory; %zu are allowed together", m.static_bytes,
         m.dynamic_bytes, m.most_shared);
  return m.arena + place_variable(key, name, bytes);
}

void *dynamic_shared_memory() { return machine().arena + machine().dynamic_begin; }

void touch(const volatile void *pointer, size_t bytes, Kind kind, const void *pc) {
  if (current == nullptr || bytes == 0) return;
  Machine &m = machine();
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address - reinterpret_cast<uintptr_t>(m.stacks) < kMaxThreads * kStackBytes) return;
  const size_t offset = address - reinterpret_cast<uintptr_t>(m.arena);
  const bool in_shared = offset < kArenaBytes;
  if (in_shared) {
    for (size_t i = 0; i < bytes; ++i) {
      uint8_t &state = m.arena_state[std::min(offset + i, kArenaBytes - 1)];
      if (state == 0)
        stop(std::string(verb(kind)) + " " + memory_name(address + i) + " at " + where(pc) + ", out of bounds");
      if (state == 1 && kind != Kind::write)
        stop(std::string(verb(kind)) + " " + memory_name(address + i) + " at " + where(pc) + ", which nothing wrote");
      state = 2;
    }
  } else if (address < 4096) {
    stop(std::string(verb(kind)) + " a null pointer at " + where(pc));
  } else if (__asan_region_is_poisoned != nullptr &&
             __asan_region_is_poisoned(const_cast<void *>(const_cast<const void *>(pointer)), bytes) != nullptr) {
    stop(std::string(verb(kind)) + " " + std::to_string(bytes) + " bytes of " + memory_name(address) + " at " +
         where(pc) + ", outside every allocation");
  }
  for (size_t i = 0; i < bytes; ++i) check(address + i, in_shared, kind, pc, uint8_t(bytes));
}

void touch_shared(const void *pointer, size_t bytes, const void *pc) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const size_t offset = address - reinterpret_cast<uintptr_t>(machine().arena);
  if (offset >= kArenaBytes) stop("reads " + memory_name(address) + " as shared memory at " + where(pc));
  if (offset % bytes != 0)
    stop("reads " + memory_name(address) + " at " + where(pc) + ", not at a multiple of " + std::to_string(bytes));
  touch(pointer, bytes, Kind::read, pc);
}

cudaError_t allow_dynamic_shared_memory(const void *kernel, int bytes) {
  Machine &m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  if (bytes < 0 || size_t(bytes) > kMaxShared) return m.last_error = cudaErrorInvalidValue;
  m.dynamic_limit[kernel] = size_t(bytes);
  return cudaSuccess;
}

}  // namespace emulation

namespace {

// Called when no thread can go on: opens the barrier if all are there, otherwise says who is missing.
bool release_barrier() {
  Machine &m = machine();
  const Thread *first = nullptr;
  for (const Thread &t : m.threads)
    if (t.state == State::at_meeting) {
      std::string missing;
      for (unsigned lane = 0; lane < 32; ++lane)
        if (t.mask >> lane & 1) {
          const Thread &other = m.threads[t.linear / 32 * 32 + lane];
          if (other.state == State::at_meeting && other.site.line == t.site.line && other.mask == t.mask) continue;
          missing = "lane " + std::to_string(lane) +
                    (other.state == State::exited ? " has exited" : " waits in " + place(other.site)) +
                    (other.state == State::at_meeting && other.mask != t.mask ? " with another mask" : "");
          break;
        }
      record_failure("thread " + at(t.linear, m.block) + " waits in " + place(t.site) + ", but " + missing);
      return false;
    }
  int count = 0;
  for (const Thread &t : m.threads)
    if (t.state == State::at_barrier) {
      if (first == nullptr) first = &t;
      if (m.exited > 0) {
        record_failure("divergent barrier: thread " + at(t.linear, m.block) + " waits in " + place(t.site) + ", but " +
                       std::to_string(m.exited) + " threads of the block have exited");
        return false;
      }
      if (t.site.line != first->site.line || strcmp(t.site.file, first->site.file) != 0) {
        record_failure("divergent barrier: thread " + at(first->linear, m.block) + " waits in " + place(first->site) +
                       ", thread " + at(t.linear, m.block) + " in " + place(t.site));
        return false;
      }
      count += t.predicate;
    }
  m.barrier_count = count;
  m.last_barrier = m.now++;
  for (Thread &t : m.threads) {
    t.state = State::ready;
    m.ready.push_back(t.linear);
  }
  return true;
}

void run_block() {
  Machine &m = machine();
  memset(m.arena, 0xff, std::max(m.arena_used, size_t(4096)));
  std::fill(m.arena_state.begin(), m.arena_state.begin() + std::min(kArenaBytes, m.arena_used + 1), 0);
  m.variables.clear();
  m.arena_used = m.static_bytes = 0;
  m.dynamic_begin = place_variable(nullptr, "dynamic memory", m.dynamic_bytes);
  m.now = 1;
  m.last_barrier = m.exited = 0;
  m.ready.clear();
  for (Thread &t : m.threads) {
    const dim3 b = m.block;
    t.linear = unsigned(&t - m.threads.data());
    t.index = dim3(t.linear % b.x, t.linear / b.x % b.y, t.linear / b.x / b.y);
    t.state = State::ready;
    memset(t.seen, 0, sizeof t.seen);
    make_context(t.context, m.stacks + t.linear * kStackBytes, enter);
    m.ready.push_back(t.linear);
  }
  do {
    while (!m.ready.empty() && !m.failed) {
      std::swap(m.ready[m.draw(unsigned(m.ready.size()))], m.ready.back());
      current = &m.threads[m.ready.back()];
      m.ready.pop_back();
      switch_context(m.scheduler, current->context);
      current = nullptr;
    }
  } while (!m.failed && m.exited < m.threads.size() && release_barrier());
}

}  // namespace

namespace emulation {

void execute(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, void (*run)(void *),
             void *body) {
  Machine &m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
  const auto allowed = m.dynamic_limit.find(kernel);
  const bool fits = shared <= (allowed == m.dynamic_limit.end() ? kMaxStaticShared : allowed->second);
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || blocks > UINT32_MAX || !fits) {
    m.last_error = fits ? cudaErrorInvalidConfiguration : cudaErrorInvalidValue;
    return;
  }
  if (m.stacks == nullptr) {
    const auto map = [](size_t bytes) {
      void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) abort();
      return static_cast<char *>(memory);
    };
    m.stacks = map(kMaxThreads * kStackBytes);
    m.arena = map(kArenaBytes);
    m.arena_state.resize(kArenaBytes);
    m.arena_used = kArenaBytes;
  }
  if (m.pages.size() > 16384) {
    m.pages.clear();
    m.cached_number = ~uintptr_t(0);
  }
  const char *seed = getenv("FF_EMULATION_SEED");
  m.random = (seed ? strtoull(seed, nullptr, 10) : 0) * 0x2545f4914f6cdd1dull + ++m.launch;
  m.kernel = name;
  if (m.launched.size() < 1 << 20) m.launched += std::string(name) + "\n";
  m.grid = grid;
  m.block = block;
  m.dynamic_bytes = shared;
  m.most_shared = allowed == m.dynamic_limit.end() ? kMaxStaticShared : kMaxShared;
  m.run = run;
  m.body = body;
  m.threads.resize(threads);
  m.failed = false;
  std::vector<uint32_t> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = uint32_t(i);
  for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[m.draw(unsigned(i))]);
  for (uint32_t linear : order) {
    m.block_linear = linear;
    m.block_index = dim3(linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y);
    run_block();
    if (m.failed) break;
  }
  if (m.failed) m.last_error = cudaErrorLaunchFailure;
}

}  // namespace emulation

// For tests: names of the kernels that were launched since the last call, one a line.
extern "C" __attribute__((visibility("default"))) const char *ff_emulation_launched() {
  static std::string names;
  names.clear();
  names.swap(machine().launched);
  return names.c_str();
}

// ---- the CUDA runtime's functions

cudaError_t cudaPeekAtLastError() { return machine().last_error; }

cudaError_t cudaGetLastError() {
  const cudaError_t error = machine().last_error;
  machine().last_error = cudaSuccess;
  return error;
}

const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorLaunchFailure:
      return machine().message.c_str();
  }
  return "unknown error";
}

cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 3;  // few, so that persistent kernels loop over several tiles even at the tests' sizes
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(kMaxShared);
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t) {
  memset(pointer, value, bytes);
  return cudaSuccess;
}

// ---- what instrumented code calls

#define FF_HOOK extern "C" __attribute__((visibility("hidden"), used)) void
#define FF_PC __builtin_return_address(0)
#define FF_ACCESS(n)                                                                       \
  FF_HOOK __tsan_read##n(void *p) { emulation::touch(p, n, Kind::read, FF_PC); }           \
  FF_HOOK __tsan_write##n(void *p) { emulation::touch(p, n, Kind::write, FF_PC); }         \
  FF_HOOK __tsan_unaligned_read##n(void *p) { emulation::touch(p, n, Kind::read, FF_PC); } \
  FF_HOOK __tsan_unaligned_write##n(void *p) { emulation::touch(p, n, Kind::write, FF_PC); }
FF_ACCESS(1)
FF_ACCESS(2)
FF_ACCESS(4)
FF_ACCESS(8)
FF_ACCESS(16)
FF_HOOK __tsan_read_range(void *p, size_t bytes) { emulation::touch(p, bytes, Kind::read, FF_PC); }
FF_HOOK __tsan_write_range(void *p, size_t bytes) { emulation::touch(p, bytes, Kind::write, FF_PC); }
FF_HOOK __tsan_init() {}
FF_HOOK __tsan_func_entry(void *) {}
FF_HOOK __tsan_func_exit() {}

struct UndefinedAt {
  const char *file;
  uint32_t line, column;
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};
struct MisalignedAt {
  UndefinedAt at;
  const void *type;
  unsigned char log_alignment, kind;
};

FF_HOOK __ubsan_handle_type_mismatch_v1(MisalignedAt *data, uintptr_t pointer) {
  stop("uses address " + std::to_string(pointer) + ", not a multiple of " + std::to_string(1u << data->log_alignment) +
       ", at " + data->at.text());
}
FF_HOOK __ubsan_handle_out_of_bounds(UndefinedAt *at, uintptr_t index) {
  stop("uses index " + std::to_string(intptr_t(index)) + ", out of the array's range, at " + at->text());
}
#define FF_UNDEFINED(name, what) \
  FF_HOOK __ubsan_handle_##name(UndefinedAt *at, uintptr_t, uintptr_t) { stop(what " at " + at->text()); }
FF_UNDEFINED(add_overflow, "overflows a signed addition")
FF_UNDEFINED(sub_overflow, "overflows a signed subtraction")
FF_UNDEFINED(mul_overflow, "overflows a signed multiplication")
FF_UNDEFINED(negate_overflow, "overflows a negation")
FF_UNDEFINED(divrem_overflow, "divides by zero or overflows")
FF_UNDEFINED(shift_out_of_bounds, "shifts by too much or overflows a signed shift")
