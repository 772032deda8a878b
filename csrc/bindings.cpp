// Registers the kernels of csrc/ as torch.ops.prfl_fast_cuda.*, against PyTorch's stable ABI: one binary serves every
// Python and every torch from 2.10 on. Loads without CUDA too, so that schemas can be tested anywhere.
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

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "prfl_fast_cuda: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// x [B, L, D] bf16 or fp16, queries [H, D] fp32 -> pooled [B, H, D], lse [B, H]; the ints are those of CudaLaunch.
std::tuple<Tensor, Tensor> query_pool(Tensor x, Tensor queries, int64_t width, int64_t warps, int64_t cluster,
                                      int64_t splits) {
  const bool half = x.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(x.is_cuda() && queries.is_cuda() && x.get_device_index() == queries.get_device_index(),
                  "query_pool: x and queries must be on one CUDA device");
  STD_TORCH_CHECK(half || x.scalar_type() == ScalarType::BFloat16, "query_pool: x must be bfloat16 or float16");
  STD_TORCH_CHECK(queries.scalar_type() == ScalarType::Float && queries.is_contiguous(),
                  "query_pool: queries must be contiguous float32");
  STD_TORCH_CHECK(x.dim() == 3 && queries.dim() == 2 && queries.size(1) == x.size(2) && x.numel() > 0,
                  "query_pool: x must be [B, L, D] and queries [H, D]");
  const int64_t batch = x.size(0), tokens = x.size(1), dim = x.size(2), heads = queries.size(0);
  STD_TORCH_CHECK(x.stride(2) == 1 && x.stride(1) % 8 == 0 && (batch == 1 || x.stride(0) % 8 == 0) && dim % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0,
                  "query_pool: rows of x must be contiguous, aligned to 16 bytes and a multiple of 8 long");
  STD_TORCH_CHECK(tokens <= std::numeric_limits<int>::max() - 16 && batch <= 65535 && heads <= 65535,
                  "query_pool: too many tokens, batch rows or heads");
  STD_TORCH_CHECK(warps >= 4 && warps <= 12 && cluster >= 1 && cluster <= 8 && width * warps * cluster >= dim &&
                      splits >= 1 && splits <= (tokens + 15) / 16,
                  "query_pool: width, warps, cluster or splits do not fit the shape");

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  auto empty = [&](std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(queries, shape, ScalarType::Float);
  };
  Tensor maxima = empty({batch, splits, heads}), sums = empty({batch, splits, heads, 2});
  Tensor partials = empty({batch, splits, heads, dim});
  Tensor pooled = empty({batch, heads, dim}), lse = empty({batch, heads});
  auto data = [](const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); };
  query_pool_forward(x.const_data_ptr(), data(queries), data(maxima), data(sums), data(partials), data(pooled),
                     data(lse), x.stride(0), x.stride(1), int(batch), int(tokens), int(heads), int(dim), half,
                     int(width), int(warps), int(cluster), int(splits), current_stream(x.get_device_index()));
  return {pooled, lse};
}

}  // namespace
}  // namespace prfl_fast

STABLE_TORCH_LIBRARY(prfl_fast_cuda, m) {
  m.def("query_pool(Tensor x, Tensor queries, int width, int warps, int cluster, int splits) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(prfl_fast_cuda, CUDA, m) { m.impl("query_pool", TORCH_BOX(&prfl_fast::query_pool)); }
