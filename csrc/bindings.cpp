// Register the kernels of csrc/ as torch.ops.prfl_fast_cuda.*, against PyTorch's stable ABI: one binary serves every
// Python and every torch from 2.10 on. It loads without CUDA too, so that schemas can be tested anywhere.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "rope_sides.h"

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
void qk_norm_rope(const Sides& sides, const Rotation& rotation, int dim, int head_dim, bool per_head, float eps,
                  bool backward, bool half, int threads, cudaStream_t stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

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

void set_weight(Side& side, const Optional& weight, const Tensor& x, int64_t size) {
  if (!weight.has_value()) return;
  side.wide = weight->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(weight->is_cuda() && weight->get_device_index() == x.get_device_index() && weight->dim() == 1 &&
                      weight->size(0) == size && weight->is_contiguous() &&
                      (side.wide || weight->scalar_type() == x.scalar_type()) &&
                      reinterpret_cast<uintptr_t>(weight->const_data_ptr()) % 16 == 0,
                  "qk_norm_rope: weights must be contiguous [D] or [head_dim], float32 or as q, aligned to 16 bytes");
  side.weight = weight->const_data_ptr();
}

void set_rows(Side& side, const Tensor& x, int64_t blocks) {
  STD_TORCH_CHECK(x.size(0) * x.size(1) < (int64_t(1) << 31) - (1 << 16) && blocks >= 1 && blocks < (1 << 15),
                  "qk_norm_rope: too many rows or blocks");
  side.rows = int(x.size(0) * x.size(1));
  side.length = int(x.size(1));
  side.blocks = int(blocks);
}

Rotation make_rotation(const Optional& cos, const Optional& sin, const std::vector<int64_t>& grid,
                       const std::vector<int64_t>& offset, int64_t head_dim, const Sides& sides, const Tensor& x) {
  Rotation rotation{};
  if (!cos.has_value() || !sin.has_value()) return rotation;
  STD_TORCH_CHECK(grid.size() == 3 && offset.size() == 3 && head_dim % 8 == 0,
                  "qk_norm_rope: a rotation needs a grid and an offset of three numbers, heads of a multiple of 8");
  check_floats(*cos, x, {cos->size(0), head_dim / 2}, "qk_norm_rope: cos");
  check_floats(*sin, x, {cos->size(0), head_dim / 2}, "qk_norm_rope: sin");
  for (int i = 0; i < 3; ++i) {
    STD_TORCH_CHECK(grid[i] > 0 && offset[i] >= 0 && grid[i] + offset[i] <= cos->size(0),
                    "qk_norm_rope: the tables are shorter than the grid");
  }
  for (const Side& side : sides.side) {
    STD_TORCH_CHECK(side.blocks == 0 || side.length == grid[0] * grid[1] * grid[2],
                    "qk_norm_rope: the grid does not have the tokens of q and k");
  }
  rotation.cos = floats(*cos);
  rotation.sin = floats(*sin);
  rotation.height = int(grid[1]);
  rotation.width = int(grid[2]);
  rotation.frame_offset = int(offset[0]);
  rotation.height_offset = int(offset[1]);
  rotation.width_offset = int(offset[2]);
  return rotation;
}

void check_heads(int64_t dim, int64_t heads, bool per_head) {
  STD_TORCH_CHECK(heads > 0 && dim % heads == 0, "qk_norm_rope: heads must divide D");
  const int64_t lanes = dim / heads / 8;
  STD_TORCH_CHECK(!per_head || (dim / heads % 8 == 0 && lanes <= 32 && 32 % lanes == 0),
                  "qk_norm_rope: a norm per head takes heads of 8, 16, 32, 64, 128 or 256");
}

// q [B, Lq, D], k [B, Lk, D] bf16 or fp16 -> the same, contiguous; the last three ints are those of RopeLaunch.
std::tuple<Tensor, Tensor> qk_norm_rope_forward(Tensor q, Tensor k, Optional q_weight, Optional k_weight, Optional cos,
                                                Optional sin, std::vector<int64_t> grid, std::vector<int64_t> offset,
                                                int64_t heads, bool per_head, double eps, int64_t threads,
                                                int64_t q_blocks, int64_t k_blocks) {
  check_tokens(q, q, "qk_norm_rope: q");
  check_tokens(k, q, "qk_norm_rope: k");
  const int64_t dim = q.size(2);
  STD_TORCH_CHECK(k.size(2) == dim, "qk_norm_rope: q and k differ in D");
  check_heads(dim, heads, per_head);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out[2] = {empty(q, {q.size(0), q.size(1), dim}, q.scalar_type()),
                   empty(q, {k.size(0), k.size(1), dim}, q.scalar_type())};
  Sides sides{};
  for (int i = 0; i < 2; ++i) {
    Side& side = sides.side[i];
    const Tensor& x = i == 0 ? q : k;
    set_rows(side, x, i == 0 ? q_blocks : k_blocks);
    set_weight(side, i == 0 ? q_weight : k_weight, q, per_head ? dim / heads : dim);
    side.x = x.const_data_ptr();
    side.x_batch = x.stride(0);
    side.x_token = x.stride(1);
    side.out = out[i].mutable_data_ptr();
  }
  const Rotation rotation = make_rotation(cos, sin, grid, offset, dim / heads, sides, q);
  qk_norm_rope(sides, rotation, int(dim), int(dim / heads), per_head, float(eps), false,
               q.scalar_type() == ScalarType::Half, int(threads), current_stream(q.get_device_index()));
  return {out[0], out[1]};
}

// Gradients [B, L, D], inputs where they were normalized -> d_q, d_k, and the blocks' sums [blocks, D] fp32 of
// d_q_weight and d_k_weight; [0] for what is not needed. A side without blocks is skipped.
std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_backward(
    Optional q_grad, Optional k_grad, Optional q, Optional k, Optional q_weight, Optional k_weight, Optional cos,
    Optional sin, std::vector<int64_t> grid, std::vector<int64_t> offset, int64_t heads, bool per_head, double eps,
    bool need_q, bool need_k, bool need_q_weight, bool need_k_weight, int64_t threads, int64_t q_blocks,
    int64_t k_blocks) {
  const Optional grads[2] = {q_grad, k_grad}, inputs[2] = {q, k}, weights[2] = {q_weight, k_weight};
  const bool need[2] = {need_q, need_k}, need_weight[2] = {need_q_weight, need_k_weight};
  const int64_t blocks[2] = {q_blocks, k_blocks};
  STD_TORCH_CHECK(q_blocks + k_blocks > 0 && (q_blocks == 0 || q_grad.has_value()) &&
                      (k_blocks == 0 || k_grad.has_value()),
                  "qk_norm_rope_backward: blocks for a gradient that is not there");
  const Tensor& like = *grads[q_blocks > 0 ? 0 : 1];
  const int64_t dim = like.size(2);
  check_heads(dim, heads, per_head);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  Sides sides{};
  Tensor out[2], partials[2];
  for (int i = 0; i < 2; ++i) {
    out[i] = empty(like, {0}, like.scalar_type());
    partials[i] = empty(like, {0}, ScalarType::Float);
    if (blocks[i] == 0) continue;
    Side& side = sides.side[i];
    const Tensor& grad = *grads[i];
    check_tokens(grad, like, "qk_norm_rope_backward: a gradient");
    STD_TORCH_CHECK(grad.size(2) == dim, "qk_norm_rope_backward: gradients differ in D");
    set_rows(side, grad, blocks[i]);
    side.grad = grad.const_data_ptr();
    side.grad_batch = grad.stride(0);
    side.grad_token = grad.stride(1);
    set_weight(side, weights[i], like, per_head ? dim / heads : dim);
    if (side.weight != nullptr) {
      STD_TORCH_CHECK(inputs[i].has_value(), "qk_norm_rope_backward: a norm needs its input");
      const Tensor& x = *inputs[i];
      check_tokens(x, like, "qk_norm_rope_backward: an input");
      STD_TORCH_CHECK(x.size(0) == grad.size(0) && x.size(1) == grad.size(1) && x.size(2) == dim,
                      "qk_norm_rope_backward: an input and its gradient differ in shape");
      side.x = x.const_data_ptr();
      side.x_batch = x.stride(0);
      side.x_token = x.stride(1);
    }
    if (need[i]) {
      out[i] = empty(like, {grad.size(0), grad.size(1), dim}, like.scalar_type());
      side.out = out[i].mutable_data_ptr();
    }
    if (need_weight[i]) {
      partials[i] = empty(like, {blocks[i], dim}, ScalarType::Float);
      side.partials = floats(partials[i]);
    }
  }
  const Rotation rotation = make_rotation(cos, sin, grid, offset, dim / heads, sides, like);
  qk_norm_rope(sides, rotation, int(dim), int(dim / heads), per_head, float(eps), true,
               like.scalar_type() == ScalarType::Half, int(threads), current_stream(like.get_device_index()));
  return {out[0], out[1], partials[0], partials[1]};
}

}  // namespace
}  // namespace prfl_fast

STABLE_TORCH_LIBRARY(prfl_fast_cuda, m) {
  m.def("query_pool(Tensor x, Tensor queries, int width, int warps, int cluster, int splits) -> (Tensor, Tensor)");
  m.def(
      "query_pool_backward(Tensor grad, Tensor lse, Tensor delta, Tensor x, Tensor queries, bool need_x, "
      "bool need_queries, int width, int warps, int cluster, int splits) -> (Tensor, Tensor)");
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, int[] grid, "
      "int[] offset, int heads, bool per_head, float eps, int threads, int q_blocks, int k_blocks) "
      "-> (Tensor, Tensor)");
  m.def(
      "qk_norm_rope_backward(Tensor? q_grad, Tensor? k_grad, Tensor? q, Tensor? k, Tensor? q_weight, "
      "Tensor? k_weight, Tensor? cos, Tensor? sin, int[] grid, int[] offset, int heads, bool per_head, float eps, "
      "bool need_q, bool need_k, bool need_q_weight, bool need_k_weight, int threads, int q_blocks, int k_blocks) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(prfl_fast_cuda, CUDA, m) {
  m.impl("query_pool", TORCH_BOX(&prfl_fast::query_pool));
  m.impl("query_pool_backward", TORCH_BOX(&prfl_fast::query_pool_backward));
  m.impl("qk_norm_rope", TORCH_BOX(&prfl_fast::qk_norm_rope_forward));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&prfl_fast::qk_norm_rope_backward));
}
