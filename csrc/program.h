// Calls of native entries, recorded once and made again with other memory: an op of many kernels costs Python one call.
//
// A pointer of a recorded call is a place in one of the bases that every run brings along. Calls are copied as they are
// made, so several threads may run one program.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace ff {

union Argument {
  int64_t integer;
  double real;
  void *pointer;
};

struct Entry {
  enum Kind : char { kInteger, kReal, kPointer };
  int (*call)(const Argument *) = nullptr;
  std::vector<Kind> kinds;
};

class Program {
 public:
  static constexpr size_t kMostArguments = 64;

  static std::map<std::string, Entry> &entries() {
    static std::map<std::string, Entry> all;
    return all;
  }

  // Makes an entry known whose address is in *slot, which may change between runs.
  template <auto *slot>
  static void know(const char *name) {
    know_as<slot>(name, decltype (*slot)(*slot));
  }

  // A pointer is None or (base, byte offset).
  void add(const std::string &name, const pybind11::args &values) {
    const auto found = entries().find(name);
    if (found == entries().end()) throw std::invalid_argument("no entry " + name);
    const Entry &entry = found->second;
    if (values.size() != entry.kinds.size())
      throw std::invalid_argument(name + " takes " + std::to_string(entry.kinds.size()) + " arguments, got " +
                                  std::to_string(values.size()));
    Call call{entry.call, arguments_.size(), values.size(), places_.size(), 0};
    for (size_t i = 0; i < values.size(); ++i) {
      Argument argument{0};
      if (entry.kinds[i] == Entry::kReal) {
        argument.real = values[i].cast<double>();
      } else if (entry.kinds[i] == Entry::kInteger) {
        argument.integer = values[i].cast<int64_t>();
      } else if (!values[i].is_none()) {
        const auto place = values[i].cast<std::pair<size_t, int64_t>>();
        places_.push_back({i, place.first, place.second});
        bases_ = std::max(bases_, place.first + 1);
      }
      arguments_.push_back(argument);
    }
    call.places = places_.size() - call.first_place;
    calls_.push_back(call);
  }

  // The first error code, or zero. A base of zero makes every pointer into it NULL.
  int run(const std::vector<uintptr_t> &bases) const {
    if (bases.size() < bases_) throw std::invalid_argument("a program has more bases than it was given");
    pybind11::gil_scoped_release release;
    Argument arguments[kMostArguments];
    for (const Call &call : calls_) {
      std::copy_n(arguments_.begin() + call.first, call.count, arguments);
      for (size_t i = call.first_place; i < call.first_place + call.places; ++i) {
        const Place &place = places_[i];
        const uintptr_t base = bases[place.base];
        arguments[place.argument].pointer = base ? reinterpret_cast<void *>(base + place.offset) : nullptr;
      }
      const int code = call.entry(arguments);
      if (code != 0) return code;
    }
    return 0;
  }

 private:
  struct Call {
    int (*entry)(const Argument *);
    size_t first, count, first_place, places;
  };
  struct Place {
    size_t argument, base;
    int64_t offset;
  };

  template <class T>
  static constexpr Entry::Kind kind_of() {
    return std::is_pointer_v<T> ? Entry::kPointer : std::is_floating_point_v<T> ? Entry::kReal : Entry::kInteger;
  }

  template <class T>
  static T value_of(const Argument &argument) {
    if constexpr (std::is_pointer_v<T>)
      return static_cast<T>(argument.pointer);
    else if constexpr (std::is_floating_point_v<T>)
      return static_cast<T>(argument.real);
    else
      return static_cast<T>(argument.integer);
  }

  template <auto *slot, class... A, size_t... I>
  static int call(const Argument *arguments, int (*)(A...), std::index_sequence<I...>) {
    return (*slot)(value_of<A>(arguments[I])...);
  }

  template <auto *slot, class... A>
  static void know_as(const char *name, int (*)(A...)) {
    static_assert(sizeof...(A) <= kMostArguments);
    const auto run = [](const Argument *arguments) {
      using Function = int (*)(A...);
      return call<slot>(arguments, Function(nullptr), std::index_sequence_for<A...>{});
    };
    entries()[name] = {run, {kind_of<A>()...}};
  }

  std::vector<Call> calls_;
  std::vector<Argument> arguments_;
  std::vector<Place> places_;
  size_t bases_ = 0;
};

}  // namespace ff
