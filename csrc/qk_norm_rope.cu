// RMSNorm and rotary positions of q and k in one launch, forward and backward (formulas: kernels/attn/norm_rope.py).
//
// A block is one group of warps and has one row (token) at a time, 16 elements a thread in two 16-byte vectors; a
// fixed number of blocks walks the rows of q, the rest those of k. A block loads the next row while it reduces one.
// A norm over D adds up in the warps, then through shared memory; one over a head, whose vectors lie in neighboring
// lanes, by shuffles alone. The block puts cosines and sines of a row in shared memory once for all heads, from the
// compact tables. Two sets of shared memory, used in turns, leave one barrier a row.
//
// All arithmetic is fp32; 16-bit values are converted two at a time, and rounded once, at the end. Weight gradients
// are summed in registers over the rows of a block; the caller adds up the blocks' sums.
#include "common.cuh"
#include "rope_sides.h"

namespace prfl_fast {

constexpr int VECTORS = 2;        // 16-byte vectors of a thread
constexpr int MAX_THREADS = 512;  // D up to 8192
// Bounds of the compiler's registers, 65536 / threads: three blocks of a forward and two of a backward at D = 5120,
// 320 threads each, are on a multiprocessor at a time.
constexpr int FORWARD_BOUND = 1024;
constexpr int BACKWARD_BOUND = 640;
constexpr int SLOTS = 2 * MAX_THREADS / 32;

// Bytes of dynamic shared memory: weights, two sets of sums of the warps, and of cosines and sines.
static int64_t shared_bytes(int threads, int head_dim, bool rotates) {
  return 4 * (int64_t(threads) * VECTORS * 8 + 2 * SLOTS + (rotates ? 2 * head_dim : 0));
}

// Cosines, then sines, of the token at `index` in its sequence to `place` [2, head_dim / 2].
__device__ __forceinline__ void stage(const Rotation& rotation, int index, int head_dim, float* place) {
  const int pairs = head_dim / 2;
  const int third = pairs / 3;
  const int in_frame = index % (rotation.height * rotation.width);
  for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
    int position = index / (rotation.height * rotation.width) + rotation.frame_offset;
    if (p >= pairs - third) {
      position = in_frame % rotation.width + rotation.width_offset;
    } else if (p >= pairs - 2 * third) {
      position = in_frame / rotation.width + rotation.height_offset;
    }
    place[p] = rotation.cos[int64_t(position) * pairs + p];
    place[pairs + p] = rotation.sin[int64_t(position) * pairs + p];
  }
}

// Rotate four pairs by the angles of `pair` onwards; by their opposites if `back`.
__device__ __forceinline__ void turn(float (&z)[8], const float* place, int pair, int pairs, bool back) {
  const float4 c = *reinterpret_cast<const float4*>(place + pair);
  const float4 s = *reinterpret_cast<const float4*>(place + pairs + pair);
  const float cosines[4] = {c.x, c.y, c.z, c.w};
  const float sines[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float sine = back ? -sines[i] : sines[i];
    const float first = z[2 * i], second = z[2 * i + 1];
    z[2 * i] = first * cosines[i] - second * sine;
    z[2 * i + 1] = first * sine + second * cosines[i];
  }
}

template <typename T>
__device__ __forceinline__ void widen(uint4 vector, float (&values)[8]) {
  unpack<T>(vector.x, values[0], values[1]);
  unpack<T>(vector.y, values[2], values[3]);
  unpack<T>(vector.z, values[4], values[5]);
  unpack<T>(vector.w, values[6], values[7]);
}

template <typename T>
__device__ __forceinline__ uint4 narrow(const float (&values)[8]) {
  return uint4{pack<T>(values[0], values[1]), pack<T>(values[2], values[3]), pack<T>(values[4], values[5]),
               pack<T>(values[6], values[7])};
}

// The weights of a thread's vectors stay in shared memory, where only it reads them: registers are scarcer. Each half
// of a vector is an array over the block, free of bank conflicts. Ones without a weight.
template <typename T>
__device__ __forceinline__ void keep_weight(const Side& side, int column, int v, float4* weights) {
  float values[8];
  if (side.weight != nullptr && !side.wide) {
    widen<T>(*reinterpret_cast<const uint4*>(static_cast<const T*>(side.weight) + column), values);
  } else {
    for (int i = 0; i < 8; ++i) {
      values[i] = side.weight != nullptr ? static_cast<const float*>(side.weight)[column + i] : 1.0f;
    }
  }
  for (int half = 0; half < 2; ++half) {
    const float* first = values + 4 * half;
    weights[(2 * v + half) * blockDim.x + threadIdx.x] = float4{first[0], first[1], first[2], first[3]};
  }
}

__device__ __forceinline__ void kept_weight(const float4* weights, int v, float (&values)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 four = weights[(2 * v + half) * blockDim.x + threadIdx.x];
    values[4 * half] = four.x;
    values[4 * half + 1] = four.y;
    values[4 * half + 2] = four.z;
    values[4 * half + 3] = four.w;
  }
}

// Sum over neighboring `lanes` (a power of two) of a warp, in each of them.
__device__ __forceinline__ float sum_lanes(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += shuffle_xor(value, step);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(FORWARD_BOUND, 1)
    qk_norm_rope_forward_kernel(const __grid_constant__ Sides sides, const __grid_constant__ Rotation rotation,
                                int dim, int head_dim, bool per_head, float eps) {
  const int is_k = blockIdx.x >= sides.side[0].blocks;
  const Side& side = sides.side[is_k];
  const int block = is_k ? blockIdx.x - sides.side[0].blocks : blockIdx.x;
  const bool norm = side.weight != nullptr;
  const bool whole = norm && !per_head;
  const float count = per_head ? head_dim : dim;
  const bool rotates = rotation.cos != nullptr;
  const int warps = blockDim.x / 32;
  float4* weights = reinterpret_cast<float4*>(shared_memory());                 // [VECTORS, 2, threads]
  float* slots = reinterpret_cast<float*>(weights + 2 * VECTORS * blockDim.x);  // [2, SLOTS]
  float* angles = slots + 2 * SLOTS;                                            // [2, 2, head_dim / 2]

  int column[VECTORS];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    column[v] = 8 * (threadIdx.x + v * blockDim.x);
    if (column[v] < dim) keep_weight<T>(side, per_head ? column[v] % head_dim : column[v], v, weights);
  }
  auto load = [&](int row, uint4(&vectors)[VECTORS]) {
    const int batch = row / side.length;
    const T* x = static_cast<const T*>(side.x) + batch * side.x_batch + (row - batch * side.length) * side.x_token;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      vectors[v] = row < side.rows && column[v] < dim ? load_streaming(x + column[v]) : uint4{0, 0, 0, 0};
    }
  };

  uint4 x[VECTORS], next[VECTORS];
  load(block, x);
  int parity = 0;
  for (int row = block; row < side.rows; row += side.blocks) {
    load(row + side.blocks, next);
    float* place = angles + parity * head_dim;
    if (rotates) stage(rotation, row % side.length, head_dim, place);
    float squares[VECTORS] = {};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      float values[8];
      widen<T>(x[v], values);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares[v] += values[i] * values[i];
    }
    if (whole) {
      squares[0] = sum_lanes(squares[0] + squares[1], 32);
      if (threadIdx.x % 32 == 0) slots[parity * SLOTS + threadIdx.x / 32] = squares[0];
    }
    if (rotates || whole) __syncthreads();
    if (whole) {
      squares[0] = 0.0f;
      for (int w = 0; w < warps; ++w) squares[0] += slots[parity * SLOTS + w];
      squares[1] = squares[0];
    } else if (norm) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) squares[v] = sum_lanes(squares[v], head_dim / 8);
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (column[v] >= dim) continue;
      float z[8];
      widen<T>(x[v], z);
      if (norm) {
        const float rstd = rsqrtf(squares[v] / count + eps);
        float weight[8];
        kept_weight(weights, v, weight);
#pragma unroll
        for (int i = 0; i < 8; ++i) z[i] = z[i] * rstd * weight[i];
      }
      if (rotates) turn(z, place, column[v] % head_dim / 2, head_dim / 2, false);
      store_vector(static_cast<T*>(side.out) + int64_t(row) * dim + column[v], narrow<T>(z));
      x[v] = next[v];
    }
    parity ^= 1;
  }
}

template <typename T>
__global__ void __launch_bounds__(BACKWARD_BOUND, 1)
    qk_norm_rope_backward_kernel(const __grid_constant__ Sides sides, const __grid_constant__ Rotation rotation,
                                 int dim, int head_dim, bool per_head, float eps) {
  const int is_k = blockIdx.x >= sides.side[0].blocks;
  const Side& side = sides.side[is_k];
  const int block = is_k ? blockIdx.x - sides.side[0].blocks : blockIdx.x;
  const bool norm = side.weight != nullptr;
  const bool whole = norm && !per_head;
  const float count = per_head ? head_dim : dim;
  const bool rotates = rotation.cos != nullptr;
  const int warps = blockDim.x / 32;
  float4* weights = reinterpret_cast<float4*>(shared_memory());                 // [VECTORS, 2, threads]
  float* slots = reinterpret_cast<float*>(weights + 2 * VECTORS * blockDim.x);  // [2, SLOTS]
  float* angles = slots + 2 * SLOTS;                                            // [2, 2, head_dim / 2]

  int column[VECTORS];
  float d_weight[VECTORS][8] = {};
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    column[v] = 8 * (threadIdx.x + v * blockDim.x);
    if (column[v] < dim) keep_weight<T>(side, per_head ? column[v] % head_dim : column[v], v, weights);
  }
  auto load = [&](int row, uint4(&x)[VECTORS], uint4(&grad)[VECTORS]) {
    const int batch = row / side.length;
    const int index = row - batch * side.length;
    const T* p_x = static_cast<const T*>(side.x) + batch * side.x_batch + index * side.x_token;
    const T* p_grad = static_cast<const T*>(side.grad) + batch * side.grad_batch + index * side.grad_token;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const bool inside = row < side.rows && column[v] < dim;
      x[v] = inside && norm ? load_streaming(p_x + column[v]) : uint4{0, 0, 0, 0};
      grad[v] = inside ? load_streaming(p_grad + column[v]) : uint4{0, 0, 0, 0};
    }
  };

  uint4 x[VECTORS], next[VECTORS], grad[VECTORS];
  load(block, x, grad);
  if (rotates) {
    if (block < side.rows) stage(rotation, block % side.length, head_dim, angles);
    __syncthreads();
  }
  int parity = 0;
  for (int row = block; row < side.rows; row += side.blocks) {
    if (rotates && row + side.blocks < side.rows) {
      stage(rotation, (row + side.blocks) % side.length, head_dim, angles + (parity ^ 1) * head_dim);
    }
    float d_z[VECTORS][8];
    float squares[VECTORS] = {}, products[VECTORS] = {};
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (column[v] >= dim) continue;
      widen<T>(grad[v], d_z[v]);
      if (rotates) {
        turn(d_z[v], angles + parity * head_dim, column[v] % head_dim / 2, head_dim / 2, true);
      }
      float values[8], weight[8];
      widen<T>(x[v], values);
      kept_weight(weights, v, weight);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        squares[v] += values[i] * values[i];
        products[v] += d_z[v][i] * weight[i] * values[i];
      }
    }
    load(row + side.blocks, next, grad);
    if (whole) {
      squares[0] = sum_lanes(squares[0] + squares[1], 32);
      products[0] = sum_lanes(products[0] + products[1], 32);
      if (threadIdx.x % 32 == 0) {
        float* place = slots + parity * SLOTS + threadIdx.x / 32 * 2;
        place[0] = squares[0];
        place[1] = products[0];
      }
    }
    if (rotates || whole) __syncthreads();
    if (whole) {
      squares[0] = products[0] = 0.0f;
#pragma unroll 1
      for (int w = 0; w < warps; ++w) {
        squares[0] += slots[parity * SLOTS + 2 * w];
        products[0] += slots[parity * SLOTS + 2 * w + 1];
      }
      squares[1] = squares[0];
      products[1] = products[0];
    } else if (norm) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        squares[v] = sum_lanes(squares[v], head_dim / 8);
        products[v] = sum_lanes(products[v], head_dim / 8);
      }
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (column[v] >= dim) continue;
      if (norm) {
        const float rstd = rsqrtf(squares[v] / count + eps);
        const float mean = products[v] * rstd / count;
        float normed[8], weight[8];
        widen<T>(x[v], normed);
        kept_weight(weights, v, weight);
        x[v] = next[v];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          normed[i] *= rstd;
          d_weight[v][i] += d_z[v][i] * normed[i];
          d_z[v][i] = rstd * (d_z[v][i] * weight[i] - normed[i] * mean);
        }
      }
      if (side.out != nullptr) {
        store_vector(static_cast<T*>(side.out) + int64_t(row) * dim + column[v], narrow<T>(d_z[v]));
      }
    }
    parity ^= 1;
  }
  if (side.partials == nullptr) return;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    if (column[v] >= dim) continue;
    float* place = side.partials + int64_t(block) * dim + column[v];
#pragma unroll
    for (int i = 0; i < 8; ++i) place[i] = d_weight[v][i];
  }
}

#ifndef PRFL_FAST_EMULATE
// Run one of the kernels on `stream`. `half`: tensors are fp16, else bf16.
void qk_norm_rope(const Sides& sides, const Rotation& rotation, int dim, int head_dim, bool per_head, float eps,
                  bool backward, bool half, int threads, cudaStream_t stream) {
  if (threads > MAX_THREADS || threads * VECTORS * 8 < dim) {
    throw std::runtime_error("qk_norm_rope: " + std::to_string(threads) + " threads do not fit D");
  }
  const int blocks = sides.side[0].blocks + sides.side[1].blocks;
  const int64_t bytes = shared_bytes(threads, head_dim, rotation.cos != nullptr);
  auto run = [&](auto kernel) {
    kernel<<<blocks, threads, bytes, stream>>>(sides, rotation, dim, head_dim, per_head, eps);
    check(cudaGetLastError(), "qk_norm_rope");
  };
  if (backward) {
    return half ? run(qk_norm_rope_backward_kernel<fp16>) : run(qk_norm_rope_backward_kernel<bf16>);
  }
  return half ? run(qk_norm_rope_forward_kernel<fp16>) : run(qk_norm_rope_forward_kernel<bf16>);
}
#endif

}  // namespace prfl_fast
