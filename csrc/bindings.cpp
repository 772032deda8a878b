// Register the kernels of csrc/ as torch.ops.prfl_fast_cuda.*, against PyTorch's stable ABI: one binary serves every
// Python and every torch from 2.10 on. It loads without CUDA too, so that schemas can be tested anywhere.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>

// A CPU-only libtorch has no such symbol; weak, it resolves to null there instead of keeping the library from loading.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace prfl_fast {

void query_pool_forward(const void* x, const float* queries, float* maxima, float* sums, float* partials,
                        float* pooled, float* lse, int64_t x_batch, int64_t x_token, int batch, int tokens,
                        int heads, int dim, bool half, int width, int warps, int cluster, int splits,
                        cudaStream_t stream);
void query_pool_gradients(const void* x, const float* queries, const float* grad, const float* lse,
                          const float* delta, void* d_x, float* partials, int64_t x_batch, int64_t x_token, int batch,
                          int tokens, int heads, int dim, bool half, int width, int warps, int cluster, int splits,
                          cudaStream_t stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "prfl_fast_cuda: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// `what` begins with the operation's name.
void check_tokens(const Tensor& x, const Tensor& like, const char* what) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), what,
                  " must be on the CUDA device of the others");
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0 && x.scalar_type() == like.scalar_type() &&
                      (x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16),
                  what, " must be [B, L, D], bfloat16 or float16 as the others");
  STD_TORCH_CHECK(x.stride(2) == 1 && x.stride(1) % 8 == 0 && (x.size(0) == 1 || x.stride(0) % 8 == 0) &&
                      x.size(2) % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                  what, ": rows must be contiguous, aligned to 16 bytes and a multiple of 8 long");
}

void check_floats(const Tensor& tensor, const Tensor& x, std::initializer_list<int64_t> shape, const char* what) {
  bool fits = tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() && tensor.is_contiguous() &&
              tensor.scalar_type() == ScalarType::Float && tensor.dim() == int64_t(shape.size());
  for (int64_t i = 0; fits && i < tensor.dim(); ++i) fits = tensor.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(fits, what, " must be contiguous float32 of the right shape, on the device of x");
}

void check_pool(const Tensor& x, int64_t heads, int64_t width, int64_t warps, int64_t cluster, int64_t splits) {
  check_tokens(x, x, "query_pool: x");
  const int64_t tokens = x.size(1);
  STD_TORCH_CHECK(tokens <= std::numeric_limits<int>::max() - 16 && x.size(0) <= 65535 && heads > 0 && heads <= 65535,
                  "query_pool: too many tokens, batch rows or heads");
  STD_TORCH_CHECK(warps >= 4 && warps <= 12 && cluster >= 1 && cluster <= 8 &&
                      width * warps * cluster >= x.size(2) && splits >= 1 && splits <= (tokens + 15) / 16,
                  "query_pool: width, warps, cluster or splits do not fit the shape");
}

// x [B, L, D] bf16 or fp16, queries [H, D] fp32 -> pooled [B, H, D], lse [B, H]; the ints are those of PoolLaunch.
std::tuple<Tensor, Tensor> query_pool(Tensor x, Tensor queries, int64_t width, int64_t warps, int64_t cluster,
                                      int64_t splits) {
  const int64_t batch = x.size(0), tokens = x.size(1), dim = x.size(2), heads = queries.size(0);
  check_pool(x, heads, width, warps, cluster, splits);
  check_floats(queries, x, {heads, dim}, "query_pool: queries");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto f32 = ScalarType::Float;
  Tensor maxima = empty(x, {batch, splits, heads}, f32), sums = empty(x, {batch, splits, heads, 2}, f32);
  Tensor partials = empty(x, {batch, splits, heads, dim}, f32);
  Tensor pooled = empty(x, {batch, heads, dim}, f32), lse = empty(x, {batch, heads}, f32);
  query_pool_forward(x.const_data_ptr(), floats(queries), floats(maxima), floats(sums), floats(partials),
                     floats(pooled), floats(lse), x.stride(0), x.stride(1), int(batch), int(tokens), int(heads),
                     int(dim), x.scalar_type() == ScalarType::Half, int(width), int(warps), int(cluster), int(splits),
                     current_stream(x.get_device_index()));
  return {pooled, lse};
}

// grad [B, H, D], lse and delta [B, H] fp32 -> d_x [B, L, D], partial sums of d_queries [B, splits, H, D] fp32; [0]
// for one that is not needed.
std::tuple<Tensor, Tensor> query_pool_backward(Tensor grad, Tensor lse, Tensor delta, Tensor x, Tensor queries,
                                               bool need_x, bool need_queries, int64_t width, int64_t warps,
                                               int64_t cluster, int64_t splits) {
  const int64_t batch = x.size(0), tokens = x.size(1), dim = x.size(2), heads = queries.size(0);
  check_pool(x, heads, width, warps, cluster, splits);
  STD_TORCH_CHECK(heads <= 8, "query_pool_backward: more than 8 heads");
  check_floats(queries, x, {heads, dim}, "query_pool_backward: queries");
  check_floats(grad, x, {batch, heads, dim}, "query_pool_backward: grad");
  check_floats(lse, x, {batch, heads}, "query_pool_backward: lse");
  check_floats(delta, x, {batch, heads}, "query_pool_backward: delta");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor d_x = need_x ? empty(x, {batch, tokens, dim}, x.scalar_type()) : empty(x, {0}, x.scalar_type());
  Tensor partials = need_queries ? empty(x, {batch, splits, heads, dim}, ScalarType::Float)
                                 : empty(x, {0}, ScalarType::Float);
  query_pool_gradients(x.const_data_ptr(), floats(queries), floats(grad), floats(lse), floats(delta),
                       need_x ? d_x.mutable_data_ptr() : nullptr, need_queries ? floats(partials) : nullptr,
                       x.stride(0), x.stride(1), int(batch), int(tokens), int(heads), int(dim),
                       x.scalar_type() == ScalarType::Half, int(width), int(warps), int(cluster), int(splits),
                       current_stream(x.get_device_index()));
  return {d_x, partials};
}

}  // namespace
}  // namespace prfl_fast

STABLE_TORCH_LIBRARY(prfl_fast_cuda, m) {
  m.def("query_pool(Tensor x, Tensor queries, int width, int warps, int cluster, int splits) -> (Tensor, Tensor)");
  m.def(
      "query_pool_backward(Tensor grad, Tensor lse, Tensor delta, Tensor x, Tensor queries, bool need_x, "
      "bool need_queries, int width, int warps, int cluster, int splits) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(prfl_fast_cuda, CUDA, m) {
  m.impl("query_pool", TORCH_BOX(&prfl_fast::query_pool));
  m.impl("query_pool_backward", TORCH_BOX(&prfl_fast::query_pool_backward));
}
