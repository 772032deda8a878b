// Folded query attention pooling, backward, one pass over x (formulas: kernels/attn/pool.py).
//
// As in the forward, a block, or a cluster of blocks that share D, walks a range of tokens in tiles of 16, and warp w
// owns WIDTH columns of x, which come into registers 16 bytes a load, by way of shared memory, a tile ahead:
//   1. scores x·u and products x·g [16, 8] of all warps meet in shared memory;
//   2. 128 threads turn them into weights p = exp(x·u - lse) and their gradients ds = p (x·g - delta);
//   3. d_u += dsᵀ x takes the registers, transposed by movmatrix;
//      d_x = p g + ds u is stored, 16 bytes a lane.
//
// All products are tf32 mma of tokens or columns (M = 16) and heads (N or K = 8): x, of 8 or 11 bits, is exact in
// tf32, which has the exponents that small gradients need and fp16 lacks. u and g are split in two tf32 for scores
// and products (22 bits), so that p agrees with the forward's lse; p, ds and, for d_x, u and g are rounded to 11 bits.
//
// Fragments: lane 4g+t loads columns 8t..8t+7 of tokens g and g+8 of a 32-column block. Step i (of four) of scores
// takes columns 8t+2i and 8t+2i+1 for its K = t and t+4, tile i of d_x takes them for its N = 2t and 2t+1: a lane
// then has eight adjacent columns of d_x. Rows of u and g are 2 floats longer than a multiple of 32: both ways of
// reading them are free of bank conflicts.
#include "common.cuh"

namespace prfl_fast {

constexpr int TOKENS = 16;                // tokens of a tile
constexpr int HEADS = 8;                  // heads of a block, most that there can be
constexpr int SLOT = HEADS * 20;          // floats of one warp's scores, then the same of its products
constexpr int P_ROW = TOKENS + 8;         // floats of a head's row of weights: no bank conflicts either way
constexpr int PLACES = TOKENS * HEADS;    // threads of step 2
constexpr float LOG2E = 1.4426950408889634f;

// Largest block of a width: WIDTH / 2 registers of a thread hold x and sums.
static constexpr int max_warps(int width) { return width == 256 ? 8 : 12; }

// Bytes of dynamic shared memory: u and g, scores and products of the warps, those of the cluster (two tiles, so that
// one barrier a tile separates writers from readers), weights and their gradients, the next tile of x.
static int64_t shared_bytes(int width, int warps, int cluster) {
  const int64_t vectors = 2 * HEADS * (int64_t(warps) * width + 2);
  const int64_t exchange = cluster > 1 ? 2 * cluster * 2 * PLACES : 0;
  return 4 * (vectors + warps * 2 * SLOT + exchange + 2 * HEADS * P_ROW) + int64_t(warps) * width * TOKENS * 2;
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(max_warps(WIDTH) * 32, 1) query_pool_backward_kernel(
    const T* __restrict__ x,            // [B, L, D], strides x_batch, x_token, 1; rows 16-byte aligned
    const float* __restrict__ queries,  // [H, D]
    const float* __restrict__ grad,     // [B, H, D] gradient of pooled
    const float* __restrict__ lse,      // [B, H]
    const float* __restrict__ delta,    // [B, H] grad · pooled - gradient of lse
    T* __restrict__ d_x,                // [B, L, D] contiguous; null if not needed
    float* __restrict__ partials,       // [B, splits, H, D] sums of ds x; null if not needed
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
  const int64_t batch = blockIdx.z;
  const int columns = warps * WIDTH;
  const int row = columns + 2;
  const int column = rank * columns + warp * WIDTH + 8 * t;  // of this lane in 32-column block 0

  float* vectors = reinterpret_cast<float*>(shared_memory());      // [2, HEADS, row] u, then g
  float* slots = vectors + 2 * HEADS * row;                        // [warps, 2, SLOT]
  float* weights = slots + warps * 2 * SLOT;                       // [2, HEADS, P_ROW] p, then ds
  float* exchange = weights + 2 * HEADS * P_ROW;                   // [2, cluster, 2, PLACES]
  uint4* next = reinterpret_cast<uint4*>(exchange + (cluster > 1 ? 4 * cluster * PLACES : 0));
  next += warp * BLOCKS * 2 * 32 + lane;  // [warps, BLOCKS, 2, 32] of 8 columns

  const int64_t tiles = (tokens + TOKENS - 1) / TOKENS;
  const int tile_begin = int(tiles * split / splits);
  const int tile_end = int(tiles * (split + 1) / splits);

  uint4 x_tile[BLOCKS][2];       // columns 8t..8t+7 of tokens g and g+8, each block
  float sum[BLOCKS][2][4] = {};  // d_u; see the end for which column and head

  // The next tile is on its way to shared memory while this one is in registers. A lane copies what it will read.
  const T* source = x + batch * x_batch + column + int64_t(tile_begin * TOKENS + g) * x_token;
  const int end = tokens < tile_end * TOKENS ? tokens : tile_end * TOKENS;
  auto fetch = [&](int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = tile * TOKENS + g + 8 * half < end;
#pragma unroll
      for (int j = 0; j < BLOCKS; ++j) {
        copy_async(next + (2 * j + half) * 32, source + 32 * j, inside && column + 32 * j < dim);
      }
      source += 8 * x_token;
    }
  };

  fetch(tile_begin);
  for (int h = warp; h < HEADS; h += warps) {
    for (int c = lane; c < columns; c += 32) {
      const int d = rank * columns + c;
      const bool inside = h < heads && d < dim;
      vectors[h * row + c] = inside ? queries[int64_t(h) * dim + d] : 0.0f;
      vectors[(HEADS + h) * row + c] = inside ? grad[(batch * heads + h) * dim + d] : 0.0f;
    }
  }
  const int my_head = threadIdx.x / TOKENS;  // of step 2
  const int my_token = threadIdx.x % TOKENS;
  const bool stands = threadIdx.x < PLACES && my_head < heads;
  const float my_lse = stands ? lse[batch * heads + my_head] : INFINITY;
  const float my_delta = stands ? delta[batch * heads + my_head] : 0.0f;
  __syncthreads();
  if (cluster > 1) cluster_sync();  // the others must run before their shared memory is written

  for (int tile = tile_begin; tile < tile_end; ++tile) {
    wait_for_copies();
#pragma unroll
    for (int j = 0; j < 2 * BLOCKS; ++j) x_tile[j / 2][j % 2] = next[j * 32];
    float s[2][4] = {}, gx[2][4] = {};  // low and high halves of u and g
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const uint32_t a[4] = {x_tile[j][0].x, x_tile[j][0].y, x_tile[j][0].z, x_tile[j][0].w};
      const uint32_t b[4] = {x_tile[j][1].x, x_tile[j][1].y, x_tile[j][1].z, x_tile[j][1].w};
      const float* place = vectors + g * row + warp * WIDTH + 32 * j + 8 * t;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float a0, a1, a2, a3;
        unpack<T>(a[i], a0, a2);
        unpack<T>(b[i], a1, a3);
        const float2 u = *reinterpret_cast<const float2*>(place + 2 * i);
        const float2 v = *reinterpret_cast<const float2*>(place + HEADS * row + 2 * i);
        const float u0 = truncate_tf32(u.x), u1 = truncate_tf32(u.y);
        const float v0 = truncate_tf32(v.x), v1 = truncate_tf32(v.y);
        mma_tf32(s[0], a0, a1, a2, a3, u.x - u0, u.y - u1);
        mma_tf32(s[1], a0, a1, a2, a3, u0, u1);
        mma_tf32(gx[0], a0, a1, a2, a3, v.x - v0, v.y - v1);
        mma_tf32(gx[1], a0, a1, a2, a3, v0, v1);
      }
    }
    fetch(tile + 1);
    float* slot = slots + warp * 2 * SLOT;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = (2 * t + i % 2) * 20 + g + 8 * (i / 2);  // head, token
      slot[place] = s[0][i] + s[1][i];
      slot[SLOT + place] = gx[0][i] + gx[1][i];
    }
    __syncthreads();

    float score = 0.0f, product = 0.0f;
    if (threadIdx.x < PLACES) {
      const float* place = slots + my_head * 20 + my_token;
      for (int w = 0; w < warps; ++w) {
        score += place[w * 2 * SLOT];
        product += place[w * 2 * SLOT + SLOT];
      }
    }
    if (cluster > 1) {
      const int parity = (tile - tile_begin) & 1;
      float* place = exchange + parity * cluster * 2 * PLACES + threadIdx.x;
      if (threadIdx.x < PLACES) {
        for (int r = 0; r < cluster; ++r) {
          float* there = cluster_address(place + rank * 2 * PLACES, r);
          there[0] = score;
          there[PLACES] = product;
        }
      }
      cluster_sync();
      if (threadIdx.x < PLACES) {
        score = product = 0.0f;
        for (int r = 0; r < cluster; ++r) {
          score += place[r * 2 * PLACES];
          product += place[r * 2 * PLACES + PLACES];
        }
      }
    }
    if (threadIdx.x < PLACES) {
      const bool inside = stands && tile * TOKENS + my_token < tokens;
      const float p = inside ? exp2f((score - my_lse) * LOG2E) : 0.0f;
      float* place = weights + my_head * P_ROW + my_token;
      place[0] = round_tf32(p);
      place[HEADS * P_ROW] = inside ? round_tf32(p * (product - my_delta)) : 0.0f;
    }
    __syncthreads();

    const float* d_scores = weights + HEADS * P_ROW;
    const float2 ds0 = *reinterpret_cast<const float2*>(d_scores + g * P_ROW + 2 * t);      // tokens 2t, 2t+1
    const float2 ds1 = *reinterpret_cast<const float2*>(d_scores + g * P_ROW + 2 * t + 8);  // tokens 2t+8, 2t+9
    float p[4], ds[4];  // tokens g, g+8 of head t, then of head t+4
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = (t + 4 * (i / 2)) * P_ROW + g + 8 * (i % 2);
      p[i] = weights[place];
      ds[i] = d_scores[place];
    }
    const int token = tile * TOKENS + g;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      if (partials != nullptr) {
        const uint32_t a[4] = {x_tile[j][0].x, x_tile[j][0].y, x_tile[j][0].z, x_tile[j][0].w};
        const uint32_t b[4] = {x_tile[j][1].x, x_tile[j][1].y, x_tile[j][1].z, x_tile[j][1].w};
#pragma unroll
        for (int q = 0; q < 2; ++q) {
          float a0, a1, a2, a3;
          unpack<T>(movmatrix(a[2 * q]), a0, a2);
          unpack<T>(movmatrix(a[2 * q + 1]), a1, a3);
          mma_tf32(sum[j][q], a0, a1, a2, a3, ds0.x, ds0.y);
          unpack<T>(movmatrix(b[2 * q]), a0, a2);
          unpack<T>(movmatrix(b[2 * q + 1]), a1, a3);
          mma_tf32(sum[j][q], a0, a1, a2, a3, ds1.x, ds1.y);
        }
      }
      if (d_x != nullptr) {
        const float* place = vectors + t * row + warp * WIDTH + 32 * j + 8 * (g / 2) + g % 2;
        uint32_t words[2][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* u = place + 2 * i;
          const float* v = u + HEADS * row;
          float c[4] = {};
          mma_tf32(c, p[0], p[1], p[2], p[3], round_tf32(v[0]), round_tf32(v[4 * row]));
          mma_tf32(c, ds[0], ds[1], ds[2], ds[3], round_tf32(u[0]), round_tf32(u[4 * row]));
          words[0][i] = pack<T>(c[0], c[1]);
          words[1][i] = pack<T>(c[2], c[3]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (token + 8 * half < tokens && column + 32 * j < dim) {
            T* out = d_x + (batch * tokens + token + 8 * half) * dim + column + 32 * j;
            store_vector(out, uint4{words[half][0], words[half][1], words[half][2], words[half][3]});
          }
        }
      }
    }
  }

  // Row g of movmatrix's result is column g of its input: column 8(g/2) + g%2 of the block, plus 2 for each 32-bit
  // word. Sum [j][q][i] is that column plus 2(2q + i/2), for head 2t + i%2.
  if (partials == nullptr) return;
  const int64_t part = batch * splits + split;
  const int first_column = column - 8 * t + 8 * (g / 2) + g % 2;
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int head = 2 * t + i % 2;
        const int d = first_column + 32 * j + 2 * (2 * q + i / 2);
        if (head < heads && d < dim) partials[(part * heads + head) * dim + d] = sum[j][q][i];
      }
    }
  }
}

#ifndef PRFL_FAST_EMULATE
template <typename T, int WIDTH>
static void launch(const void* x, const float* queries, const float* grad, const float* lse, const float* delta,
                   void* d_x, float* partials, int64_t x_batch, int64_t x_token, int batch, int tokens, int heads,
                   int dim, int warps, int cluster, int splits, cudaStream_t stream) {
  launch_clusters("query_pool_backward", query_pool_backward_kernel<T, WIDTH>, dim3(splits * cluster, 1, batch),
                  warps * 32, cluster, shared_bytes(WIDTH, warps, cluster), stream, static_cast<const T*>(x), queries,
                  grad, lse, delta, static_cast<T*>(d_x), partials, x_batch, x_token, tokens, heads, dim, splits,
                  cluster);
}

// Run the kernel on `stream`; pointers as named there. `half`: x is fp16, else bf16.
void query_pool_gradients(const void* x, const float* queries, const float* grad, const float* lse,
                          const float* delta, void* d_x, float* partials, int64_t x_batch, int64_t x_token, int batch,
                          int tokens, int heads, int dim, bool half, int width, int warps, int cluster, int splits,
                          cudaStream_t stream) {
  auto run = [&](auto kernel) {
    kernel(x, queries, grad, lse, delta, d_x, partials, x_batch, x_token, batch, tokens, heads, dim, warps, cluster,
           splits, stream);
  };
  switch (width) {
    case 64: return half ? run(launch<fp16, 64>) : run(launch<bf16, 64>);
    case 128: return half ? run(launch<fp16, 128>) : run(launch<bf16, 128>);
    case 256: return half ? run(launch<fp16, 256>) : run(launch<bf16, 256>);
  }
  throw std::runtime_error("query_pool_backward: width is " + std::to_string(width) + ", expected 64, 128 or 256");
}
#endif

}  // namespace prfl_fast
