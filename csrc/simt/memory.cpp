#include "state.h"

namespace antidote::simt {

void* shared_memory(const void* key, size_t bytes, size_t alignment) {
  Launch& launch = current_launch();
  Block& block = *launch.running->block;
  for (const Memory& memory : block.shared) {
    if (memory.key == key) return memory.data();
  }
  if (key != nullptr) block.static_bytes += bytes;
  if (block.static_bytes > kMaxStatic || block.static_bytes + launch.dynamic_bytes > kMaxShared) {
    fail("%zu bytes of static and %zu of dynamic shared memory", block.static_bytes,
         launch.dynamic_bytes);
  }
  block.shared.emplace_back(key, bytes, alignment);
  return block.shared.back().data();
}

void* dynamic_memory() { return shared_memory(nullptr, current_launch().dynamic_bytes, 16); }

void copy_async(void* to, const void* from, size_t bytes, size_t zeros) {
  Thread& self = *current_launch().running;
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("an asynchronous copy of %zu bytes", bytes);
  if (zeros > bytes) fail("an asynchronous copy with %zu of %zu bytes zero", zeros, bytes);
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) {
    fail("an asynchronous copy of %zu bytes with misaligned addresses", bytes);
  }
  bool shared = false;
  for (const Memory& memory : self.block->shared) shared |= memory.holds(to);
  if (!shared) fail("an asynchronous copy to what is no shared memory");
  memset(to, kPoison, bytes);
  self.copies.push_back({to, from, bytes, zeros, self.group});
}

void copy_commit() { ++current_launch().running->group; }

void copy_wait(size_t groups_left) {
  Thread& self = *current_launch().running;
  size_t done = 0;
  for (; done < self.copies.size(); ++done) {
    const Copy& copy = self.copies[done];
    if (copy.group + groups_left >= self.group) break;
    memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
    memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
  }
  self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<int64_t>(done));
}

}  // namespace antidote::simt
