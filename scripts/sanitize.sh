#!/usr/bin/env bash
# The C++ kernels and the engine under a sanitizer of GCC:  scripts/sanitize.sh address|undefined|thread|quick [pytest options]
#
# Builds a copy of the working tree with the sanitizer and runs the tests of the CPU kernels on it, in Python: PyTorch is
# not instrumented, so what is checked is this package's own code. ThreadSanitizer does not know OpenMP's barriers, so that
# build splits its loops over std::thread. quick is AddressSanitizer and UndefinedBehaviorSanitizer together, on one
# instruction set and a twelfth of the tests. Options are passed to pytest, such as -k "not float64".
set -euo pipefail
kind=${1:?usage: scripts/sanitize.sh address|undefined|thread|quick [pytest options]}
shift
case $kind in
  address) library=libasan.so; export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 ;;
  undefined) library=libubsan.so; export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 ;;
  thread) library=libtsan.so; export FF_OPENMP=0 TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0 ;;
  quick)
    kind=address,undefined library=libasan.so
    export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
    [ "$(uname -m)" = x86_64 ] && export FF_INSTRUCTION_SETS=avx2 || export FF_INSTRUCTION_SETS=generic
    set -- --every 12 "$@" ;;
  *) echo "unknown sanitizer $kind: choose address, undefined, thread or quick" >&2; exit 2 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
work=${SANITIZE_DIR:-$(mktemp -d)}
[ -n "${SANITIZE_DIR:-}" ] || trap 'rm -rf "$work"' EXIT
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -cT - 2>/dev/null) | tar -xC "$work"
cd "$work"
if [ "$kind" = thread ]; then
  # glibc frees a thread's storage for the next thread under locks that ThreadSanitizer does not see.
  printf 'race:%s\n' libtorch_cpu.so libtorch_python.so libc10.so libgomp.so _dl_deallocate_tls > tsan.txt
  TSAN_OPTIONS+=:suppressions=$work/tsan.txt
fi
checks="-fsanitize=$kind"
[[ "$kind" = *undefined ]] && checks+=" -fno-sanitize-recover=all"
CXX=${CXX:-g++} CXXFLAGS="$checks -g1 -O1 -fno-omit-frame-pointer" FF_BUILD_CUDA=0 \
  "$python" setup.py -q build_ext --inplace
tests=(tests/test_*_cpu.py tests/test_engine.py tests/test_preprocess.py tests/test_detection.py tests/test_channel_shuffle.py)
# Without a fixed layout of the address space, ThreadSanitizer refuses newer kernels. libstdc++ must come after the sanitizer,
# and before it looks for __cxa_throw.
preload="$(${CXX:-g++} -print-file-name=$library) $(${CXX:-g++} -print-file-name=libstdc++.so)"
PYTHONPATH=. LD_PRELOAD="$preload" setarch -R "$python" -X faulthandler -m pytest -q -p no:cacheprovider --capture=sys -x "${tests[@]}" "$@"
