// A matrix product of few rows with what stands before and behind it, for Hopper GPUs.
//
// What it computes and what its arguments are, `hopper.py` says; `hopper_code.py` puts the constants in capitals,
// the instruction `multiply` and `hopper_parts.cu` in front.
//
// A program is one warp group that brings tiles by the tensor memory accelerator, through a ring in shared memory, and
// GROUPS that multiply: rows of x are the left side of the matrix instructions, rows of the weight the right one.
// Several programs may share the depth of a tile (SPLITS, a cluster). Each is then given its share of the rows by all
// of them, through their shared memories, and adds the sums up in the order of the splits.

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1) hopper_product(
    const __grid_constant__ Map x_map, const __grid_constant__ Map w_map, void* out, const u16* bias,
    const float* squares, const float* weighed, const u16* norm, u16* scaled, float* squared, float* weighed_squared,
    const Sizes s) {
  extern __shared__ char unaligned[];
  __shared__ alignas(8) u64 barriers[2 * STAGES];
  __shared__ float inverse[ROWS], twice[AGAIN ? ROWS : 1];
  const u32 tiles_at = (in_shared(unaligned) + 1023) & ~1023u;
  const u32 sums_at = tiles_at + SUMS;
  const char* sums = unaligned + (sums_at - in_shared(unaligned));
  const u32 full = in_shared(barriers), empty = full + 8 * STAGES;
  const int thread = threadIdx.x, group = thread / 128 - 1, split = blockIdx.x % SPLITS, top = blockIdx.y * ROWS;
  const int from = s.steps * split / SPLITS, until = s.steps * (split + 1) / SPLITS;
  const int first_tile = blockIdx.x / SPLITS, tile_step = gridDim.x / SPLITS;

  if (thread == 0) {
    prefetch(&w_map), prefetch(&x_map);
    for (int n = 0; n < STAGES; ++n) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(full + 8 * n));
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(empty + 8 * n), "n"(GROUPS));
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (PDL == EARLY) release();
  }
  __syncthreads();
  if (SPLITS > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // this program has begun

  if (group < 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(FEW_REGISTERS));
    if (thread == 0) {
      u64 evict_first, evict_last;  // x is kept in the L2 cache: all programs read it
      asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(evict_first));
      asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(evict_last));
      int step = 0, asked = 0;
      bool ready = !PDL;  // x is made by the kernel ahead; the weight may come before that has ended
      auto ask = [&](int n, int k) {
        load_tile(tiles_at + n % STAGES * STAGE, &x_map, k * DEPTH, top, full + 8 * (n % STAGES), evict_last);
      };
      for (int tile = first_tile; tile < s.tiles; tile += tile_step) {
        for (int k = from; k < until; ++k, ++step) {
          const u32 slot = step % STAGES, to = tiles_at + slot * STAGE + X_BYTES, arrived = full + 8 * slot;
          wait(empty + 8 * slot, (step / STAGES & 1) ^ 1);
          asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(arrived), "r"(W_BYTES + s.x_bytes)
                       : "memory");
          load_tile(to, &w_map, k * DEPTH, tile * TAKEN, arrived, evict_first);
          if (KIND == GATED)
            load_tile(to + W_BYTES / 2, &w_map, k * DEPTH, s.features + tile * TAKEN, arrived, evict_first);
          if (ready) {
            ask(step, k);
          } else if (step == STAGES - 1 || k == until - 1) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            ready = true;
            for (; asked <= step; ++asked) ask(asked, from + asked);
          }
        }
      }
    }
    if (SHARED_OUT) {
      __syncwarp();
      before_sums();
      behind_sums();
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(MANY_REGISTERS));
#if PDL
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  const int lane = thread % 32, warp = thread / 32 % 4, own = group * 64;
  if (SQUARES) {
    const int line = own + thread % 64, row = min(top + line, s.count - 1);  // two threads, one result
    const float mean = chunks_of(squares, row, s) * s.over_depth + s.eps;
    inverse[line] = rsqrtf(mean);
    if (AGAIN) twice[line] = rsqrtf(chunks_of(weighed, row, s) * s.over_depth + s.again * mean);
    asm volatile("bar.sync %0, 128;" :: "r"(group + 1) : "memory");
  }
  // Where sums are joined, a lane has four columns of a row, a warp one row or several. What they are added to and
  // weighed by is asked for now, long before they are there.
  const int in_row = lane % LANES * 4, column = first_tile * TAKEN + in_row;
  const int first_line = (thread - 128) / 32 * (32 / LANES) + lane / LANES;
  uint2 before[BATCH][PARTS], heavy[PARTS], more[1 + (KIND == GATED)][PARTS];
  auto load_residual = [&](int trip) {
    #pragma unroll
    for (int n = 0; n < BATCH; ++n)
      #pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const int line = first_line + (trip + n) * LINES_A_TRIP, row = top + split * SHARE + line;
        const int f = column + part * 128;
        const bool real = line < SHARE && row < s.count && in_row + part * 128 < TAKEN && f < s.features;
        before[n][part] = real ? *(const uint2*)((const u16*)out + (long long)row * s.out_row + f) : make_uint2(0, 0);
      }
  };
  if (KIND == ADD) load_residual(0);
  #pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int f = column + part * 128;
    if (!SHARED_OUT || in_row + part * 128 >= TAKEN || f >= s.features) continue;
    if (NORM) heavy[part] = *(const uint2*)(norm + f);
    if (BIAS) more[0][part] = *(const uint2*)(bias + f);
    if (BIAS && KIND == GATED) more[KIND == GATED][part] = *(const uint2*)(bias + s.features + f);
  }
  float acc[COLS / 2];
  int step = 0;
  for (int tile = first_tile; tile < s.tiles; tile += tile_step) {
    for (int k = from; k < until; ++k, ++step) {
      const u32 slot = step % STAGES, at = tiles_at + slot * STAGE;
      wait(full + 8 * slot, step / STAGES & 1);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      #pragma unroll
      for (int d = 0; d < DEPTH / 16; ++d)
        multiply(acc, descriptor(at + own * 128) + 2 * d, descriptor(at + X_BYTES) + 2 * d, k > from || d > 0);
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
      if (k > from && thread % 128 == 0) arrive(empty + 8 * ((step - 1) % STAGES));
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    #pragma unroll
    for (int n = 0; n < COLS / 2; ++n) asm volatile("" : "+f"(acc[n]));  // sums are read behind the wait only
    if (thread % 128 == 0) {
      arrive(empty + 8 * ((step - 1) % STAGES));
      if (PDL == LATE) release();
    }
    if (SHARED_OUT) break;

    // A thread has two neighbouring columns in each 8, of a row and of the eighth row behind it.
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int line = own + warp * 16 + half * 8 + lane / 4, row = top + line, q = lane % 4;
      const bool real = row < s.count;
      u32 pairs[TAKEN / 8];
      #pragma unroll
      for (int b = 0; b < TAKEN / 8; ++b) {
        const int column = tile * TAKEN + b * 8 + q * 2;
        const bool inside = column < s.features;
        const float by = AGAIN && column >= s.behind ? twice[line] : SQUARES ? inverse[line] : 1.0f;
        float low = acc[4 * b + 2 * half] * by, high = acc[4 * b + 2 * half + 1] * by;
        if (BIAS && inside) low += widened(bias[column]), high += widened(bias[column + 1]);
        if (KIND == GATED) {
          float up = acc[COLS / 4 + 4 * b + 2 * half] * by, next = acc[COLS / 4 + 4 * b + 2 * half + 1] * by;
          const u16* b_up = bias + s.features + column;
          if (BIAS && inside) up += widened(b_up[0]), next += widened(b_up[1]);
          low = gate(low, up), high = gate(high, next);
        }
        if (!WIDE)
          pairs[b] = narrow(low, high);
        else if (real && inside)
          *(float2*)((float*)out + (long long)row * s.out_row + column) = make_float2(low, high);
      }
      if (WIDE) continue;
      // Lane q of four holds pair q of each 8 columns; four such are turned, so that each lane stores 8 columns.
      u16* place = (u16*)out + (long long)row * s.out_row + tile * TAKEN;
      auto swap = [&](u32& a, u32& b, int with) {
        const u32 given = __shfl_xor_sync(~0u, q & with ? a : b, with);
        (q & with ? a : b) = given;
      };
      #pragma unroll
      for (int b = 0; b + 4 <= TAKEN / 8; b += 4) {
        u32 w0 = pairs[b], w1 = pairs[b + 1], w2 = pairs[b + 2], w3 = pairs[b + 3];
        swap(w0, w1, 1), swap(w2, w3, 1), swap(w0, w2, 2), swap(w1, w3, 2);
        const bool inside = tile * TAKEN + (b + q) * 8 < s.features;
        if (real && inside) *(uint4*)(place + (b + q) * 8) = make_uint4(w0, w1, w2, w3);
      }
      #pragma unroll
      for (int b = TAKEN / 32 * 4; b < TAKEN / 8; ++b)
        if (real && tile * TAKEN + b * 8 < s.features) *(u32*)(place + b * 8 + q * 2) = pairs[b];
    }
  }
  if (!SHARED_OUT) return;

  before_sums();
  {
    const int line = own + warp * 16;
    u32 to = sums_at + ((split * SHARE + line % SHARE + lane / 4) * PITCH + lane % 4 * 2) * 4;
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(to) : "r"(line / SHARE));
    #pragma unroll
    for (int b = 0; b < COLS / 8; ++b)
      #pragma unroll
      for (int half = 0; half < 2; ++half)
        asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" :: "r"(to + (half * 8 * PITCH + b * 8) * 4),
                     "f"(acc[4 * b + 2 * half]), "f"(acc[4 * b + 2 * half + 1]) : "memory");
  }
  behind_sums();
  for (int trip = 0; trip < TRIPS; trip += BATCH) {
    if (KIND == ADD && trip > 0) load_residual(trip);
    #pragma unroll
    for (int n = 0; n < BATCH; ++n) {
      const int line = first_line + (trip + n) * LINES_A_TRIP, row = top + split * SHARE + line;
      const bool real = line < SHARE && row < s.count;
      const float by = SQUARES && real ? inverse[split * SHARE + line] : 1.0f;
      float sum = 0.0f, second = 0.0f;
      #pragma unroll
      for (int part = 0; part < PARTS; ++part) {
        const int at = in_row + part * 128, f = column + part * 128;
        if (!real || at >= TAKEN || f >= s.features) continue;
        float4 v = joined(sums, line, at, AGAIN && f >= s.behind ? twice[split * SHARE + line] : by);
        if (BIAS) v = plus(v, more[0][part]);
        if (KIND == GATED) {
          float4 up = joined(sums, line, at + TAKEN, by);
          if (BIAS) up = plus(up, more[KIND == GATED][part]);
          v = gate(v, up);
        }
        const long long place = (long long)row * s.out_row + f;
        if (WIDE) {
          *(float4*)((float*)out + place) = v;
          continue;
        }
        if (KIND == ADD) v = plus(v, before[n][part]);
        const uint2 rounded = narrow(v);
        *(uint2*)((u16*)out + place) = rounded;
        if (!NORM) continue;
        const float4 x = widened(rounded), w = widened(heavy[part]);  // as rounded: all see one x
        const uint2 weighed_x = narrow(make_float4(x.x * w.x, x.y * w.y, x.z * w.z, x.w * w.w));
        *(uint2*)(scaled + (long long)row * s.features + f) = weighed_x;
        sum += squared_sum(x);
        if (TWICE) second += squared_sum(widened(weighed_x));
      }
      if (!NORM) continue;
      #pragma unroll
      for (int away = LANES / 2; away; away /= 2) {
        sum += __shfl_xor_sync(~0u, sum, away);
        if (TWICE) second += __shfl_xor_sync(~0u, second, away);
      }
      if (lane % LANES == 0 && real) {
        squared[(long long)first_tile * s.count + row] = sum;
        if (TWICE) weighed_squared[(long long)first_tile * s.count + row] = second;
      }
    }
  }
}
