// Folded query attention pooling, forward, one pass over x (formulas: kernels/attn/pool.py).
//
// A block, or a cluster of blocks that share D, walks a range of tokens in tiles of 16. Warp w owns WIDTH columns:
//   1. its slice of the tile comes into registers, 16 bytes a load, as the A operand of an mma
//      (tokens are M, heads are N = 8, columns are K); partial scores [16, 8] meet in shared memory;
//   2. 128 threads add them up and run the online softmax;
//   3. the same registers, transposed by movmatrix, are the A operand of the second mma
//      (columns are M, heads are N, tokens are K).
// So x is read once. The next tile is copied to shared memory while this one is reduced.
//
// The order of a dot product's terms is free, so K is permuted to suit 16-byte loads: in a 32-column
// block, lane 4g+t loads columns 8t..8t+7 of tokens g and g+8; mma step s (of two) takes its columns 8t+4s..8t+4s+3.
//
// Precision: scores are fp32 sums of exact products of x with queries split into two 16-bit halves (16 bits of
// significand in bf16, 22 in fp16). Weights are rounded to x's type for the second mma, and the denominator is the
// sum of the rounded ones, so weights add up to one; the rest is a relative error ≤ 2^-9 (bf16) or 2^-12 (fp16)
// of each weight. lse comes from the exact ones.
#include "common.cuh"

namespace prfl_fast {

constexpr int TOKENS = 16;         // tokens of a tile: M of the first mma, K of the second
constexpr int HEADS = 8;           // heads of a block: N of both
constexpr int SLOT = HEADS * 20;   // floats of one warp's scores; a row of 20 keeps stores free of bank conflicts
constexpr int P_ROW = TOKENS + 8;  // elements of a head's row of weights, likewise
constexpr int SOFTMAX_BYTES = HEADS * P_ROW * 2 + HEADS * 4;  // weights and shrink
constexpr float LOG2E = 1.4426950408889634f;

// fp16 has too few exponents for small weights: scale them by 2^14, which the division by their sum cancels.
template <typename T>
constexpr float weight_exponent = 0.0f;
template <>
constexpr float weight_exponent<fp16> = 14.0f;

// Largest block of a width: registers are 65536 a multiprocessor, WIDTH / 2 of a thread's hold x and sums.
static constexpr int max_warps(int width) { return width == 64 || width == 320 ? 8 : 12; }

// Bytes of dynamic shared memory: weights, the factors by which sums shrink when a maximum grows, query halves, the
// next tile of x, and scores (two tiles, so that one barrier a tile separates writers from readers).
static int64_t shared_bytes(int width, int warps, int cluster) {
  return SOFTMAX_BYTES + int64_t(warps) * width * (HEADS * 2 + TOKENS) * 2 + int64_t(2) * cluster * warps * SLOT * 4;
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(max_warps(WIDTH) * 32, 1) query_pool_partial(
    const T* __restrict__ x,             // [B, L, D], strides x_batch, x_token, 1; rows 16-byte aligned
    const float* __restrict__ queries,   // [H, D]
    float* __restrict__ maxima,          // [B, splits, H] largest score of the split
    float* __restrict__ sums,            // [B, splits, H, 2] sums of rounded and of exact weights, relative to it
    float* __restrict__ partials,        // [B, splits, H, D] weighted sums of x
    int64_t x_batch, int64_t x_token, int tokens, int heads, int dim, int splits, int cluster_size) {
  constexpr int BLOCKS = WIDTH / 32;
  const int warps = PRFL_FAST_WARPS;
  const int cluster = PRFL_FAST_CLUSTER;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int g = lane / 4;
  const int t = lane % 4;
  const int rank = cluster > 1 ? cluster_rank() : 0;
  const int split = blockIdx.x / cluster;
  const int first_head = blockIdx.y * HEADS;
  const int64_t batch = blockIdx.z;
  const int column = (rank * warps + warp) * WIDTH + 8 * t;  // of this lane in 32-column block 0

  // Weights are at a constant address, and a warp's own parts at constant offsets from each other. With a register for
  // each address, 320 columns spilled 8 bytes on sm_80, and 256 columns 24 on sm_100.
  T* weights = reinterpret_cast<T*>(shared_memory());                 // [HEADS, P_ROW]
  float* shrink = reinterpret_cast<float*>(weights + HEADS * P_ROW);  // [HEADS]
  unsigned char* parts = shared_memory() + SOFTMAX_BYTES;             // [warps, 4, BLOCKS, 32] of 8 columns
  uint4* query_high = reinterpret_cast<uint4*>(parts) + warp * 4 * BLOCKS * 32 + lane;  // [BLOCKS, 32]
  uint4* query_low = query_high + BLOCKS * 32;                                          // [BLOCKS, 32]
  uint4* next = query_low + BLOCKS * 32;                                                // [BLOCKS, 2, 32]
  float* scores = reinterpret_cast<float*>(parts + warps * WIDTH * 64);  // [2, cluster * warps, SLOT]

  const int64_t tiles = (tokens + TOKENS - 1) / TOKENS;
  const int tile_begin = int(tiles * split / splits);
  const int tile_end = int(tiles * (split + 1) / splits);

  uint4 x_tile[BLOCKS][2];      // columns 8t..8t+7 of tokens g and g+8, each block
  float sum[BLOCKS][2][4] = {};  // weighted sums; see the end for which column and head

  // The next tile is on its way to shared memory while this one is in registers. A lane copies what it will read.
  const T* source = x + batch * x_batch + column + int64_t(tile_begin * TOKENS + g) * x_token;
  const int end = (tokens < tile_end * TOKENS ? tokens : tile_end * TOKENS) - g;  // less the first token of this lane
  auto fetch = [&](int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = tile * TOKENS + 8 * half < end;
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
        copy_async(next + (2 * j + half) * 32, source + 32 * j, inside && column + 32 * j < dim);
      }
      source += 8 * x_token;
    }
  };

  // Each lane keeps the B fragments of head g that it will read: no other lane touches its 16 bytes.
  const int head_of_lane = first_head + g;
#pragma unroll 1
  for (int j = 0; j < BLOCKS; ++j) {
    alignas(16) T high[8], low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int d = column + 32 * j + i;
      const float q = head_of_lane < heads && d < dim ? queries[int64_t(head_of_lane) * dim + d] : 0.0f;
      high[i] = from_float<T>(q);
      low[i] = from_float<T>(q - to_float(high[i]));
    }
    query_high[j * 32] = *reinterpret_cast<const uint4*>(high);
    query_low[j * 32] = *reinterpret_cast<const uint4*>(low);
  }
  fetch(tile_begin);
  if (cluster > 1) cluster_sync();  // the others must run before their shared memory is written

  // Softmax state of head threadIdx.x / 16, in each of the 16 threads that stand for the tokens of a tile.
  const int softmax_head = threadIdx.x / TOKENS;
  const int softmax_token = threadIdx.x % TOKENS;
  float running_max = -INFINITY;
  float rounded_sum = 0.0f;
  float exact_sum = 0.0f;

  for (int tile = tile_begin; tile < tile_end; ++tile) {
    wait_for_copies();
#pragma unroll
    for (int j = 0; j < 2 * BLOCKS; ++j) x_tile[j / 2][j % 2] = next[j * 32];
    float s[2][4] = {};  // two chains of sums hide the latency of one
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const uint4 low = query_low[j * 32], high = query_high[j * 32];
      const uint4 a = x_tile[j][0], b = x_tile[j][1];
      mma_m16n8k16<T>(s[0], a.x, b.x, a.y, b.y, low.x, low.y);
      mma_m16n8k16<T>(s[1], a.z, b.z, a.w, b.w, low.z, low.w);
      mma_m16n8k16<T>(s[0], a.x, b.x, a.y, b.y, high.x, high.y);
      mma_m16n8k16<T>(s[1], a.z, b.z, a.w, b.w, high.z, high.w);
    }
    fetch(tile + 1);
    const int parity = (tile - tile_begin) & 1;
    float* slot = scores + ((parity * cluster + rank) * warps + warp) * SLOT;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* place = slot + (2 * t + i % 2) * 20 + g + 8 * (i / 2);  // head, token
      const float value = s[0][i] + s[1][i];
      if (cluster == 1) {
        *place = value;
      } else {
        for (int r = 0; r < cluster; ++r) *cluster_address(place, r) = value;
      }
    }
    if (cluster > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }

    bool moved = false;
    if (threadIdx.x < HEADS * TOKENS) {
      const float* place = scores + parity * cluster * warps * SLOT + softmax_head * 20 + softmax_token;
      float score = 0.0f;
      for (int w = 0; w < cluster * warps; ++w) score += place[w * SLOT];
      if (tile * TOKENS + softmax_token >= tokens) score = -INFINITY;
      float top = score;
#pragma unroll
      for (int step = TOKENS / 2; step > 0; step /= 2) top = fmaxf(top, shuffle_xor(top, step));
      top = fmaxf(top, running_max);
      float exact = exp2f((score - top) * LOG2E + weight_exponent<T>);
      const T weight = from_float<T>(exact);
      weights[softmax_head * P_ROW + softmax_token] = weight;
      float rounded = to_float(weight);
#pragma unroll
      for (int step = TOKENS / 2; step > 0; step /= 2) {
        rounded += shuffle_xor(rounded, step);
        exact += shuffle_xor(exact, step);
      }
      const float factor = exp2f((running_max - top) * LOG2E);
      moved = top != running_max;
      rounded_sum = rounded_sum * factor + rounded;
      exact_sum = exact_sum * factor + exact;
      running_max = top;
      if (softmax_token == 0) shrink[softmax_head] = factor;
    }
    if (__syncthreads_or(moved)) {
      const float even = shrink[2 * t], odd = shrink[2 * t + 1];
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          sum[j][q][0] *= even;
          sum[j][q][1] *= odd;
          sum[j][q][2] *= even;
          sum[j][q][3] *= odd;
        }
      }
    }

    const T* row = weights + g * P_ROW + 2 * t;
    const uint32_t p0 = *reinterpret_cast<const uint32_t*>(row);      // tokens 2t, 2t+1 of head g
    const uint32_t p1 = *reinterpret_cast<const uint32_t*>(row + 8);  // tokens 2t+8, 2t+9
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const uint4 a = x_tile[j][0], b = x_tile[j][1];
      mma_m16n8k16<T>(sum[j][0], movmatrix(a.x), movmatrix(a.y), movmatrix(b.x), movmatrix(b.y), p0, p1);
      mma_m16n8k16<T>(sum[j][1], movmatrix(a.z), movmatrix(a.w), movmatrix(b.z), movmatrix(b.w), p0, p1);
    }
  }

  // Row g of movmatrix's result is column g of its input: column 8(g/2) + g%2 of the block, plus 2 for each 32-bit
  // word. Sum [j][q][i] is that column plus 2(2q + i/2), for head 2t + i%2.
  const int64_t part = batch * splits + split;
  const int first_column = column - 8 * t + 8 * (g / 2) + g % 2;
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = first_head + 2 * t + i % 2;
        const int d = first_column + 32 * j + 2 * (2 * q + i / 2);
        if (head < heads && d < dim) partials[(part * heads + head) * dim + d] = sum[j][q][i];
      }
    }
  }
  const int head = first_head + softmax_head;
  if (rank == 0 && threadIdx.x < HEADS * TOKENS && softmax_token == 0 && head < heads) {
    maxima[part * heads + head] = running_max;
    sums[(part * heads + head) * 2] = rounded_sum;
    sums[(part * heads + head) * 2 + 1] = exact_sum;
  }
}

// One thread a column: the splits in their order, so the result does not depend on the schedule.
__global__ void query_pool_merge(
    const float* __restrict__ maxima,    // [B, splits, H]
    const float* __restrict__ sums,      // [B, splits, H, 2]
    const float* __restrict__ partials,  // [B, splits, H, D]
    float* __restrict__ pooled,          // [B, H, D]
    float* __restrict__ lse,             // [B, H]
    int heads, int dim, int splits, float log_scale) {
  const int d = blockIdx.x * blockDim.x + threadIdx.x;
  const int head = blockIdx.y;
  const int64_t batch = blockIdx.z;
  const int64_t first = batch * splits * heads + head;
  float top = -INFINITY;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, maxima[first + int64_t(s) * heads]);
  float rounded = 0.0f, exact = 0.0f, value = 0.0f;
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const int64_t part = first + int64_t(s) * heads;
    const float weight = exp2f((maxima[part] - top) * LOG2E);
    rounded += weight * sums[part * 2];
    exact += weight * sums[part * 2 + 1];
    if (d < dim) value += weight * partials[part * dim + d];
  }
  if (d < dim) pooled[(batch * heads + head) * dim + d] = value / rounded;
  if (d == 0) lse[batch * heads + head] = top + logf(exact) - log_scale;
}

#ifndef PRFL_FAST_EMULATE
template <typename T, int WIDTH>
static void launch(const void* x, const float* queries, float* maxima, float* sums, float* partials, float* pooled,
                   float* lse, int64_t x_batch, int64_t x_token, int batch, int tokens, int heads, int dim, int warps,
                   int cluster, int splits, cudaStream_t stream) {
  launch_clusters("query_pool: partial kernel", query_pool_partial<T, WIDTH>,
                  dim3(splits * cluster, (heads + HEADS - 1) / HEADS, batch), warps * 32, cluster,
                  shared_bytes(WIDTH, warps, cluster), stream, static_cast<const T*>(x), queries, maxima, sums,
                  partials, x_batch, x_token, tokens, heads, dim, splits, cluster);
  query_pool_merge<<<dim3((dim + 127) / 128, heads, batch), 128, 0, stream>>>(
      maxima, sums, partials, pooled, lse, heads, dim, splits, weight_exponent<T> / LOG2E);
  check(cudaGetLastError(), "query_pool: merge kernel");
}

// Run both kernels on `stream`; pointers as named there. `half`: x is fp16, else bf16.
void query_pool_forward(const void* x, const float* queries, float* maxima, float* sums, float* partials,
                        float* pooled, float* lse, int64_t x_batch, int64_t x_token, int batch, int tokens,
                        int heads, int dim, bool half, int width, int warps, int cluster, int splits,
                        cudaStream_t stream) {
  auto run = [&](auto kernel) {
    kernel(x, queries, maxima, sums, partials, pooled, lse, x_batch, x_token, batch, tokens, heads, dim, warps,
           cluster, splits, stream);
  };
  switch (width) {
    case 64: return half ? run(launch<fp16, 64>) : run(launch<bf16, 64>);
    case 128: return half ? run(launch<fp16, 128>) : run(launch<bf16, 128>);
    case 256: return half ? run(launch<fp16, 256>) : run(launch<bf16, 256>);
    case 320: return half ? run(launch<fp16, 320>) : run(launch<bf16, 320>);
  }
  throw std::runtime_error("query_pool: width is " + std::to_string(width) + ", expected 64, 128, 256 or 320");
}
#endif

}  // namespace prfl_fast
