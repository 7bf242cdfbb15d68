// A call's arguments, and the places its plan drew: sbncore.hashing and sbncore.plans, bit for bit.

enum Kind { STRIDED, DISTINCT, MAP, SCATTERED };

// A part of a plan: `groups` samples (or single places), each of `runs` runs of `length` consecutive positions,
// `stride` apart, the last run what is left of `positions`. A run wraps round its map. Threads take a run in
// `pieces` pieces of `piece` accesses: `lanes` threads times ACCESSES.
struct Part {
    u64 key;         // final; or, where the step is read from the device, of (seed, layer)
    u64 stream;      // number of the part, absorbed behind such a step
    double weight;   // p of each place
    i64 kind, first, rows, groups, positions, length, stride, align, starts, common;
    i64 runs, pieces, piece, lanes, share;  // share: pieces of a block
    const int* table;  // values drawn by `draw`, where they are few
};

enum { PARTS = 8, SORTED = 4096, ROUNDS = 8 };

// One layout of bytes for every kernel: sbncore.cuda.call packs it. Pointers that are 0 are absent.
struct Call {
    // outputs
    void *y, *dx, *dresidual;
    u8* mask;             // see kept()
    void *dweight, *dbias, *running_mean, *running_var;
    double* state;        // (6, C): mean, var, rstd, shift, scale, offset
    i64* step_kept;
    // between kernels
    void* partial;        // (blocks, 2, slots): the blocks' sums
    void* shift;          // (C,): what x was shifted by in the sums of a forward
    double* slopes;       // (2, C): K0, K1
    // inputs
    const void *x, *dy, *residual, *weight, *bias, *prior_mean, *prior_var;
    const i64* step;      // absent where keys are final
    // numbers
    double prior, eps, momentum, unbiased;
    double total_scale;   // of the sums: makes the weights sum to 1, or estimates the sums over all places
    i64 skip_nonfinite;
    i64 elements;         // bits of what is in x's own type and not in the arithmetic's: see Own
    i64 from_places, from_blocks;  // which pass left the sums, and how many blocks of it
    i64 onto;             // repair what an overlapping part has repaired
    i64 writes;           // whether the pass that sums writes dx and dresidual
    // the pass over everything: rows of `row` elements, each of `fold` samples (places, in channels-last),
    // in columns of `vector`; a block takes a tile of `tile` columns, `share` times UNROLL rows; one that sums takes
    // `summing` times as many, and leaves `slots` sums
    i64 N, C, S, rows, row, vector, fold, columns, tile, share, summing, slots;
    i64 place_tile;  // columns of a tile in the pass over places
    i64 parts;
    Part part[PARTS];
};

// 32-bit division is several times as fast, and most operands fit.
__device__ inline i64 divide(i64 a, i64 b) {
    return ((u64)a | (u64)b) >> 32 ? a / b : (i64)((u32)a / (u32)b);
}

__device__ inline u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ inline u64 absorb(u64 key, u64 word) { return mix((key ^ word) + 0x9E3779B97F4A7C15ull); }

__device__ inline i64 bounded(u64 word, i64 size) { return (i64)(((word >> 32) * (u64)size) >> 32); }

// Rare and long: out of line, it keeps the kernels' code short.
__device__ NOINLINE i64 permute(u64 key, u64 value, u64 size) {
    int bits = 0;
    while (bits < 64 && ((size - 1) >> bits)) ++bits;
    const int low = bits / 2;
    const u64 low_mask = (1ull << low) - 1, high_mask = (1ull << (bits - low)) - 1;
    do {
        u64 a = value >> low, b = value & low_mask;
        #pragma unroll 1
        for (int r = 0; r < ROUNDS; ++r) {
            const u64 k = absorb(key, r);
            if (r % 2 == 0) b ^= (absorb(k, a) >> 32) & low_mask;
            else a ^= (absorb(k, b) >> 32) & high_mask;
        }
        value = (a << low) | b;
    } while (value >= size);
    return (i64)value;
}

__device__ inline u64 key_of(const Call& call, const Part& part) {
    return call.step ? absorb(absorb(part.key, (u64)load(call.step)), part.stream) : part.key;
}

__device__ inline i64 range_of(const Call& call, const Part& part) {
    return part.kind == SCATTERED ? part.rows * call.S : part.rows;
}

// A piece of a run: its accesses from `first` on. The run: `count` positions of sample n from s on, wrapping round
// the map.
struct Piece { i64 n; int s, count, first; };

__device__ inline Piece piece_of(const Call& call, const Part& part, u64 key, u32 index) {
    u32 run = index, group = index;
    Piece piece = {0, 0, (int)part.length, 0};
    if (part.pieces > 1) {
        group = run = index / (u32)part.pieces;
        piece.first = (int)(index - run * (u32)part.pieces) * (int)part.piece;
    }
    if (part.runs > 1) {
        group = run / (u32)part.runs;
        const int number = (int)(run - group * (u32)part.runs);
        piece.s = number * (int)part.stride;
        const int rest = (int)part.positions - number * (int)part.length;
        piece.count = rest < piece.count ? rest : piece.count;
    }
    if (part.kind == MAP) {
        piece.n = part.first + group;
        const i64 start = part.align * bounded(absorb(key, part.common ? 0 : piece.n), part.starts);
        piece.s += (int)start;
    } else if (part.kind == STRIDED) {
        piece.n = bounded(absorb(key, 0), part.rows) + part.stride * group;
        piece.n = part.first + piece.n - divide(piece.n, part.rows) * part.rows;
    } else {
        const i64 drawn = part.table ? (i64)load(part.table + group) : permute(key, group, range_of(call, part));
        const i64 sample = part.kind == SCATTERED ? divide(drawn, call.S) : drawn;
        piece.n = part.first + sample;
        if (part.kind == SCATTERED) piece.s = (int)(drawn - sample * call.S);
    }
    if (piece.s >= (int)call.S) piece.s -= (int)call.S;
    return piece;
}

// table[rank of hash(i) among all] = i, of the first ranks: `distinct` for few values.
// Parallel: a thread ranks one value; every block hashes them all (32 KB of shared memory).
struct Hashes { u64 of[SORTED]; };

__global__ void draw(const __grid_constant__ Call call) {
    SHARED(Hashes, hashes);
    begin();
    for (int k = 0; k < call.parts; ++k) {
        const Part& part = call.part[k];
        const int size = (int)range_of(call, part);
        if (!part.table) continue;
        const u64 key = key_of(call, part);
        for (int i = threadIdx.x; i < size; i += blockDim.x) hashes.of[i] = absorb(key, i);
        block_barrier();
        const int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < size) {
            const u64 mine = hashes.of[i];
            int rank = 0;
            for (int other = 0; other < size; ++other)
                rank += hashes.of[other] < mine || (hashes.of[other] == mine && other < i);
            if (rank < part.groups) store((int*)part.table + rank, i);
        }
        block_barrier();
    }
}
