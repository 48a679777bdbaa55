// Python's view of the extension: integers in, no logic. antidote_fast/backends/cuda.py is the only
// caller and has checked every address, shape and stride.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "prune.h"

namespace py = pybind11;
using namespace antidote;
using namespace antidote::cuda;

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes a device current, and the one before again.
class Guard {
 public:
  explicit Guard(int device) {
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
    changed_ = device != before_;
  }
  ~Guard() {
    if (changed_) cudaSetDevice(before_);
  }
  Guard(const Guard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// (device, stream)
using Where = std::array<int64_t, 2>;

cudaStream_t stream(const Where& where) { return pointer<CUstream_st>(where[1]); }

// (scope, largest, score_delta, is_signed, write, removed, group)
using PlanOf = std::array<int64_t, 7>;

Plan plan_of(const PlanOf& p) {
  return {static_cast<Scope>(p[0]), p[1] != 0, p[2] != 0, p[3] != 0, p[4] != 0, p[5], p[6]};
}

Matrices matrices_of(const std::vector<Row>& rows) {
  Matrices matrices;
  for (const Row& row : rows) matrices.push_back(matrix_of(row));
  return matrices;
}

// (x, dtype, columns, token_mask)
using Head = std::array<int64_t, 4>;

Activations activations(const Head& head, const std::vector<int64_t>& sizes,
                        const std::vector<int64_t>& strides) {
  return {pointer<const void>(head[0]),   static_cast<DType>(head[1]), head[2], sizes, strides,
          pointer<const uint8_t>(head[3])};
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using Release = py::call_guard<py::gil_scoped_release>;
  using Sizes = std::vector<int64_t>;
  module.doc() = "CUDA kernels of antidote_fast; called by antidote_fast.backends.cuda alone";
#if defined(ANTIDOTE_SIMT)
  module.attr("emulated") = true;
  module.def("schedule", &simt::schedule);
#else
  module.attr("emulated") = false;
#endif
  module.def("problem", [](int device) {
    try {
      Guard guard(device);
      check(probe());
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string();
  });
  module.def(
      "rows_scratch",
      [](const Where& where, const std::vector<Row>& rows, const PlanOf& plan) {
        Guard guard(where[0]);
        size_t bytes;
        check(rows_scratch(matrices_of(rows), plan_of(plan), &bytes));
        return bytes;
      },
      Release());
  module.def(
      "prune_rows",
      [](const Where& where, const std::vector<Row>& rows, const PlanOf& plan, int64_t scratch) {
        Guard guard(where[0]);
        check(prune_rows(matrices_of(rows), plan_of(plan), pointer<void>(scratch), stream(where)));
      },
      Release());
  module.def(
      "cut_scratch",
      [](const Where& where, const std::vector<Row>& rows, const PlanOf& plan) {
        Guard guard(where[0]);
        size_t bytes;
        check(cut_scratch(matrices_of(rows), plan_of(plan), &bytes));
        return bytes;
      },
      Release());
  module.def(
      "prune_cut",
      [](const Where& where, const std::vector<Row>& rows, const PlanOf& plan, int64_t scratch) {
        Guard guard(where[0]);
        check(prune_cut(matrices_of(rows), plan_of(plan), pointer<void>(scratch), stream(where)));
      },
      Release());
  module.def("needs_marks", [](const PlanOf& plan) { return needs_marks(plan_of(plan)); });
  module.def(
      "prune_groups",
      [](const Where& where, const Row& row, const PlanOf& plan, int64_t marks) {
        Guard guard(where[0]);
        check(prune_groups(matrix_of(row), plan_of(plan), pointer<uint8_t>(marks), stream(where)));
      },
      Release());
  module.def(
      "score",
      [](const Where& where, const Row& row, bool delta, int64_t out) {
        Guard guard(where[0]);
        check(score(matrix_of(row), delta, pointer<float>(out), stream(where)));
      },
      Release());
  module.def(
      "apply_mask",
      [](const Where& where, const Row& row) {
        Guard guard(where[0]);
        check(apply_mask(matrix_of(row), stream(where)));
      },
      Release());
  module.def(
      "norms_scratch",
      [](const Where& where, const Head& head, const Sizes& sizes, const Sizes& strides) {
        Guard guard(where[0]);
        size_t bytes;
        check(norms_scratch(activations(head, sizes, strides), &bytes));
        return bytes;
      },
      Release());
  module.def(
      "accumulate_sq_norm",
      [](const Where& where, int64_t sq_sum, const Head& head, const Sizes& sizes,
         const Sizes& strides, int64_t scratch) {
        Guard guard(where[0]);
        check(accumulate_sq_norm(pointer<float>(sq_sum), activations(head, sizes, strides),
                                 pointer<void>(scratch), stream(where)));
      },
      Release());
  module.def(
      "serves_linear",
      [](const Where& where, const Row& row, const PlanOf& plan, const Head& head,
         const Sizes& sizes, const Sizes& strides) {
        Guard guard(where[0]);
        return serves_linear(matrix_of(row), plan_of(plan), activations(head, sizes, strides));
      },
      Release());
  module.def(
      "linear_scratch",
      [](const Where& where, const Head& head, const Sizes& sizes, const Sizes& strides) {
        Guard guard(where[0]);
        size_t bytes;
        check(linear_scratch(activations(head, sizes, strides), &bytes));
        return bytes;
      },
      Release());
  module.def(
      "prune_linear",
      [](const Where& where, const Row& row, const PlanOf& plan, int64_t norm, const Head& head,
         const Sizes& sizes, const Sizes& strides, int64_t scratch) {
        Guard guard(where[0]);
        check(prune_linear(matrix_of(row), plan_of(plan), pointer<float>(norm),
                           activations(head, sizes, strides), pointer<void>(scratch),
                           stream(where)));
      },
      Release());
}
