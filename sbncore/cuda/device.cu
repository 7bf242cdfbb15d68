// What the hardware provides: element types in memory and in arithmetic, 16-byte accesses, shared memory.
// No header is needed: NVRTC alone compiles this. The emulator of the tests stands in for this file.

typedef long long i64;
typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned char u8;
#define NOINLINE __noinline__

struct float16 { unsigned short bits; };
struct bfloat16 { unsigned short bits; };

template <class T> struct Compute { typedef float type; };
template <> struct Compute<double> { typedef double type; };

__device__ inline double widen(double v) { return v; }
__device__ inline float widen(float v) { return v; }
__device__ inline float widen(bfloat16 v) {
    float wide;
    asm("mov.b32 %0, {%1, %2};" : "=f"(wide) : "h"((unsigned short)0), "h"(v.bits));
    return wide;
}
__device__ inline float widen(float16 v) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
    return wide;
}

__device__ inline void narrow(double& to, double v) { to = v; }
__device__ inline void narrow(float& to, float v) { to = v; }
__device__ inline void narrow(float16& to, float v) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(v)); }
__device__ inline void narrow(bfloat16& to, float v) {
#if __CUDA_ARCH__ >= 900
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(v));
#else
    const u32 bits = __float_as_uint(v);
    to.bits = v != v ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#endif
}

__device__ inline double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ inline float fused(float a, float b, float c) { return fmaf(a, b, c); }

// V elements that lie together: one access of at most 16 bytes.
template <class T, int V> struct Pack { T at[V]; };

template <int BYTES> struct Word;
template <> struct Word<1> { typedef unsigned char type; };
template <> struct Word<2> { typedef unsigned short type; };
template <> struct Word<4> { typedef unsigned int type; };
template <> struct Word<8> { typedef u64 type; };
template <> struct Word<16> { typedef uint4 type; };

// A Pack as it comes from memory. Where it shall stay on its way for a while, it must not be taken apart: the compiler
// would move its elements to registers of their own at once, and wait for them.
template <class T, int V> struct Raw {
    typename Word<sizeof(T) * V>::type word;
    __device__ Pack<T, V> unpacked() const { return *(const Pack<T, V>*)&word; }
};

// `last` marks the last use of what is read: it need not stay in a cache.
template <class T, int V> __device__ inline Raw<T, V> load_raw(const void* memory, i64 element, bool last = false) {
    typedef typename Word<sizeof(T) * V>::type word;
    const word* from = (const word*)((const T*)memory + element);
    return {last ? __ldcs(from) : *from};
}

template <class T, int V> __device__ inline void store(void* memory, i64 element, const Pack<T, V>& values) {
    typedef typename Word<sizeof(T) * V>::type word;
    word written;
    *(Pack<T, V>*)&written = values;
    __stcs((word*)((T*)memory + element), written);
}

template <class T> __device__ inline T load(const T* from) { return *from; }
template <class T> __device__ inline void store(T* to, T value) { *to = value; }

// Waits until the kernel in front of this one on the stream has ended, and all in front of that: blocks may be launched
// while it does.
__device__ inline void begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start once every block of this one has come here. Up to its own begin() such a kernel may
// read what was complete before this one's, and write nothing. Small kernels alone: a large one's successor would
// take the multiprocessors from it (measured).
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#define SHARED(type, name) __shared__ type name
__device__ inline void block_barrier() { __syncthreads(); }
