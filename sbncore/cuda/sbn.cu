// Sampled batch normalization: sums, normalize, repair, and a fused forward and backward, over raw memory.
//
//   sums_of_places  the sums over the places drawn                    reads the sample
//   sums            the sums over everything, dx = scale * g          reads x, dy     writes dx    (backward)
//   normalize       y = act(z)                                        reads x         writes y     (forward)
//   repair_places   dx at the places drawn                            reads, writes the sample
//   repair          dx everywhere: full batch normalization           reads x, dy     writes dx
//   forward         sums_of_places, then normalize, by a cluster of blocks for each group of channels
//   backward        sums, then repair_places, likewise
//
// z = (x - shift) * scale + offset (+ residual), shift being the mean rounded to the arithmetic's type. Sums
// are of g and g * (x - shift), in float32 (float64 for float64) within a block, in float64 over blocks;
// their order is fixed by the launch, and nothing is atomic. The state of a channel is float64.
//
// The pass over everything sees rows of columns: channels-first memory as (N, C * S), channels-last as
// (N * S, C), a column being V elements, one access of 16 bytes. A thread keeps to one column and takes
// UNROLL rows at a time, so that its coefficients stay in registers and as many loads are in flight: one set
// where the column lies in one channel (FIRST), two where it may straddle a seam (SEAMED), V in channels-last.

// From the threads' sums to the block's.

// Leaves in the first row of threads what its column's threads have summed.
template <class A>
__device__ void sum_rows(Shared<A>& shared, const typename A::real first[], const typename A::real second[], int TX) {
    const int t = threadIdx.x, threads = blockDim.x, ty = t / TX;
    for (int k = 0; k < A::K; ++k) {
        shared.sum[k * threads + t] = first[k];
        shared.sum[(A::K + k) * threads + t] = second[k];
    }
    block_barrier();
    for (int rows = threads / TX; rows > 1;) {
        const int half = (rows + 1) / 2;
        if (ty < rows - half)
            for (int j = 0; j < 2 * A::K; ++j) shared.sum[j * threads + t] += shared.sum[j * threads + t + half * TX];
        block_barrier();
        rows = half;
    }
}

// put(which sum, local channel, value) where each column holds K channels of its own.
template <class A, class Put>
__device__ void sums_by_column(Shared<A>& shared, const typename A::real first[], const typename A::real second[],
                               int TX, Put put) {
    sum_rows(shared, first, second, TX);
    for (int o = threadIdx.x; o < 2 * A::K * TX; o += blockDim.x)
        put(o / TX / A::K, (i64)(o % TX) * A::K + o / TX % A::K, shared.sum[o / TX * blockDim.x + o % TX]);
}

// The same in channels-first memory, where several columns share a channel.
template <class A, class Put>
__device__ void sums_by_channel(Shared<A>& shared, const Call& call, const typename A::real first[],
                                const typename A::real second[], Channels channels, Put put) {
    typedef typename A::real real;
    const int t = threadIdx.x, threads = blockDim.x, TX = (int)call.tile;
    const int helpers = threads < HELPERS ? 1 : HELPERS, groups = threads / helpers, helper = t % helpers;
    sum_rows(shared, first, second, TX);
    for (i64 base = 0; base < channels.count; base += groups) {
        const i64 local = base + t / helpers;
        const bool mine = t / helpers < groups && local < channels.count;
        double total[2] = {0, 0};
        if (mine) {
            i64 from = (channels.first + local) * call.S - channels.element;
            i64 to = (from + call.S - 1) / A::V;
            from = from < 0 ? 0 : from / A::V;
            if (to >= TX) to = TX - 1;
            for (i64 column = from + helper; column <= to; column += helpers) {
                const bool behind_seam = channel_at<A>(call, channels.element + column * A::V) != channels.first + local;
                for (int w = 0; w < 2; ++w)
                    total[w] += (double)shared.sum[(w * A::K + (behind_seam ? A::K - 1 : 0)) * threads + column];
            }
        }
        shared.help[0][t] = total[0];
        shared.help[1][t] = total[1];
        block_barrier();
        if (mine && helper == 0)
            for (int w = 0; w < 2; ++w) {
                for (int k = 1; k < helpers; ++k) total[w] += shared.help[w][t + k];
                put(w, local, (real)total[w]);
            }
        block_barrier();
    }
}

// Parallel: a block is a tile of columns times a share of the rows; see sbncore.cuda.geometry.
__device__ inline Share share_of(i64 tiles, i64 blocks) { return {blockIdx.x % tiles, blockIdx.x / tiles, blocks}; }

// A tile's columns owned by this block, of which it alone writes the state and the gradients.
template <class A> __device__ bool owns(const Call& call, Share share, Channels channels, i64 channel) {
    const bool begins_here = A::LAYOUT == LAST || channel * call.S >= channels.element;
    return share.block == 0 && channel < call.C && begins_here;
}

template <class A, class Prepare>
__device__ void prepare_tile(Shared<A>& shared, const Call& call, Share share, bool totals, Prepare prepare) {
    const Channels channels = channels_of<A>(call, share.tile);
    each_channel(
        shared, channels.count,
        [&](i64 local, int helper, int helpers, double total[2]) {
            if (totals) gather<A>(call, (channels.first + local) % call.C, helper, helpers, total);
        },
        [&](i64 local, double total[2]) {
            const i64 channel = channels.first + local;
            prepare(local, channel % call.C, owns<A>(call, share, channels, channel), total);
        });
}

__device__ inline void keep_step(const Call& call) {
    if (call.step && call.step_kept && blockIdx.x == 0 && threadIdx.x == 0) store(call.step_kept, load(call.step));
}

template <class T, int V, Layout L, Mode M, bool SUM> __global__ void __launch_bounds__(THREADS, 2) sums(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.tiles, call.blocks);
    prepare_tile(shared, call, share, false, [&](i64 local, i64 c, bool, double*) {
        if (M == MOMENTS) shared.table[SHIFT][local] = shift_of<A>(call, c);
        else set_table(shared, call, local, c);
    });
    real first[A::K] = {}, second[A::K] = {};
    sweep<A, M, SUM, false>(shared, call, share, first, second);
    if (!SUM) return;
    const Channels channels = channels_of<A>(call, share.tile);
    const auto put = [&](int w, i64 local, real value) {
        const i64 slot = channels.first + local + (L == LAST ? 0 : share.tile);
        if (local < channels.count) store((real*)call.partial + (share.block * 2 + w) * call.slots + slot, value);
    };
    if (L == LAST) sums_by_column(shared, first, second, (int)call.tile, put);
    else sums_by_channel(shared, call, first, second, channels, put);
}

template <class T, int V, Layout L, bool ACTIVATE, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS, 2) normalize(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.tiles, call.blocks);
    keep_step(call);
    prepare_tile(shared, call, share, call.prior < 1, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_forward(shared, call, local, c, owner, total);
    });
    normalize_everywhere<A, ACTIVATE, RESIDUAL>(shared, call, share);
}

template <class T, int V, Layout L, Mode M> __global__ void __launch_bounds__(THREADS, 2) repair(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.tiles, call.blocks);
    prepare_tile(shared, call, share, true, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_backward(shared, call, local, c, owner, total);
    });
    sweep<A, M, false, true>(shared, call, share, 0, 0);
}

// The channels of a tile of the pass over places, and prepare(local, channel, owner, totals) for each.
template <class A, class Prepare>
__device__ void prepare_places(Shared<A>& shared, const Call& call, Share share, bool totals, Prepare prepare) {
    const i64 begin = share.tile * call.place_tile * A::V, left = call.C - begin;
    each_channel(
        shared, left < call.place_tile * A::V ? left : call.place_tile * A::V,
        [&](i64 local, int helper, int helpers, double total[2]) {
            if (totals) gather<A>(call, begin + local, helper, helpers, total);
        },
        [&](i64 local, double total[2]) { prepare(local, begin + local, share.block == 0, total); });
}

template <class T, int V, Layout L, Mode M> __global__ void __launch_bounds__(THREADS, 1) sums_of_places(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.place_tiles, call.place_blocks);
    prepare_places(shared, call, share, false, [&](i64 local, i64 c, bool, double*) {
        if (M == MOMENTS) shared.table[SHIFT][local] = shift_of<A>(call, c);
        else set_table(shared, call, local, c);
    });
    const int TX = (int)call.place_tile, tx = threadIdx.x % TX;
    const i64 column = share.tile * TX + tx;
    real first[A::K] = {}, second[A::K] = {};
    if (column * V < call.C) {
        Lane<A> lane;
        lane.take(shared, tx * V, V, M == MOMENTS ? 1 : 3);
        sum_places<A, M>(lane, call, share, column, threadIdx.x / TX, blockDim.x / TX, first, second);
    }
    sums_by_column(shared, first, second, TX, [&](int w, i64 local, real value) {
        const i64 c = share.tile * TX * V + local;
        if (c < call.C) store((real*)call.partial + (share.block * 2 + w) * call.C + c, value);
    });
}

template <class T, int V, Layout L, Mode M> __global__ void __launch_bounds__(THREADS, 1) repair_places(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    SHARED(Shared<A>, shared);
    const Share share = share_of(call.place_tiles, call.place_blocks);
    prepare_places(shared, call, share, true, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_backward(shared, call, local, c, owner, total);
    });
    const int TX = (int)call.place_tile, tx = threadIdx.x % TX;
    const i64 column = share.tile * TX + tx;
    if (column * V >= call.C) return;
    Lane<A> lane;
    lane.take(shared, tx * V, V, COEFFICIENTS);
    repair_at_places<A, M>(lane, call, share, column, threadIdx.x / TX, blockDim.x / TX);
}

// A cluster's share: its blocks take the rows, and the places, of one group of channels.
__device__ inline Share share_of_cluster() { return {blockIdx.x / BLOCKS, blockIdx.x % BLOCKS, BLOCKS}; }

// Every block adds up the sums of its cluster's blocks, then prepares all channels of the group.
template <class A, class Prepare>
__device__ void prepare_cluster(Shared<A>& shared, const Call& call, Share share, Prepare prepare) {
    const Channels channels = channels_of<A>(call, share.tile);
    cluster_barrier();
    each_channel(
        shared, channels.count,
        [&](i64 local, int helper, int helpers, double total[2]) {
            for (int rank = helper; rank < BLOCKS; rank += helpers)
                for (int w = 0; w < 2; ++w) total[w] += (double)of_rank(&shared.exchange[w][local], rank);
        },
        [&](i64 local, double total[2]) { prepare(local, channels.first + local, share.block == 0, total); });
    cluster_barrier();  // no block leaves, or writes its sums anew, while another reads them
}

template <class T, int V, Layout L, bool ACTIVATE, bool RESIDUAL>
__global__ void CLUSTER(BLOCKS) __launch_bounds__(THREADS, 2) forward(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef Access<T, 1, FIRST> Single;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    const Share share = share_of_cluster();
    const Channels channels = channels_of<A>(call, share.tile);
    keep_step(call);
    each_channel(shared, channels.count, [](i64, int, int, double*) {}, [&](i64 local, double*) {
        shared.table[SHIFT][local] = shift_of<A>(call, channels.first + local);
    });
    real first[A::K] = {}, second[A::K] = {};
    const auto put = [&](int w, i64 local, real value) { shared.exchange[w][local] = value; };
    if (call.parts) {
        const int TX = (int)channels.count, tx = threadIdx.x % TX, TY = blockDim.x / TX, ty = threadIdx.x / TX;
        Lane<Single> lane;
        lane.value[SHIFT][0] = shared.table[SHIFT][tx];
        if (ty < TY) sum_places<Single, MOMENTS>(lane, call, share, channels.first + tx, ty, TY, first, second);
        sum_rows(shared, first, second, TX);
        for (int o = threadIdx.x; o < 2 * TX; o += blockDim.x)
            put(o / TX, o % TX, shared.sum[o / TX * A::K * blockDim.x + o % TX]);
    } else {
        sweep<A, MOMENTS, true, false>(shared, call, share, first, second);
        sums_by_channel(shared, call, first, second, channels, put);
    }
    prepare_cluster(shared, call, share, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_forward(shared, call, local, c, owner, total);
    });
    normalize_everywhere<A, ACTIVATE, RESIDUAL>(shared, call, share);
}

template <class T, int V, Layout L, Mode M>
__global__ void CLUSTER(BLOCKS) __launch_bounds__(THREADS, 2) backward(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef Access<T, 1, FIRST> Single;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    const Share share = share_of_cluster();
    const Channels channels = channels_of<A>(call, share.tile);
    each_channel(shared, channels.count, [](i64, int, int, double*) {}, [&](i64 local, double*) {
        set_table(shared, call, local, channels.first + local);
    });
    real first[A::K] = {}, second[A::K] = {};
    sweep<A, M, true, false>(shared, call, share, first, second);
    sums_by_channel(shared, call, first, second, channels, [&](int w, i64 local, real value) {
        shared.exchange[w][local] = value;
    });
    prepare_cluster(shared, call, share, [&](i64 local, i64 c, bool owner, double total[2]) {
        finish_backward(shared, call, local, c, owner, total);
    });
    const int TX = (int)channels.count, tx = threadIdx.x % TX, TY = blockDim.x / TX, ty = threadIdx.x / TX;
    if (ty >= TY) return;
    Lane<Single> lane;
    for (int k = 0; k < COEFFICIENTS; ++k) lane.value[k][0] = shared.table[k][tx];
    repair_at_places<Single, M>(lane, call, share, channels.first + tx, ty, TY);
}
