// csrc/qk_norm_rope.cu on the CPU, behind a C function for ctypes.
#define PRFL_FAST_EMULATE
#include <cstdio>

#include "qk_norm_rope.cu"

using namespace prfl_fast;

extern "C" int qk_norm_rope_emulated(const Sides* sides, const Rotation* rotation, int dim, int head_dim, int per_head,
                                     float eps, int backward, int half, int threads, int order) {
  const int blocks = sides->side[0].blocks + sides->side[1].blocks;
  auto run = [&](auto kernel) {
    emulation::launch({blocks, 1, 1}, threads, 1, shared_bytes(threads, head_dim, rotation->cos != nullptr), order,
                      [&] { kernel(*sides, *rotation, dim, head_dim, per_head != 0, eps); });
  };
  if (backward) {
    half ? run(qk_norm_rope_backward_kernel<fp16>) : run(qk_norm_rope_backward_kernel<bf16>);
  } else {
    half ? run(qk_norm_rope_forward_kernel<fp16>) : run(qk_norm_rope_forward_kernel<bf16>);
  }
  return 0;
}

extern "C" int64_t qk_norm_rope_shared_bytes(int threads, int head_dim, int rotates) {
  return shared_bytes(threads, head_dim, rotates != 0);
}

extern "C" int qk_norm_rope_max_threads() { return MAX_THREADS; }

extern "C" int qk_norm_rope_bound(int backward) { return backward ? BACKWARD_BOUND : FORWARD_BOUND; }
