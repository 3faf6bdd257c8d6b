// Reads a weight in 4 bits and tokens from standard input, computes with a CUDA kernel's source, writes the results.

#define ON_CPU
#include "cuda_on_cpu.h"

static uint4 memory[1 << 16];
template <typename T> T* shared_at(uint32_t address) { return (T*)((char*)memory + address); }
inline uint32_t stream_word(const unsigned char* at) { return *(const uint32_t*)at; }
inline void let_others_start() {}
inline void wait_for_inputs() {}
inline float from_half(uint32_t bits)
{
    const uint16_t low = bits;
    _Float16 value;
    memcpy(&value, &low, 2);
    return value;
}
inline float from_high_half(uint32_t bits) { return from_half(bits >> 16); }
inline uint32_t to_half(float x)
{
    const _Float16 value = (_Float16)x;
    uint16_t bits;
    memcpy(&bits, &value, 2);
    return bits;
}
#include "kernel.cu"

int main()
{
    // Bytes of the nine tensors and of the result, five numbers, blocks, warps, whether threads run in falling order.
    int head[18];
    if (fread(head, sizeof(int), 18, stdin) != 18) return 2;
    std::vector<std::vector<uint4>> in;
    for (int i = 0; i < 9; ++i) {
        in.emplace_back(head[i] / 16 + 1);
        if (fread(in.back().data(), 1, head[i], stdin) != (size_t)head[i]) return 2;
    }
    const int *numbers = head + 10, bytes = head[9];
    std::vector<uint4> out(bytes / 16 + 2);
    const auto tensor = [&](int i) { return head[i] ? (const void*)in[i].data() : nullptr; };
    const auto floats = [&](int i) { return (const float*)tensor(i); };
    const auto codes = (const unsigned char*)tensor(1);
    body = [&] {
#ifdef TOKENS
        multiply((const Value*)tensor(0), codes, tensor(2), floats(3), floats(4), floats(5), floats(6),
                 (const Value*)tensor(7), tensor(8), out.data(), numbers[0], numbers[1], numbers[2], numbers[3],
                 numbers[4]);
#else
        expand(codes, tensor(2), floats(3), floats(4), floats(5), floats(6), (Value*)out.data(), numbers[0],
               numbers[1]);
#endif
    };
    gridDim.x = head[15];
    for (int block = 0; block < gridDim.x; ++block) {
        memset(memory, 0xAA, sizeof(memory));
        run_block(block, 32 * head[16], head[17]);
    }
    fwrite(out.data(), 1, bytes + 16, stdout);  // and what stands behind it, which must stay zero
    return 0;
}
