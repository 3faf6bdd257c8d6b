// Expands DFloat11 on a GPU: the weights `start` to `stop` of a `bagel.formats.dfloat11.Piece`, as bfloat16 patterns.
//
// A block of 512 threads takes a chunk at a time, a thread the codes of its window of 8 bytes:
// 1. it looks up four codes at a time, and puts their exponents into slots of its own in shared memory;
// 2. the sum of all counts before it says where they belong, and it moves them there, whole words at a time;
// 3. all threads together join the chunk's exponents with signs and mantissas, eight weights at a time.
// So every code is decoded once, and global memory is read and written in whole lines.
//
// LOOKUP_BITS and BLOCKS, the blocks that a multiprocessor holds at once, are defined by the compiler's options.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WINDOWS 512
#define WARPS (WINDOWS / 32)
#define WINDOW_BITS 64
#define JUMP 240
#ifndef PREFETCH
#define PREFETCH(address) asm volatile("prefetch.global.L2 [%0];" ::"l"(address))
#endif

struct Window {
    u32 a, b, c;  // its 64 bits and the 32 behind them, the first bit of each the highest
    int at;       // the bit at which the first code starts
};

__device__ __forceinline__ u32 from_big_endian(u32 x) { return __byte_perm(x, 0, 0x0123); }

__device__ __forceinline__ Window load(const u8* __restrict__ stream, const u8* __restrict__ gaps, int chunk, int thread)
{
    const u64 index = (u64)chunk * WINDOWS + thread;
    const uint2 own = ((const uint2*)stream)[index];
    const u32 behind = ((const u32*)stream)[2 * index + 2];
    // Five bits for each window: eight windows in five bytes.
    const int bit = 5 * thread;
    const u8* five = gaps + (u64)chunk * (WINDOWS * 5 / 8) + (bit >> 3);
    u32 pair = (u32)five[0] << 8;
    if ((bit & 7) > 3) pair |= five[1];
    Window window;
    window.a = from_big_endian(own.x);
    window.b = from_big_endian(own.y);
    window.c = from_big_endian(behind);
    window.at = pair >> (11 - (bit & 7)) & 31;
    return window;
}

// Decodes the window's codes into slots WINDOWS words apart, four exponents in each, and returns how many there are.
__device__ __forceinline__ int decode(
    const Window& window, const uint2* four, const u8* __restrict__ luts, int tables, u32* slot)
{
    u32 low = 0;
    int bits = 0, count = 0, at = window.at;  // bits: of exponents in `low`
    while (at < WINDOW_BITS) {
        const bool late = at >= 32;
        const u32 ahead = __funnelshift_l(late ? window.c : window.b, late ? window.b : window.a, at);
        const uint2 entry = four[ahead >> (32 - LOOKUP_BITS)];
        u32 exponents = entry.x;
        int length = entry.y & 15;
        // Of the bits that say where codes start those are left that lie within the window.
        int some = __popc((entry.y & ~15u) >> (late ? at - 32 : 0));
        if (length == 0) {  // a code of more bits than are looked up
            exponents = luts[ahead >> 24];
            for (int shift = 16; shift >= 0 && exponents >= JUMP; shift -= 8) {
                const int table = min(256 - (int)exponents, tables - 1);
                exponents = luts[table * 256 + (ahead >> shift & 255)];
            }
            length = luts[tables * 256 + exponents];
            some = 1;
            if (length == 0) break;  // no code: beyond the end of the stream
        }
        const u32 high = __funnelshift_l(exponents, 0, bits);
        low |= exponents << bits;
        bits += 8 * some;
        count += some;
        at += length;
        if (bits >= 32) {
            *slot = low;
            slot += WINDOWS;
            low = high;
            bits -= 32;
        }
    }
    if (bits > 0) *slot = low;
    return count;
}

// Moves `count` exponents from slots to the bytes from `place` on; other threads write the bytes around them.
__device__ __forceinline__ void move(const u32* slot, int count, u8* exponents, int place)
{
    const int skew = place & 3, behind = skew + count;
    u8* to = exponents + (place - skew);
    u32 before = 0;
#pragma unroll 1
    for (int byte = 0; byte < behind; byte += 4) {
        const u32 next = byte < count ? *slot : 0;
        const u32 word = __funnelshift_l(before, next, 8 * skew);
        if (byte >= skew && byte + 4 <= behind) {
            *(u32*)(to + byte) = word;
        } else {
            for (int one = 0; one < 4; ++one)
                if (byte + one >= skew && byte + one < behind) to[byte + one] = (u8)(word >> 8 * one);
        }
        before = next;
        slot += WINDOWS;
    }
}

// Joins two weights, whose parts are the low bytes of the halves.
__device__ __forceinline__ u32 join(u32 signs, u32 exponents)
{
    return (signs & 0x00800080u) << 8 | exponents << 7 | (signs & 0x007F007Fu);
}

__device__ __forceinline__ uint2 joined(u32 signs, u32 exponents)
{
    uint2 both;
    both.x = join(__byte_perm(signs, 0, 0x4140), __byte_perm(exponents, 0, 0x4140));
    both.y = join(__byte_perm(signs, 0, 0x4342), __byte_perm(exponents, 0, 0x4342));
    return both;
}

// Shared memory: the lookup, `slots` words for each window, and the exponents of a chunk.
extern "C" __global__ void __launch_bounds__(WINDOWS, BLOCKS) expand(
    const u8* __restrict__ stream, const u8* __restrict__ signs, const u8* __restrict__ luts,
    const int* __restrict__ positions, const u8* __restrict__ gaps, const uint2* __restrict__ lookup,
    u16* __restrict__ out, int tables, int chunks, int start, int stop, int slots)
{
    extern __shared__ uint4 shared[];
    __shared__ int sums[WARPS];
    uint2* four = (uint2*)shared;
    u32* slot = (u32*)(four + (1 << LOOKUP_BITS)) + threadIdx.x;
    u8* exponents = (u8*)(four + (1 << LOOKUP_BITS)) + (u64)slots * WINDOWS * 4;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    // Whether eight weights can be read and written at once.
    const bool aligned = (start & 7) == 0 && ((u64)signs & 7) == 0 && ((u64)out & 15) == 0;

    for (int index = thread; index < 1 << LOOKUP_BITS; index += WINDOWS) four[index] = lookup[index];
    __syncthreads();
    int chunk = blockIdx.x;
    if (chunk >= chunks) return;
    Window window = load(stream, gaps, chunk, thread);
    while (chunk < chunks) {
        const int begin = positions[chunk], end = positions[chunk + 1];
        const int first = max(begin, start), last = min(end, stop);
        const int next = chunk + gridDim.x;
        const bool wanted = first < last;  // by all threads or by none
        if (wanted && first + 128 * thread < last) PREFETCH(signs + first + 128 * thread);
        const int count = wanted ? decode(window, four, luts, tables, slot) : 0;
        if (next < chunks) window = load(stream, gaps, next, thread);  // on its way during all that follows
        chunk = next;
        if (!wanted) continue;

        int sum = count;
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xFFFFFFFFu, sum, distance);
            if (lane >= distance) sum += other;
        }
        if (lane == 31) sums[warp] = sum;
        __syncthreads();  // behind it the chunk before is written out, too
        int before = sum - count;
        for (int other = 0; other < WARPS; ++other) before += other < warp ? sums[other] : 0;
        const int base = begin & ~7;  // also below zero
        move(slot, min(count, end - begin - before), exponents, begin - base + before);
        __syncthreads();

#pragma unroll 1
        for (int weight = base + 8 * thread; weight < last; weight += 8 * WINDOWS) {
            const u8* own = exponents + (weight - base);
            if (aligned && weight >= first && weight + 8 <= last) {
                const uint2 exponent = *(const uint2*)own, sign = *(const uint2*)(signs + weight);
                const uint2 one = joined(sign.x, exponent.x), other = joined(sign.y, exponent.y);
                *(uint4*)(out + (weight - start)) = make_uint4(one.x, one.y, other.x, other.y);
            } else {
#pragma unroll 1
                for (int single = max(weight, first); single < min(weight + 8, last); ++single)
                    out[single - start] = (u16)join(signs[single], exponents[single - base]);
            }
        }
    }
}
