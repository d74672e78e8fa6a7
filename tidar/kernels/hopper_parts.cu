// What `hopper.cu` is made of; behind its constants.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct alignas(64) Map { char bytes[128]; };
struct Sizes {
  int count, features, steps, tiles, chunks, squares_row, out_row, behind, x_bytes;
  float over_depth, eps, again;
};
enum { PLAIN, GATED, ADD };
enum { EARLY = 1, LATE };  // as in pdl.py

static_assert(DEPTH == 64, "a row of a tile is 128 bytes, the widest swizzle");
constexpr int GROUPS = ROWS / 64;                       // warp groups that multiply
constexpr int TAKEN = KIND == GATED ? COLS / 2 : COLS;  // columns of the result
constexpr int X_BYTES = ROWS * 128, W_BYTES = COLS * 128, STAGE = X_BYTES + W_BYTES;
constexpr bool SHARED_OUT = KIND == ADD || SPLITS > 1;  // sums are joined, or a row is read by one warp
constexpr int SUMS = SPLITS > 1 ? STAGES * STAGE : 0;   // where sums are joined: behind the tiles, or in their place
constexpr int SHARE = ROWS / SPLITS;                    // rows whose sums a split joins
constexpr int LANES = TAKEN > 64 ? 32 : TAKEN > 32 ? 16 : 8, PARTS = (TAKEN + 127) / 128;  // of a row, 4 columns each
constexpr int LINES_A_TRIP = 4 * GROUPS * (32 / LANES), TRIPS = (SHARE + LINES_A_TRIP - 1) / LINES_A_TRIP;
constexpr int BATCH = TRIPS < 8 ? TRIPS : 8;            // rows that a thread asks for at once

__device__ __forceinline__ u32 in_shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}"
      :: "r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

__device__ __forceinline__ void release() {  // the next kernel may start
#if PDL
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In front of it nobody writes sums: of a split, before it has begun; else before the tiles in their place are read.
__device__ __forceinline__ void before_sums() {
  if (SPLITS > 1)
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  else
    __syncthreads();
}

__device__ __forceinline__ void behind_sums() {  // all threads of all splits see each other's
  if (SPLITS > 1)
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  else
    __syncthreads();
}

__device__ __forceinline__ void prefetch(const Map* map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

__device__ __forceinline__ void load_tile(u32 to, const Map* map, int column, int row, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], %5;"
      :: "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "l"(policy) : "memory");
}

// A tile of rows of 128 bytes as the matrix instructions want it described: swizzled, 8 rows every 1024 bytes.
__device__ __forceinline__ u64 descriptor(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

#if HALF
__device__ __forceinline__ u32 narrow(float low, float high) {
  u32 both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ float widened(u16 one) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(one));
  return value;
}
#else
__device__ __forceinline__ u32 narrow(float low, float high) {
  u32 both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ float widened(u16 one) { return __uint_as_float((u32)one << 16); }
#endif

__device__ __forceinline__ uint2 narrow(float4 v) { return make_uint2(narrow(v.x, v.y), narrow(v.z, v.w)); }
__device__ __forceinline__ float4 widened(uint2 v) {
  return make_float4(widened((u16)v.x), widened((u16)(v.x >> 16)), widened((u16)v.y), widened((u16)(v.y >> 16)));
}
__device__ __forceinline__ float4 plus(float4 v, uint2 more) {
  const float4 w = widened(more);
  return make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
}
__device__ __forceinline__ float squared_sum(float4 v) { return v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w; }
__device__ __forceinline__ float gate(float g, float u) { return __fdividef(g, 1.0f + __expf(-g)) * u; }
__device__ __forceinline__ float4 gate(float4 g, float4 u) {
  return make_float4(gate(g.x, u.x), gate(g.y, u.y), gate(g.z, u.z), gate(g.w, u.w));
}

// Four sums of a row, of all splits in their order, times its scale.
__device__ __forceinline__ float4 joined(const char* sums, int line, int column, float by) {
  float4 v = *(const float4*)(sums + (line * PITCH + column) * 4);
  #pragma unroll
  for (int split = 1; split < SPLITS; ++split) {
    const float4 w = *(const float4*)(sums + ((split * SHARE + line) * PITCH + column) * 4);
    v = make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
  }
  return make_float4(v.x * by, v.y * by, v.z * by, v.w * by);
}

// The sum of a row's chunks of squares, asked for together.
__device__ __forceinline__ float chunks_of(const float* squares, int row, const Sizes& s) {
  float sum = 0.0f;
  for (int first = 0; first < s.chunks; first += 16)
    #pragma unroll
    for (int n = 0; n < 16; ++n)
      sum += first + n < s.chunks ? squares[(long long)(first + n) * s.squares_row + row] : 0.0f;
  return sum;
}
