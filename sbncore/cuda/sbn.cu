// Sampled batch normalization over raw memory. A forward is sums, finish_forward, normalize; a backward is sums,
// finish_backward, repair.
//
//   sums_of_places   the sums over the places drawn            reads the sample
//   sums             the sums over everything, dx = scale * g  reads x, dy     writes dx    (backward)
//   finish_forward   mean, var, rstd, running statistics       a thread for each channel
//   finish_backward  dweight, dbias, what dx is repaired by    a thread for each channel
//   normalize        y = act(z)                                reads x         writes y     (forward)
//   repair_places    dx at the places drawn                    reads, writes the sample
//   repair           dx everywhere: full batch normalization   reads x, dy     writes dx
//
// z = (x - shift) * scale + offset (+ residual), shift being the mean rounded to few bits. Sums
// are of g and g * (x - shift), in float32 (float64 for float64) within a block, in float64 over blocks;
// their order is fixed by the launch, and nothing is atomic. The state of a channel is float64.
//
// The pass over everything sees rows of columns: channels-first memory as (N, C * S), channels-last as
// (N * S, C), a column being V elements, one access of 16 bytes. A thread keeps to one column and takes
// UNROLL rows at a time, so that its coefficients stay in registers and several loads are in flight: one set
// where columns lie in one channel (FIRST), V where they may straddle a seam (SEAMED) and in channels-last.
// The pass over places takes runs in pieces: `lanes` threads share one, with up to ACCESSES words each, all of them
// in flight while the block's coefficients are fetched or, in a forward, its shifts found.

// Adds up the threads' sums of a block: put(which sum, local, total), where local's are those of all rows in the
// units [range.from, range.to), unit u being the (u % K)-th sum of column u / K. Several threads share a total.
struct Range { int from, to; };

template <class A, class Units, class Put>
__device__ void block_sums(Shared<A>& shared, const typename A::real first[], const typename A::real second[], int TX,
                           int count, Units units, Put put) {
    const int t = threadIdx.x, threads = blockDim.x, rows = threads / TX, pitch = threads + 1;  // no bank conflicts
    for (int k = 0; k < A::K; ++k) {
        shared.sum[k * pitch + t] = first[k];
        shared.sum[(A::K + k) * pitch + t] = second[k];
    }
    int shift = 0;  // of `helpers`, a power of two: divisions are long
    while ((1 << shift) < HELPERS && (2 << shift) * count <= threads) ++shift;
    const int helpers = 1 << shift, groups = threads >> shift, group = t >> shift, helper = t - (group << shift);
    block_barrier();
    for (int base = 0; base < count; base += groups) {
        const int local = base + group;
        const bool mine = group < groups && local < count;
        typename A::real total[2] = {0, 0};
        if (mine) {
            const Range range = units(local);
            const int width = range.to - range.from, rows_on = helpers / width, units_on = helpers - rows_on * width;
            int row = helper / width, unit = range.from + helper - row * width;
            #pragma unroll 4
            for (int e = helper; e < width * rows; e += helpers) {
                const int column = unit / A::K, at = (unit - column * A::K) * pitch + row * TX + column;
                for (int w = 0; w < 2; ++w) total[w] += shared.sum[w * A::K * pitch + at];
                row += rows_on;
                unit += units_on;
                if (unit >= range.to) {
                    unit -= width;
                    ++row;
                }
            }
        }
        for (int w = 0; w < 2; ++w) shared.help[w][t] = total[w];
        block_barrier();
        if (mine && helper == 0)
            for (int w = 0; w < 2; ++w) {
                #pragma unroll 4
                for (int k = 1; k < helpers; ++k) total[w] += shared.help[w][t + k];
                put(w, local, total[w]);
            }
    }  // no barrier: a second round has one helper, which reads nobody's
}

// Parallel: a block is a tile of columns (blockIdx.x) times a share of the rows (y); see sbncore.cuda.geometry.
template <class T, int V, Layout L, Mode M, bool SUM> __global__ void __launch_bounds__(THREADS, L == FIRST ? SUMS_BLOCKS - (M == MASKED || sizeof(T) == 8) : 2) sums(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    begin();
    const Share share = share_of_block();
    const Channels channels = channels_of<A>(call, share.tile);
    const auto channel = [&](int local) { return channel_of(call, channels, local); };
    const auto prepare = [&] {
        if (M != MOMENTS) return load_table(shared, call, channels.count, false, channel);
        set_shifts(shared, call, channels.count, channel, [&](int local) {
            const bool begins_here = L == LAST || (channels.first + local) * call.S >= channels.element;
            return share.block == 0 && channels.first + local < call.C && begins_here;
        });
    };
    real first[A::K] = {}, second[A::K] = {};
    sweep<A, M, SUM, false>(shared, call, share, channels, prepare, first, second);
    if (!SUM) return;
    enum { ELEMENTS = V / A::K };  // of a column that share a sum
    const auto units = [&](int local) {
        if (L == LAST) return Range{local, local + 1};
        const i64 from = (channels.first + local) * call.S - channels.element, to = from + call.S;
        const i64 most = call.tile * V;
        return Range{from < 0 ? 0 : (int)from / ELEMENTS, (int)(to < most ? to : most) / ELEMENTS};
    };
    block_sums(shared, first, second, (int)call.tile, (int)channels.count, units, [&](int w, int local, real total) {
        const i64 slot = channels.first + local + (L == LAST ? 0 : share.tile);
        store((real*)call.partial + (share.block * 2 + w) * call.slots + slot, total);
    });
}

// The kernel in front is finish_forward: x and residual were complete before it.
template <class T, int V, Layout L, bool ACTIVATE, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS, NORMALIZE_BLOCKS - RESIDUAL) normalize(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    SHARED(Shared<A>, shared);
    const Share share = share_of_block();
    const Channels channels = channels_of<A>(call, share.tile);
    normalize_everywhere<A, ACTIVATE, RESIDUAL>(shared, call, share, channels, [&] {
        begin();
        load_table(shared, call, channels.count, false, [&](int local) { return channel_of(call, channels, local); });
    });
}

template <class T, int V, Layout L, Mode M> __global__ void __launch_bounds__(THREADS, 2) repair(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    SHARED(Shared<A>, shared);
    begin();
    const Share share = share_of_block();
    const Channels channels = channels_of<A>(call, share.tile);
    const auto prepare = [&] {
        load_table(shared, call, channels.count, true, [&](int local) { return channel_of(call, channels, local); });
    };
    sweep<A, M, false, true>(shared, call, share, channels, prepare, 0, 0);
}

template <class T, int V, Layout L, Mode M> __global__ void __launch_bounds__(THREADS, 2) sums_of_places(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    begin();
    const Share share = share_of_block();
    const Columns<A> columns(call, share);
    Lane<A> lane;
    for (int k = 0; k < call.parts; ++k) {
        const Part& part = call.part[k];
        real first[A::K] = {}, second[A::K] = {};
        const auto prepare = [&] {
            if (k) return;
            const auto channel = [&](int local) { return columns.begin + local; };
            if (M == MOMENTS) set_shifts(shared, call, columns.count, channel, [&](int) { return share.block == 0; });
            else load_table(shared, call, columns.count, false, channel);
            if (columns.mine) lane.take(shared, columns.tx * A::K, 0, M == MOMENTS ? 1 : 3);
        };
        enum { STEP = M == MOMENTS || (A::K == 1 && M != MASKED) ? (int)ACCESSES : ACCESSES / 2 };  // by the registers there are
        const auto add = [&](const auto& taken, const Accesses<A>& accesses, int from) {
            add_places(lane, taken, accesses, from, first, second);
        };
        at_places<A, M, STEP>(call, part, share, columns, call.dy, prepare, add);
        const auto units = [](int local) { return Range{local, local + 1}; };
        block_sums(shared, first, second, columns.TX, (int)columns.count, units, [&](int w, int local, real total) {
            real* const slot = (real*)call.partial + (share.block * 2 + w) * call.C + columns.begin + local;
            const double before = k ? (double)load(slot) : 0;
            store(slot, (real)(before + part.weight * total));  // a weight rounded to float would move the mean
        });
    }
}

// The kernel in front is finish_backward: x, dy and the mask were complete before it.
template <class T, int V, Layout L, Mode M> __global__ void __launch_bounds__(THREADS, 2) repair_places(const __grid_constant__ Call call) {
    typedef Access<T, V, L> A;
    typedef typename A::real real;
    SHARED(Shared<A>, shared);
    if (call.onto) begin();  // dx is from the kernel in front
    const Share share = share_of_block();
    const Columns<A> columns(call, share);
    Lane<A> lane;
    for (int k = 0; k < call.parts; ++k) {
        const Part& part = call.part[k];
        const auto prepare = [&] {
            if (k) return;
            begin();
            load_table(shared, call, columns.count, true, [&](int local) { return columns.begin + local; });
            if (columns.mine) lane.take(shared, columns.tx * A::K, 0, COEFFICIENTS);
        };
        const void* const dys = call.onto ? call.dx : call.dy;
        enum { STEP = A::K == 1 && M != MASKED && sizeof(T) < 8 ? (int)ACCESSES : ACCESSES / 2 };  // likewise
        at_places<A, M, STEP>(call, part, share, columns, dys, prepare, [&](const auto& taken, const Accesses<A>& accesses, int from) {
            repair_taken(lane, call, (real)part.weight, taken, accesses, from);
        });
    }
}

// Parallel: a block finishes FINISHED channels, its threads adding up the sums of each.
template <class T, Layout L> __global__ void __launch_bounds__(THREADS) finish_forward(const __grid_constant__ Call call) {
    typedef Access<T, 1, L> A;
    typedef typename A::real real;
    begin();
    let_next_start();
    if (call.step && call.step_kept && blockIdx.x == 0 && threadIdx.x == 0) store(call.step_kept, load(call.step));
    const bool sampled = call.prior < 1;
    const auto give = [&](int k, i64 c) {
        const void* const values = k == WEIGHT ? call.weight : k == BIAS ? call.bias : k == PRIOR_MEAN ? call.prior_mean
            : k == PRIOR_VAR ? call.prior_var : k == RUNNING_MEAN ? call.running_mean
            : k == RUNNING_VAR ? call.running_var : sampled ? call.shift : 0;
        return parameter<T>(call, values, k, c, k == WEIGHT);
    };
    finish_channels<A>(call, sampled, give, [&](i64 c, const double total[2], Given given) {
        const double given_mean = given[PRIOR_MEAN], given_var = given[PRIOR_VAR];
        double mean = given_mean, var = given_var;
        if (sampled) {
            mean = given[SHIFTS] + total[0];
            var = total[1] - total[0] * total[0];
            var = var < 0 ? 0 : var;
            if (call.prior > 0) {
                const double own = 1 - call.prior, mixed = own * mean + call.prior * given_mean;
                var = own * (var + (mean - mixed) * (mean - mixed)) +
                      call.prior * (given_var + (given_mean - mixed) * (given_mean - mixed));
                mean = mixed;
            }
        }
        const double rstd = 1 / sqrt(var + call.eps), scale = given[WEIGHT] * rstd;
        const double shift = (double)(real)few_bits(mean, sqrt(var));
        const double offset = (shift - mean) * scale + given[BIAS];
        const double state[] = {mean, var, rstd, shift, scale, offset};
        for (int k = 0; k < STATE; ++k) store(call.state + k * call.C + c, state[k]);
        const bool finite = mean - mean == 0 && var - var == 0;
        if (call.running_mean && (finite || !call.skip_nonfinite)) {
            const double m = given[RUNNING_MEAN], v = given[RUNNING_VAR];
            set_parameter<T>(call, call.running_mean, RUNNING_MEAN, c, m + call.momentum * (mean - m));
            set_parameter<T>(call, call.running_var, RUNNING_VAR, c, v + call.momentum * (var * call.unbiased - v));
        }
    });
}

template <class T, Layout L> __global__ void __launch_bounds__(THREADS) finish_backward(const __grid_constant__ Call call) {
    begin();
    let_next_start();
    const auto give = [&](int k, i64 c) { return k < STATE ? load(call.state + k * call.C + c) : 0; };
    finish_channels<Access<T, 1, L>>(call, true, give, [&](i64 c, const double total[2], Given given) {
        const double rounding = given[MEAN] - given[STATE_SHIFT], rstd = given[RSTD], scale = given[STATE_SCALE];
        const double dbias = total[0], dweight = (total[1] - rounding * dbias) * rstd, k1 = scale * rstd * dweight;
        store(call.slopes + c, scale * dbias - k1 * rounding);
        store(call.slopes + call.C + c, k1);
        if (call.dweight) set_parameter<T>(call, call.dweight, WEIGHT, c, dweight);
        if (call.dbias) set_parameter<T>(call, call.dbias, BIAS, c, dbias);
    });
}
