// Python's view of the extension: integers in, no logic. antidote_fast/backends/cpu.py is the only
// caller and has checked every address, shape and stride.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "prune.h"
#include "rows.h"

namespace py = pybind11;
using namespace antidote;

namespace {

// The isa is an index into isas().
const cpu::Rows& table(int isa) { return *cpu::supported_rows().at(isa); }

void select_rows(int isa, const std::vector<Row>& rows, int scope, bool largest, bool score_delta,
                 bool is_signed, bool write, int64_t removed, int64_t group, int threads) {
  std::vector<Matrix> matrices;
  for (const Row& row : rows) matrices.push_back(matrix_of(row));
  cpu::select(table(isa), matrices,
              {static_cast<Scope>(scope), largest, score_delta, is_signed, write, removed, group},
              threads);
}

void score(int isa, const Row& row, bool delta, int64_t out, int threads) {
  cpu::score(table(isa), matrix_of(row), delta, pointer<float>(out), threads);
}

void apply_mask(int isa, const Row& row, int threads) {
  cpu::apply_mask(table(isa), matrix_of(row), threads);
}

void accumulate_sq_norm(int isa, int64_t sq_sum, int64_t x, int dtype, int64_t columns,
                        const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                        int64_t token_mask, int threads) {
  cpu::accumulate_sq_norm(table(isa), pointer<float>(sq_sum), pointer<const void>(x),
                          static_cast<DType>(dtype), columns, sizes, strides,
                          pointer<const uint8_t>(token_mask), threads);
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "CPU kernels of antidote_fast; called by antidote_fast.backends.cpu alone";
  module.def("isas", [] {
    std::vector<const char*> names;
    for (const cpu::Rows* rows : cpu::supported_rows()) names.push_back(rows->name);
    return names;
  });
  module.def("select", &select_rows, Release());
  module.def("score", &score, Release());
  module.def("apply_mask", &apply_mask, Release());
  module.def("accumulate_sq_norm", &accumulate_sq_norm, Release());
}
