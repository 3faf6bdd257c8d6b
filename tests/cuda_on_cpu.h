// Runs a CUDA kernel on a CPU, to test it: each thread of a block is a coroutine, which waits at barriers, of its block
// and of its warp.
//
// Threads take turns in rising or in falling order, so that what is read before another thread has written it differs.

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define PREFETCH(address) (void)(address)

struct uint2 {
    uint32_t x, y;
} __attribute__((aligned(8)));
struct uint4 {
    uint32_t x, y, z, w;
} __attribute__((aligned(16)));
struct float2 {
    float x, y;
} __attribute__((aligned(8)));
struct float4 {
    float x, y, z, w;
} __attribute__((aligned(16)));
struct Place {
    int x;
};
static Place threadIdx, blockIdx, blockDim, gridDim;

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline uint32_t __float_as_uint(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift)
{
    return (uint32_t)((((uint64_t)high << 32 | low) << (shift & 31)) >> 32);
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector)
{
    const uint64_t bytes = (uint64_t)y << 32 | x;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}

static std::vector<ucontext_t> threads;
static std::vector<std::vector<char>> stacks;
static std::vector<int> reached[2];  // by each thread: barriers of the block and of the warp
static std::vector<bool> ended;
static std::vector<uint32_t> exchanged;
static int steps, waits;  // barriers passed and threads ended, by all; rounds of all threads without either
static ucontext_t scheduler;
static std::function<void()> body;

// Waits until the threads `first` to `last` are at a barrier of a kind.
inline void wait_for(int first, int last, int kind)
{
    const int own = threadIdx.x, mine = ++reached[kind][own];
    for (bool ready = false; !ready;) {
        swapcontext(&threads[own], &scheduler);
        threadIdx.x = own;
        ready = true;
        for (int i = first; i < last; ++i) ready &= reached[kind][i] >= mine;
    }
    ++steps;
}
inline void __syncthreads() { wait_for(0, blockDim.x, 0); }
template <typename T> T exchange(T value, int lane)
{
    const int first = threadIdx.x / 32 * 32, last = min(first + 32, blockDim.x);
    static_assert(sizeof(T) == 4, "words are exchanged");
    memcpy(&exchanged[threadIdx.x], &value, 4);
    wait_for(first, last, 1);
    memcpy(&value, &exchanged[first + lane % 32], 4);
    wait_for(first, last, 1);
    return value;
}
template <typename T> T __shfl_sync(uint32_t, T value, int lane) { return exchange(value, lane); }
template <typename T> T __shfl_xor_sync(uint32_t, T value, int mask)
{
    return exchange(value, (threadIdx.x % 32) ^ mask);
}
inline int __shfl_up_sync(uint32_t, int value, int distance)
{
    const int lane = threadIdx.x % 32;
    return exchange(value, lane >= distance ? lane - distance : lane);
}

static void enter()
{
    body();
    ended[threadIdx.x] = true;
    ++steps;
}

static void run_block(int block, int count, bool falling)
{
    blockIdx.x = block, blockDim.x = count;
    threads.assign(count, {});
    stacks.assign(count, std::vector<char>(1 << 16));
    for (auto& kind : reached) kind.assign(count, 0);
    exchanged.assign(count, 0);
    ended.assign(count, false);
    for (int i = 0; i < count; ++i) {
        getcontext(&threads[i]);
        threads[i].uc_stack.ss_sp = stacks[i].data();
        threads[i].uc_stack.ss_size = stacks[i].size();
        threads[i].uc_link = &scheduler;
        makecontext(&threads[i], enter, 0);
    }
    for (int running = count; running;) {
        const int before = steps;
        running = 0;
        for (int i = 0; i < count; ++i) {
            threadIdx.x = falling ? count - 1 - i : i;
            const int own = threadIdx.x;
            if (ended[own]) continue;
            ++running;
            swapcontext(&scheduler, &threads[own]);
        }
        if (running && steps == before && ++waits > 1) {
            fprintf(stderr, "%d threads wait for others that never come\n", running);
            exit(1);
        }
        if (steps != before) waits = 0;
    }
}
