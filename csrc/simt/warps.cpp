#include "state.h"

namespace antidote::simt {

namespace {

using Lanes = const std::unique_ptr<Thread>*;

// The values of the lanes of a mask, one after the other.
template <typename T, typename F>
uint64_t reduce(Lanes lanes, uint32_t mask, F combine) {
  T sum = static_cast<T>(lanes[__builtin_ctz(mask)]->wait.value);
  for (uint32_t left = mask & (mask - 1); left != 0; left &= left - 1) {
    sum = combine(sum, static_cast<T>(lanes[__builtin_ctz(left)]->wait.value));
  }
  return static_cast<uint32_t>(sum);
}

// What all lanes of the mask get alike.
uint64_t common(Op op, Lanes lanes, uint32_t mask) {
  using U = uint32_t;
  using S = int32_t;
  auto smaller = [](auto a, auto b) { return b < a ? b : a; };
  auto larger = [](auto a, auto b) { return a < b ? b : a; };
  uint64_t ballot = 0;
  switch (op) {
    case Op::kAdd:
      return reduce<U>(lanes, mask, [](U a, U b) { return a + b; });
    case Op::kMin:
      return reduce<U>(lanes, mask, smaller);
    case Op::kMax:
      return reduce<U>(lanes, mask, larger);
    case Op::kMinSigned:
      return reduce<S>(lanes, mask, smaller);
    case Op::kMaxSigned:
      return reduce<S>(lanes, mask, larger);
    case Op::kAnd:
      return reduce<U>(lanes, mask, [](U a, U b) { return a & b; });
    case Op::kOr:
      return reduce<U>(lanes, mask, [](U a, U b) { return a | b; });
    case Op::kXor:
      return reduce<U>(lanes, mask, [](U a, U b) { return a ^ b; });
    case Op::kBallot:
      for (int i = 0; i < 32; ++i) {
        if (mask >> i & 1) ballot |= lanes[i]->wait.value << i;
      }
      return ballot;
    default:
      return 0;
  }
}

uint64_t own(const Wait& wait, Lanes lanes, uint32_t mask) {
  uint64_t result = 0;
  if (wait.op == Op::kShuffle) {
    if (mask >> wait.source & 1) return lanes[wait.source]->wait.value;
    memset(&result, kPoison, sizeof result);  // undefined on a GPU
    return result;
  }
  for (int i = 0; i < 32; ++i) {  // __match_any_sync
    if ((mask >> i & 1) && lanes[i]->wait.value == wait.value) result |= uint64_t{1} << i;
  }
  return result;
}

}  // namespace

// Serves the lanes of the running thread's mask if all wait for each other.
void Launch::exchange() {
  const unsigned lane = running->number % 32;
  const uint32_t mask = running->wait.mask;
  const Op op = running->wait.op;
  uint32_t& here = running->block->lanes[running->number / 32];
  here |= 1u << lane;
  if ((here & mask) != mask) return;
  const Lanes lanes = &pool[running->place - lane];
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && !lanes[i]->wait.meets(running->wait)) return;
  }
  here &= ~mask;
  const bool each = op == Op::kShuffle || op == Op::kMatch;
  const uint64_t all = each ? 0 : common(op, lanes, mask);
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) wake(*lanes[i], each ? own(lanes[i]->wait, lanes, mask) : all);
  }
}

uint64_t warp(Op op, const char* name, uint32_t mask, uint64_t value, int source, Site site) {
  Launch& launch = current_launch();
  Thread& self = *launch.running;
  if (!(mask >> self.number % 32 & 1)) {
    fail("%s in %s: lane %u is not in its mask 0x%08x", name, text_of(site).c_str(),
         self.number % 32, mask);
  }
  self.wait = {op, name, mask, source, value, site};
  launch.exchange();
  launch.suspend();
  return self.result;
}

}  // namespace antidote::simt
