// Stands in for sbncore/cuda/device.cu: a GPU's blocks on the CPU, every thread a fiber.
//
// A launch runs the grid's blocks one after the other in an order shuffled by a seed. The fibers of a block run
// from barrier to barrier, in an order shuffled anew each time: what a missing barrier would let happen, happens. Shared memory begins as NaN and is NaN again when its block has left. Every access
// to global memory is held against the arrays the host has named: bounds, alignment, and whether what is read
// was ever written; its bytes are counted.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <sys/mman.h>
#include <vector>

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;

#define __device__
#define NOINLINE inline
#define __global__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct Index { unsigned x, y; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Array {
    char* begin;
    char* end;
    char* written;  // a byte for each: whether it was ever written
};

enum { SHARED_BYTES = 49152, STACK = 65536 };
enum Wait { RUNNING, AT_BARRIER, LEFT };

struct Fiber {
    void* stack_pointer;
    Wait wait;
    unsigned thread;
};

static std::vector<Array> arrays;
static std::string complaint;
static i64 loaded, stored, wide, narrow_;  // bytes; accesses of 16 bytes and of fewer
static std::vector<Fiber> fibers;
static std::vector<char> shared;
static char* stacks;
static size_t stacks_size;
static Fiber* current;
static void* scheduler;
static void (*entry)(void*);
static void* argument;

static void complain(const char* what, const void* where, int bytes) {
    if (!complaint.empty()) return;
    char text[300];
    snprintf(text, sizeof text, "%s: %d bytes at %p, thread %u of block %u, %u", what, bytes, where, threadIdx.x, blockIdx.x, blockIdx.y);
    complaint = text;
}

static Array* owner(const void* where, int bytes) {
    const char* p = (const char*)where;
    for (Array& array : arrays)
        if (p >= array.begin && p + bytes <= array.end) return &array;
    return nullptr;
}

static bool check(const void* where, int bytes, bool writing) {
    Array* array = owner(where, bytes);
    if (!array) return complain(writing ? "write out of bounds" : "read out of bounds", where, bytes), false;
    if ((uintptr_t)where % bytes) return complain("misaligned access", where, bytes), false;
    (bytes == 16 ? wide : narrow_) += 1;
    (writing ? stored : loaded) += bytes;
    char* marks = array->written + ((char*)where - array->begin);
    if (writing) memset(marks, 1, bytes);
    else if (memchr(marks, 0, bytes)) complain("read of what was never written", where, bytes);
    return true;
}

// switch_fiber(save, load): pushes what a call must keep, and goes on where `load` was saved.
extern "C" void switch_fiber(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl switch_fiber
switch_fiber:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
#error "the emulator switches fibers on x86-64 alone"
#endif

static void yield(Wait wait) {
    current->wait = wait;
    switch_fiber(&current->stack_pointer, scheduler);
}

static void run_fiber() {
    entry(argument);
    yield(LEFT);
    abort();
}

static void make(Fiber& fiber, char* stack) {
    void** top = (void**)(stack + STACK);
    *--top = nullptr;  // a return address that is never used, and alignment
    *--top = (void*)run_fiber;
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    fiber.stack_pointer = top;
    fiber.wait = RUNNING;
}

static void run_block(unsigned threads, std::mt19937_64& random) {
    fibers.resize(threads);
    shared.assign(SHARED_BYTES, (char)0xff);
    if (stacks_size < (size_t)threads * STACK) {
        if (stacks) munmap(stacks, stacks_size);
        stacks_size = (size_t)threads * STACK;
        stacks = (char*)mmap(nullptr, stacks_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stacks == MAP_FAILED) { fprintf(stderr, "emulator: no memory for %u fibers\n", threads); abort(); }
    }
    std::vector<unsigned> order(threads);
    for (unsigned f = 0; f < threads; ++f) {
        fibers[f].thread = f;
        make(fibers[f], stacks + (size_t)f * STACK);
        order[f] = f;
    }
    for (unsigned living = threads; living;) {
        std::shuffle(order.begin(), order.end(), random);
        bool moved = false;
        for (unsigned f : order) {
            Fiber& fiber = fibers[f];
            if (fiber.wait != RUNNING) continue;
            moved = true;
            current = &fiber;
            threadIdx.x = fiber.thread;
            switch_fiber(&scheduler, fiber.stack_pointer);
            if (fiber.wait == LEFT) --living;
        }
        unsigned waiting = 0;
        for (const Fiber& fiber : fibers) waiting += fiber.wait == AT_BARRIER;
        if (living && waiting == living) {
            moved = true;
            for (Fiber& fiber : fibers)
                if (fiber.wait == AT_BARRIER) fiber.wait = RUNNING;
        }
        if (living && !moved) {
            complain("threads wait at different barriers", nullptr, 0);
            return;
        }
    }
}

}  // namespace emulator

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };
template <class T> struct Compute { typedef float type; };
template <> struct Compute<double> { typedef double type; };

inline double widen(double v) { return v; }
inline float widen(float v) { return v; }
inline float widen(bfloat16 v) { const u32 bits = u32(v.bits) << 16; float f; memcpy(&f, &bits, 4); return f; }
inline float widen(float16 v) { _Float16 h; memcpy(&h, &v.bits, 2); return (float)h; }
inline void narrow(double& to, double v) { to = v; }
inline void narrow(float& to, float v) { to = v; }
inline void narrow(float16& to, float v) { const _Float16 h = (_Float16)v; memcpy(&to.bits, &h, 2); }
inline void narrow(bfloat16& to, float v) {
    u32 bits;
    memcpy(&bits, &v, 4);
    to.bits = v != v ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }

template <class T, int V> struct Pack { T at[V]; };
template <int BYTES> struct Word;
template <> struct Word<1> { typedef unsigned char type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned int type; };

template <class T, int V> struct Raw {
    Pack<T, V> pack;
    Pack<T, V> unpacked() const { return pack; }
};
template <class T, int V> Raw<T, V> load_raw(const void* memory, i64 element, bool = false) {
    Raw<T, V> values = {};
    const T* from = (const T*)memory + element;
    if (emulator::check(from, sizeof values, false)) memcpy(&values, from, sizeof values);
    return values;
}
template <class T, int V> void store(void* memory, i64 element, const Pack<T, V>& values) {
    T* to = (T*)memory + element;
    if (emulator::check(to, sizeof values, true)) memcpy(to, &values, sizeof values);
}
template <class T> T load(const T* from) { return load_raw<T, 1>(from, 0).pack.at[0]; }
template <class T> void store(T* to, T value) { store<T, 1>(to, 0, Pack<T, 1>{{value}}); }

template <class T> T& shared_memory() {
    static_assert(sizeof(T) <= emulator::SHARED_BYTES, "more shared memory than a block has");
    return *(T*)&emulator::shared[0];
}
inline void begin() {}
inline void let_next_start() {}
#define SHARED(type, name) auto& name = shared_memory<type>()

inline void block_barrier() { emulator::yield(emulator::AT_BARRIER); }
