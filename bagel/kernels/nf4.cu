// Products with weights of 4 bits in blocks of 64, and their expansion; `bagel.formats.nf4` says what the bits mean.
//
// A byte of codes stands for two weights: an entry of a table of pairs in shared memory, of which each lane of a warp
// has its own copy, in memory banks of its own. The entry's address is the byte itself between the lane's place and
// zeros, which is one instruction; so a pair costs two, and its two products two more.
//
// Defined by the compiler's options: KIND, of tokens and results (0 float32, 1 bfloat16, 2 float16), NESTED, whether
// magnitudes are in 8 bits themselves; for products WIDTH, the columns of a weight, a multiple of 64; TOKENS and ROWS,
// powers of two, of which a warp computes the products at once, at most 32; SLOTS; WARPS, of a block at most.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define ALL 0xFFFFFFFFu
#define BLOCK 64  // weights that share a magnitude

#if KIND == 0
typedef float Value;
#else
typedef u16 Value;
#endif

// What only GPUs can do ---------------------------------------------------------------------------------------------

#ifndef ON_CPU
// Shared memory by its address in a block: a number that the compiler knows is part of an instruction.
template <typename T> __device__ __forceinline__ T* shared_at(u32 address)
{
    return (T*)__cvta_shared_to_generic(address);
}

// Past the first cache, which is the tokens'.
__device__ __forceinline__ u32 stream_word(const u8* at)
{
    u32 word;
    asm("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(word) : "l"(at));
    return word;
}

// Lets the next kernel start, whose own `wait_for_inputs` waits for this one to end.
__device__ __forceinline__ void let_others_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_inputs()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ float from_half(u32 bits)
{
    float value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(value) : "r"(bits));
    return value;
}

__device__ __forceinline__ float from_high_half(u32 bits)
{
    float value;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(value) : "r"(bits));
    return value;
}

__device__ __forceinline__ u32 to_half(float value)
{
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ __forceinline__ u32 to_brain(float value)  // rounds to the nearest, ties to even
{
    const u32 bits = __float_as_uint(value);
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16;
}

// Two values as halves of a word, the first the lower.
__device__ __forceinline__ u32 two_of(float first, float second)
{
#if KIND == 2
    return to_half(first) | to_half(second) << 16;
#elif !defined(ON_CPU) && __CUDA_ARCH__ >= 800
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#else
    return to_brain(first) | to_brain(second) << 16;
#endif
}

__device__ __forceinline__ float value_of(Value bits)
{
#if KIND == 0
    return bits;
#elif KIND == 1
    return __uint_as_float((u32)bits << 16);
#else
    return from_half(bits);
#endif
}

__device__ __forceinline__ Value rounded(float value)
{
#if KIND == 0
    return value;
#elif KIND == 1
    return (u16)to_brain(value);
#else
    return (u16)to_half(value);
#endif
}

// Eight values from `at` on, which is on 16 bytes.
__device__ __forceinline__ void load_eight(const Value* at, float* values)
{
#if KIND == 0
    const float4 low = ((const float4*)at)[0], high = ((const float4*)at)[1];
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
#else
    const uint4 four = *(const uint4*)at;
    const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if KIND == 1
        values[2 * i] = __uint_as_float(words[i] << 16);
        values[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
#else
        values[2 * i] = from_half(words[i]);
        values[2 * i + 1] = from_high_half(words[i]);
#endif
    }
#endif
}

// The table -----------------------------------------------------------------------------------------------------------

#define PLACE 8     // bytes of an entry that are a lane's, of 256
#define FIRST 1024  // address of the table: below it is what newer GPUs keep to themselves
#define BEHIND (FIRST + 65536)

__device__ __forceinline__ void fill(const float* __restrict__ codebook)
{
    for (int at = threadIdx.x; at < 4096; at += blockDim.x) {
        const float high = codebook[at >> 8], low = codebook[at >> 4 & 15];
        const u32 first = __float_as_uint(high), second = __float_as_uint(low);
        *shared_at<uint4>(FIRST + 16 * at) = make_uint4(first, second, first, second);
    }
}

// The two weights of a byte of a word of codes.
__device__ __forceinline__ void look_up(u32 word, int byte, u32 place, float* weights)
{
    const u32 entry = __byte_perm(word, place, 0x5504 | byte << 4);
    const float2 both = *shared_at<float2>(FIRST + entry);
    weights[0] = both.x;
    weights[1] = both.y;
}

// Magnitudes ----------------------------------------------------------------------------------------------------------

struct Magnitudes {
    const void* absmax;
    const float *greater, *table, *offset;
};

struct Magnitude {
    float value;
#if NESTED
    float greater;
#endif
};

__device__ __forceinline__ Magnitude load_magnitude(const Magnitudes& all, int block)
{
    Magnitude found;
#if NESTED
    found.value = all.table[((const u8*)all.absmax)[block]];
    found.greater = all.greater[block >> 8];
#else
    found.value = ((const float*)all.absmax)[block];
#endif
    return found;
}

__device__ __forceinline__ float magnitude_of(const Magnitude& found, float offset)
{
#if NESTED
    return __fadd_rn(__fmul_rn(found.value, found.greater), offset);
#else
    return found.value;
#endif
}

#ifdef TOKENS
// Products ------------------------------------------------------------------------------------------------------------

#define VALUES (ROWS * TOKENS)
#define CHUNK 256          // columns of a row that a warp takes at once, 8 a lane
#define CHUNKS (8 / ROWS)  // of a slot: so that each lane has one of the magnitudes of a slot's rows
#define SLOT (CHUNK * CHUNKS)
#define ALL_SLOTS ((WIDTH + SLOT - 1) / SLOT)
#define WHOLE (WIDTH % SLOT == 0)

// Codes of some rows and chunks that are on their way, and the magnitude of one row and block of them.
struct Slot {
    u32 codes[8];
    Magnitude magnitude;
};

__device__ __forceinline__ void load_slot(
    Slot& slot, const u8* __restrict__ codes, const Magnitudes& magnitudes, int row, int index, int lane)
{
    const u8* own = codes + (u64)row * (WIDTH / 2) + (u32)(index * (SLOT / 2) + 4 * lane);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const bool inside = WHOLE || index * SLOT + chunk * CHUNK + 8 * lane < WIDTH;
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            slot.codes[chunk * ROWS + i] = inside ? stream_word(own + i * (WIDTH / 2) + chunk * (CHUNK / 2)) : 0;
    }
    const int block = index * (SLOT / BLOCK) + lane / (4 * ROWS) * (CHUNK / BLOCK) + lane % 4;
    slot.magnitude = Magnitude();
    if (WHOLE || block < WIDTH / BLOCK)
        slot.magnitude = load_magnitude(magnitudes, (row + lane / 4 % ROWS) * (WIDTH / BLOCK) + block);
}

__device__ __forceinline__ void use_slot(
    const Slot& slot, const Value* x, float offset, int index, int lane, float (&sums)[VALUES])
{
    const float magnitude = magnitude_of(slot.magnitude, offset);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        const int column = index * SLOT + chunk * CHUNK + 8 * lane;
        float weights[ROWS][8], scales[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            scales[i] = __shfl_sync(ALL, magnitude, (chunk * ROWS + i) * 4 + lane / 8);
#pragma unroll
            for (int byte = 0; byte < 4; ++byte)
                look_up(slot.codes[chunk * ROWS + i], byte, PLACE * lane, weights[i] + 2 * byte);
        }
        if (!WHOLE && column >= WIDTH) continue;
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            float values[8];
            load_eight(x + token * WIDTH + column, values);
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                float sum = weights[i][0] * values[0];
#pragma unroll
                for (int j = 1; j < 8; ++j) sum += weights[i][j] * values[j];
                sums[i * TOKENS + token] += sum * scales[i];
            }
        }
    }
}

// Returns the sum over all lanes of value `lane / (32 / VALUES)`: lanes exchange half of what they have, and so on.
template <int HAVE, int STEP> __device__ __forceinline__ float add_up(float* sums, int lane)
{
    if constexpr (STEP == 0) {
        return sums[0];
    } else if constexpr (HAVE == 1) {
        sums[0] += __shfl_xor_sync(ALL, sums[0], STEP);
        return add_up<1, STEP / 2>(sums, lane);
    } else {
        const bool upper = lane & STEP;
#pragma unroll
        for (int i = 0; i < HAVE / 2; ++i) {
            const float given = upper ? sums[i] : sums[i + HAVE / 2], kept = upper ? sums[i + HAVE / 2] : sums[i];
            sums[i] = kept + __shfl_xor_sync(ALL, given, STEP);
        }
        return add_up<HAVE / 2, STEP / 2>(sums, lane);
    }
}

__device__ __forceinline__ void finish(
    float sum, const Value* bias, const void* plus, void* out, int wide, int row, u64 at)
{
    if (bias) sum += value_of(bias[row]);
    if (wide) {
        if (plus) sum += ((const float*)plus)[at];
        ((float*)out)[at] = sum;
    } else {
        if (plus) sum = value_of(rounded(sum)) + value_of(((const Value*)plus)[at]);
        ((Value*)out)[at] = rounded(sum);
    }
}

// x (TOKENS, WIDTH) times the rows of a weight, ROWS at a time: `parts` warps share them, each with slots of its own.
// A block goes through its rows in so many `rounds`. The result, of the first `tokens`, is float32 where `wide`, else
// like x.
extern "C" __global__ void __launch_bounds__(32 * WARPS) multiply(
    const Value* x, const u8* __restrict__ codes, const void* __restrict__ absmax, const float* __restrict__ codebook,
    const float* __restrict__ nested_absmax, const float* __restrict__ nested_table, const float* __restrict__ offset,
    const Value* bias, const void* plus, void* out, int rows, int tokens, int parts, int rounds, int wide)
{
    const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    const int warp = __shfl_sync(ALL, threadIdx.x >> 5, 0);  // so the compiler knows that a warp goes one way
    const int group = warp / parts, part = warp - group * parts, groups = warps / parts;
    const Magnitudes magnitudes = {absmax, nested_absmax, nested_table, offset};
    let_others_start();
    fill(codebook);
    const float added = NESTED ? *offset : 0.0f;
    int task = blockIdx.x + gridDim.x * group;
    const int tasks = (rows + ROWS - 1) / ROWS, last = rows - ROWS;  // the last task ends with the last row
    Slot slot[SLOTS];
#pragma unroll
    for (int i = 0; i < SLOTS; ++i)
        if (task < tasks && part + i * parts < ALL_SLOTS)
            load_slot(slot[i], codes, magnitudes, min(task * ROWS, last), part + i * parts, lane);
    wait_for_inputs();
    __syncthreads();
    for (int round = 0; round < rounds; ++round) {
        const int row = min(task * ROWS, last), next = task + gridDim.x * groups;
        float sums[VALUES] = {};
        if (task < tasks)
            for (int first = part; first < ALL_SLOTS; first += SLOTS * parts) {
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) {
                    const int index = first + i * parts, later = index + SLOTS * parts;
                    if (index < ALL_SLOTS) {
                        use_slot(slot[i], x, added, index, lane, sums);
                        if (later < ALL_SLOTS) load_slot(slot[i], codes, magnitudes, row, later, lane);
                    }
                }
            }
#pragma unroll
        for (int i = 0; i < SLOTS; ++i)
            if (next < tasks && part + i * parts < ALL_SLOTS)
                load_slot(slot[i], codes, magnitudes, min(next * ROWS, last), part + i * parts, lane);
        float sum = add_up<VALUES, 16>(sums, lane);
        if (parts == 1) {
            sum = __shfl_sync(ALL, sum, lane * (32 / VALUES));
        } else {  // the parts' first warp adds up what all of them have
            float* own = shared_at<float>(BEHIND) + (round & 1) * warps * VALUES;
            if (lane % (32 / VALUES) == 0) own[warp * VALUES + lane / (32 / VALUES)] = sum;
            __syncthreads();
            sum = 0.0f;
            if (part == 0 && lane < VALUES)
                for (int other = 0; other < parts; ++other) sum += own[(warp + other) * VALUES + lane];
        }
        const int i = lane / TOKENS, token = lane % TOKENS;
        if (part == 0 && lane < VALUES && token < tokens && task < tasks)
            finish(sum, bias, plus, out, wide, row + i, (u64)token * rows + row + i);
        task = next;
    }
}

#else
// Expansion -----------------------------------------------------------------------------------------------------------

#define AHEAD 4  // words that a thread has on their way

// The weights of `count` words of 8 codes from word `first` on.
extern "C" __global__ void __launch_bounds__(1024) expand(
    const u8* __restrict__ codes, const void* __restrict__ absmax, const float* __restrict__ codebook,
    const float* __restrict__ nested_absmax, const float* __restrict__ nested_table, const float* __restrict__ offset,
    Value* __restrict__ out, int first, int count)
{
    const Magnitudes magnitudes = {absmax, nested_absmax, nested_table, offset};
    const int lane = threadIdx.x & 31, step = gridDim.x * blockDim.x;
    fill(codebook);
    const float added = NESTED ? *offset : 0.0f;
    __syncthreads();
    for (i64 start = blockIdx.x * blockDim.x + threadIdx.x; start < count; start += (i64)AHEAD * step) {
        u32 words[AHEAD];
        Magnitude found[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const i64 at = start + (i64)i * step;
            if (at >= count) continue;
            words[i] = stream_word(codes + 4 * (first + at));
            found[i] = load_magnitude(magnitudes, (int)((first + at) / (BLOCK / 8)));
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const i64 at = start + (i64)i * step;
            if (at >= count) continue;
            const float magnitude = magnitude_of(found[i], added);
            float weights[8];
#pragma unroll
            for (int byte = 0; byte < 4; ++byte) look_up(words[i], byte, PLACE * lane, weights + 2 * byte);
#pragma unroll
            for (int j = 0; j < 8; ++j) weights[j] = __fmul_rn(weights[j], magnitude);
            uint4* to = (uint4*)(out + 8 * at);
#if KIND == 0
            const u32* bits = (const u32*)weights;
            to[0] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
            to[1] = make_uint4(bits[4], bits[5], bits[6], bits[7]);
#else
            *to = make_uint4(two_of(weights[0], weights[1]), two_of(weights[2], weights[3]),
                             two_of(weights[4], weights[5]), two_of(weights[6], weights[7]));
#endif
        }
    }
}
#endif
