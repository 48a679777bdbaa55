#include <cstdlib>
#include <cstring>

#include "rows.h"

namespace antidote::cpu {
namespace {

const Rows& best_rows() {
  const char* wanted = std::getenv("ANTIDOTE_CPU_ISA");
#ifdef ANTIDOTE_X86
  bool any = wanted == nullptr || *wanted == '\0';
  __builtin_cpu_init();
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && (any || !strcmp(wanted, "avx512"))) return kRowsAvx512;
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
              __builtin_cpu_supports("fma");
  if (avx2 && (any || strcmp(wanted, "plain"))) return kRowsAvx2;
#endif
  return kRowsPlain;
}

}  // namespace

const Rows& rows() {
  static const Rows& chosen = best_rows();
  return chosen;
}

}  // namespace antidote::cpu
