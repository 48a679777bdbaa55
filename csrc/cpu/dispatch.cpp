#include "rows.h"

#ifdef ANTIDOTE_X86
#include <cpuid.h>
#endif

namespace antidote::cpu {

#ifdef ANTIDOTE_X86
// Clang 14 does not know the name in __builtin_cpu_supports.
static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

static std::vector<const Rows*> find_supported_rows() {
  std::vector<const Rows*> tables;
#ifdef ANTIDOTE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&kRowsAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    tables.push_back(&kRowsAvx2);
  }
#endif
  tables.push_back(&kRowsPlain);
  return tables;
}

// Asked once: cpuid leaves a virtual machine for some 20 us.
const std::vector<const Rows*>& supported_rows() {
  static const std::vector<const Rows*> tables = find_supported_rows();
  return tables;
}

}  // namespace antidote::cpu
