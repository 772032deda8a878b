// csrc/query_pool_backward.cu on the CPU, behind a C function for ctypes.
#define PRFL_FAST_EMULATE
#include <cstdio>

#include "query_pool_backward.cu"

namespace {

template <typename T, int WIDTH>
void run(const void* x, const float* queries, const float* grad, const float* lse, const float* delta, void* d_x,
         float* partials, int64_t x_batch, int64_t x_token, int batch, int tokens, int heads, int dim, int warps,
         int cluster, int splits, int order) {
  using namespace prfl_fast;
  const emulation::Dim3 grid{splits * cluster, 1, batch};
  emulation::launch(grid, warps * 32, cluster, shared_bytes(WIDTH, warps, cluster), order, [&] {
    query_pool_backward_kernel<T, WIDTH>(static_cast<const T*>(x), queries, grad, lse, delta, static_cast<T*>(d_x),
                                         partials, x_batch, x_token, tokens, heads, dim, splits, cluster);
  });
}

}  // namespace

extern "C" int query_pool_backward_emulated(const void* x, const float* queries, const float* grad, const float* lse,
                                            const float* delta, void* d_x, float* partials, int64_t x_batch,
                                            int64_t x_token, int batch, int tokens, int heads, int dim, int half,
                                            int width, int warps, int cluster, int splits, int order) {
  auto call = [&](auto kernel) {
    kernel(x, queries, grad, lse, delta, d_x, partials, x_batch, x_token, batch, tokens, heads, dim, warps, cluster,
           splits, order);
    return 0;
  };
  using namespace prfl_fast;
  switch (width) {
#ifdef NARROW
    case 64: return half ? 1 : call(run<bf16, 64>);
#else
    case 64: return half ? call(run<fp16, 64>) : call(run<bf16, 64>);
    case 128: return half ? call(run<fp16, 128>) : call(run<bf16, 128>);
    case 256: return half ? call(run<fp16, 256>) : call(run<bf16, 256>);
#endif
  }
  return 1;
}

extern "C" int query_pool_backward_max_warps(int width) { return prfl_fast::max_warps(width); }

extern "C" int64_t query_pool_backward_shared_bytes(int width, int warps, int cluster) {
  return prfl_fast::shared_bytes(width, warps, cluster);
}
