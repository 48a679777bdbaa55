#include "rows.h"

namespace antidote::cpu {

std::vector<const Rows*> supported_rows() {
  std::vector<const Rows*> tables;
#ifdef ANTIDOTE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(&kRowsAvx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
      __builtin_cpu_supports("fma")) {
    tables.push_back(&kRowsAvx2);
  }
#endif
  tables.push_back(&kRowsPlain);
  return tables;
}

}  // namespace antidote::cpu
