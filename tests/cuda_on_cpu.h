// Runs a CUDA kernel on a CPU, to test it: each thread of a block is a coroutine, which waits at barriers.
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
struct Place {
    int x;
};
static Place threadIdx, blockIdx, gridDim;

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
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
static std::vector<int> waiting, exchanged;  // waiting: barriers passed so far, -1 when a thread has ended
static ucontext_t scheduler;
static std::function<void()> body;

inline void __syncthreads()
{
    const int own = threadIdx.x;
    ++waiting[own];
    swapcontext(&threads[own], &scheduler);
    threadIdx.x = own;
}
// By barriers of the whole block: every thread takes part in the kernels tested.
inline int __shfl_up_sync(uint32_t, int value, int distance)
{
    const int own = threadIdx.x;
    exchanged[own] = value;
    __syncthreads();
    const int other = own % 32 >= distance ? exchanged[own - distance] : value;
    __syncthreads();
    return other;
}

static void enter()
{
    body();
    waiting[threadIdx.x] = -1;
}

static void run_block(int block, int count, bool falling)
{
    blockIdx.x = block;
    threads.assign(count, {});
    stacks.assign(count, std::vector<char>(1 << 16));
    waiting.assign(count, 0);
    exchanged.assign(count, 0);
    for (int i = 0; i < count; ++i) {
        getcontext(&threads[i]);
        threads[i].uc_stack.ss_sp = stacks[i].data();
        threads[i].uc_stack.ss_size = stacks[i].size();
        threads[i].uc_link = &scheduler;
        makecontext(&threads[i], enter, 0);
    }
    while (waiting[0] >= 0) {
        for (int i = 0; i < count; ++i) {
            threadIdx.x = falling ? count - 1 - i : i;
            const int own = threadIdx.x;
            swapcontext(&scheduler, &threads[own]);
        }
        for (int i = 0; i < count; ++i)
            if (waiting[i] != waiting[0]) {
                fprintf(stderr, "thread %d is not at the barrier of thread 0\n", i);
                exit(1);
            }
    }
}
