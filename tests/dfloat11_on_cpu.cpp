// Reads a piece of DFloat11 from standard input, expands it with the CUDA kernel's source, and writes the weights.

#include "cuda_on_cpu.h"

extern "C" {
extern uint4 shared[];
}
#include "kernel.cu"
uint4 shared[1 << 16];

static std::vector<uint4> read_some(size_t bytes)
{
    std::vector<uint4> data((bytes + 15) / 16);
    if (fread(data.data(), 1, bytes, stdin) != bytes) exit(2);
    return data;
}

int main()
{
    // Bytes of the six tensors, tables, start, stop, slots, blocks, whether threads run in falling order, shared bytes.
    int head[13];
    if (fread(head, sizeof(int), 13, stdin) != 13) return 2;
    std::vector<std::vector<uint4>> in;
    for (int i = 0; i < 6; ++i) in.push_back(read_some(head[i]));
    const int start = head[7], stop = head[8], chunks = head[3] / 4 - 1;
    std::vector<uint4> out((stop - start) / 8 + 2);
    gridDim.x = head[10];
    body = [&] {
        expand((const u8*)in[0].data(), (const u8*)in[1].data(), (const u8*)in[2].data(), (const int*)in[3].data(),
               (const u8*)in[4].data(), (const uint2*)in[5].data(), (u16*)out.data(), head[6], chunks, start, stop,
               head[9]);
    };
    for (int block = 0; block < gridDim.x; ++block) {
        memset(shared, 0xAA, sizeof(shared));
        run_block(block, WINDOWS, head[11]);
        for (size_t byte = head[12]; byte < sizeof(shared); ++byte)
            if (((const u8*)shared)[byte] != 0xAA) {
                fprintf(stderr, "byte %zu of shared memory was written, of %d\n", byte, head[12]);
                return 3;
            }
    }
    fwrite(out.data(), 2, (size_t)(stop - start) + 8, stdout);  // and what stands behind it, which must stay zero
    return 0;
}
