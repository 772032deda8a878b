// Runs the kernels of csrc/ on a CPU: every CUDA thread is a fibre, blocks of a cluster run side by side.
//
// A fibre runs until a barrier or a warp instruction, which it leaves when all threads concerned have arrived. Between
// two such points the order of the threads is the caller's (`order`), and shared memory starts as NaN: a missing
// barrier shows as a NaN or as a result that depends on the order. Fragment layouts are the PTX manual's, written
// out element by element, independently of how the kernel uses them.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};

namespace emulation {

struct Dim3 {
  int x = 1, y = 1, z = 1;
};

// Arrivals of a group of threads; `generation` counts the times all of them have come.
struct Barrier {
  int size = 0, arrived = 0;
  int64_t generation = 0;
  bool flag = false, result = false;
};

struct Warp {
  Barrier barrier;
  uint32_t exchange[2][32][6];
};

struct Block {
  Dim3 index;
  int rank = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

struct Copy {
  void* to;
  const void* from;  // null for zeros
};

struct Fibre {
  ucontext_t context;
  std::vector<Copy> copies;  // started and not waited for
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack;
  Cluster* cluster = nullptr;
  Block* block = nullptr;
  Dim3 thread;
  bool done = false;
};

inline Fibre* current = nullptr;
inline jmp_buf scheduler;
inline Dim3 block_dim, grid_dim;
inline const std::function<void()>* body = nullptr;
inline int64_t steps = 0;  // barriers left and threads ended

// ucontext only starts a fibre: its switches cost a system call each, these do not.
inline void yield() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline void resume(Fibre& fibre) {
  current = &fibre;
  if (_setjmp(scheduler)) return;
  if (fibre.started) _longjmp(fibre.place, 1);
  fibre.started = true;
  setcontext(&fibre.context);
}

inline bool arrive(Barrier& barrier, bool flag = false) {
  const int64_t generation = barrier.generation;
  barrier.flag |= flag;
  if (++barrier.arrived == barrier.size) {
    barrier.result = barrier.flag;
    barrier.arrived = 0;
    barrier.flag = false;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
  ++steps;
  return barrier.result;
}

inline int lane() { return current->thread.x % 32; }
inline Warp& warp() { return current->block->warps[current->thread.x / 32]; }

// All 32 lanes put `count` words in, then each reads what it needs of the others'. A lane can be one exchange ahead of
// another, not two, so two sets of words are enough.
template <typename Read>
void exchange(const uint32_t* words, int count, Read read) {
  Warp& w = warp();
  auto& all = w.exchange[w.barrier.generation % 2];
  std::copy(words, words + count, all[lane()]);
  arrive(w.barrier);
  read(all);
}

inline void entry() {
  (*body)();
  current->done = true;
  ++steps;
  yield();
}

// Gives each fibre that is not done a turn, in this order; whether one is left.
inline bool round(std::vector<Fibre>& fibres, const int* begin, const int* end) {
  bool running = false;
  for (const int* i = begin; i < end; ++i) {
    if (fibres[*i].done) continue;
    resume(fibres[*i]);
    running |= !fibres[*i].done;
  }
  return running;
}

// Runs `kernel()` once for every thread of the grid. order: turns as numbered (0), backwards (1), shuffled (2); the
// first warps (3) or the last ones (4) ahead.
inline void launch(Dim3 grid, int threads, int cluster_size, size_t shared_bytes, int order,
                   const std::function<void()>& kernel) {
  constexpr size_t STACK = 32 * 1024;
  grid_dim = grid;
  block_dim = {threads, 1, 1};
  body = &kernel;
  for (int z = 0; z < grid.z; ++z) {
    for (int y = 0; y < grid.y; ++y) {
      for (int x = 0; x < grid.x; x += cluster_size) {
        Cluster cluster;
        cluster.barrier.size = cluster_size * threads;
        cluster.blocks.resize(cluster_size);
        std::vector<Fibre> fibres(cluster_size * threads);
        for (int r = 0; r < cluster_size; ++r) {
          Block& block = cluster.blocks[r];
          block.index = {x + r, y, z};
          block.rank = r;
          block.barrier.size = threads;
          block.warps.resize(threads / 32);
          for (Warp& w : block.warps) w.barrier.size = 32;
          block.shared.assign(shared_bytes, 0xff);
          for (int i = 0; i < threads; ++i) {
            Fibre& fibre = fibres[r * threads + i];
            fibre.cluster = &cluster;
            fibre.block = &block;
            fibre.thread = {i, 0, 0};
            fibre.stack.reset(new char[STACK]);
            getcontext(&fibre.context);
            fibre.context.uc_stack.ss_sp = fibre.stack.get();
            fibre.context.uc_stack.ss_size = STACK;
            fibre.context.uc_link = nullptr;
            makecontext(&fibre.context, entry, 0);
          }
        }
        std::vector<int> turn(fibres.size());
        std::iota(turn.begin(), turn.end(), 0);
        if (order == 1 || order == 4) std::reverse(turn.begin(), turn.end());
        if (order == 2) std::shuffle(turn.begin(), turn.end(), std::mt19937(order));
        const int* const end = turn.data() + turn.size();
        if (order < 3) {
          while (round(fibres, turn.data(), end)) {
          }
          continue;
        }
        for (const int* warp = turn.data(); warp < end;) {
          const int64_t before = steps;
          round(fibres, warp, warp + 32);
          warp = steps == before ? warp + 32 : turn.data();  // who moved may have freed those ahead
        }
      }
    }
  }
}

}  // namespace emulation

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block->index)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

inline void __syncthreads() { emulation::arrive(emulation::current->block->barrier); }
inline int __syncthreads_or(int flag) { return emulation::arrive(emulation::current->block->barrier, flag != 0); }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

namespace prfl_fast {

// The upper half of a float, rounded to nearest, ties to even.
struct bf16 {
  uint16_t bits;
};

struct fp16 {
  _Float16 value;
};

template <typename T>
T from_float(float value);
template <>
inline bf16 from_float<bf16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float value) {
  return {_Float16(value)};
}
inline float to_float(bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float to_float(fp16 value) { return float(value.value); }

inline unsigned char* shared_memory() { return emulation::current->block->shared.data(); }

inline void check_alignment(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    std::fprintf(stderr, "misaligned 16-byte access\n");
    std::abort();
  }
}

// The bytes come when the thread waits for them, so that a missing wait shows.
inline void copy_async(void* shared, const void* address, bool inside) {
  check_alignment(shared);
  if (inside) check_alignment(address);
  emulation::current->copies.push_back({shared, inside ? address : nullptr});
}

inline void wait_for_copies() {
  for (const emulation::Copy& copy : emulation::current->copies) {
    copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
  }
  emulation::current->copies.clear();
}

inline void store_vector(void* address, uint4 value) {
  check_alignment(address);
  std::memcpy(address, &value, 16);
}

// Element `half` (0 low, 1 high) of a 32-bit register.
template <typename T>
float element(uint32_t word, int half) {
  const uint16_t bits = uint16_t(word >> (16 * half));
  T value;
  std::memcpy(&value, &bits, 2);
  return to_float(value);
}

template <typename T>
void unpack(uint32_t word, float& first, float& second) {
  first = element<T>(word, 0);
  second = element<T>(word, 1);
}

template <typename T>
uint32_t pack(float first, float second) {
  const T both[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t word;
  std::memcpy(&word, both, 4);
  return word;
}

inline float truncate_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= 0xffffe000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float round_tf32(float value) {
  if (!std::isfinite(value)) return value;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += 0x1000u;
  std::memcpy(&value, &bits, 4);
  return truncate_tf32(value);
}

inline void mma_tf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  const float values[6] = {a0, a1, a2, a3, b0, b1};
  uint32_t words[6];
  std::memcpy(words, values, 24);
  emulation::exchange(words, 6, [&](const uint32_t (*all)[6]) {
    const auto value = [&](int lane, int word) {
      float out;
      std::memcpy(&out, &all[lane][word], 4);
      return truncate_tf32(out);
    };
    const int group = emulation::lane() / 4, in_group = emulation::lane() % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i < 2 ? 0 : 8), column = in_group * 2 + i % 2;
      double sum = c[i];
      for (int k = 0; k < 8; ++k) {
        // a_n: row = group + 8·(n%2), column = in_group + 4·(n/2). b_n: row = in_group + 4n, column = group.
        sum += double(value(row % 8 * 4 + k % 4, row / 8 + k / 4 * 2)) * double(value(column * 4 + k % 4, 4 + k / 4));
      }
      c[i] = float(sum);
    }
  });
}

template <typename T>
void mma_m16n8k16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};
  emulation::exchange(words, 6, [&](const uint32_t (*all)[6]) {
    const int group = emulation::lane() / 4, in_group = emulation::lane() % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i < 2 ? 0 : 8), column = in_group * 2 + i % 2;
      double sum = c[i];
      for (int k = 0; k < 16; ++k) {
        // a_n: row = group + 8·(n in 2, 3, 6, 7), column = 2·in_group + n%2 + 8·(n ≥ 4); two to a register.
        // b_n: row = 2·in_group + n%2 + 8·(n ≥ 2), column = group.
        const int holder = k % 8 / 2, upper = k / 8;
        const float a = element<T>(all[row % 8 * 4 + holder][2 * upper + row / 8], k % 2);
        const float b = element<T>(all[column * 4 + holder][4 + upper], k % 2);
        sum += double(a) * double(b);
      }
      c[i] = float(sum);
    }
  });
}

inline uint32_t movmatrix(uint32_t value) {
  uint32_t out = 0;
  emulation::exchange(&value, 1, [&](const uint32_t (*all)[6]) {
    const int row = emulation::lane() / 4;
    for (int half = 0; half < 2; ++half) {
      const int column = emulation::lane() % 4 * 2 + half;  // of the result: element [column, row] of the source
      const uint32_t word = all[column * 4 + row / 2][0];
      out |= (word >> (16 * (row % 2)) & 0xffff) << (16 * half);
    }
  });
  return out;
}

inline float shuffle_xor(float value, int mask) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  emulation::exchange(&word, 1, [&](const uint32_t (*all)[6]) { word = all[emulation::lane() ^ mask][0]; });
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint32_t cluster_rank() { return emulation::current->block->rank; }
inline void cluster_sync() { emulation::arrive(emulation::current->cluster->barrier); }

template <typename T>
T* cluster_address(T* address, uint32_t rank) {
  const auto offset = reinterpret_cast<unsigned char*>(address) - shared_memory();
  return reinterpret_cast<T*>(emulation::current->cluster->blocks[rank].shared.data() + offset);
}

}  // namespace prfl_fast
