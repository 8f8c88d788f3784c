// What this machine can do at most: GB/s read from memory, and GFLOP/s of f32 FMA and of vdpbf16ps, with one thread and with many.
// One JSON object per line on stdout.
//
//     machine [--threads 2] [--megabytes 1024] [--repeats 31]
//
// x86-64 with AVX-512; the bf16 line is left out where the processor has no AVX-512-BF16.
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

using Clock = std::chrono::steady_clock;

static std::atomic<float> sink;

// Reads a range with eight independent sums, so that no addition waits for another.
__attribute__((target("avx512f"))) static void read_all(const float *from, size_t floats) {
    __m512i sums[8];
    for (auto &sum : sums) sum = _mm512_setzero_si512();
    for (size_t i = 0; i + 128 <= floats; i += 128)
        for (int j = 0; j < 8; j++) sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(from + i + 16 * j));
    __m512i all = sums[0];
    for (int j = 1; j < 8; j++) all = _mm512_xor_si512(all, sums[j]);
    sink.store(float(_mm512_reduce_add_epi32(all)));
}

static const int LANES = 16;           // independent sums: enough to hide the latency of two pipes
static const long STEPS = 2'000'000;  // of LANES instructions each: some ms, so that a few repeats meet no other program

__attribute__((target("avx512f"))) static void fma_f32() {
    __m512 sums[LANES], a = _mm512_set1_ps(1.0001f), b = _mm512_set1_ps(0.9999f);
    for (auto &sum : sums) sum = _mm512_setzero_ps();
    for (long i = 0; i < STEPS; i++) {
        for (auto &sum : sums) sum = _mm512_fmadd_ps(a, b, sum);
        // The compiler may not fold the loop away nor move the operands.
        asm volatile("" : "+v"(a), "+v"(b));
    }
    float all = 0;
    for (auto &sum : sums) all += _mm512_reduce_add_ps(sum);
    sink.store(all);
}

__attribute__((target("avx512f,avx512bf16"))) static void dot_bf16() {
    __m512 sums[LANES];
    __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.01f), _mm512_set1_ps(0.99f)), b = a;
    for (auto &sum : sums) sum = _mm512_setzero_ps();
    for (long i = 0; i < STEPS; i++) {
        for (auto &sum : sums) sum = _mm512_dpbf16_ps(sum, a, b);
        asm volatile("" : "+v"(a), "+v"(b));
    }
    float all = 0;
    for (auto &sum : sums) all += _mm512_reduce_add_ps(sum);
    sink.store(all);
}

// Seconds in which `threads` pinned threads did `work(thread)` once each, all started together.
template <class Work> static double together(int threads, Work work) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> team;
    for (int t = 0; t < threads; t++)
        team.emplace_back([&, t] {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(t, &one);
            pthread_setaffinity_np(pthread_self(), sizeof one, &one);
            ready.fetch_add(1);
            while (!go.load(std::memory_order_acquire)) sched_yield();
            work(t);
        });
    while (ready.load() < threads) sched_yield();
    auto before = Clock::now();
    go.store(true, std::memory_order_release);
    for (auto &thread : team) thread.join();
    return std::chrono::duration<double>(Clock::now() - before).count();
}

static void report(const char *op, int threads, std::vector<double> rates, const char *unit) {
    std::sort(rates.begin(), rates.end());
    std::printf("{\"op\": \"%s\", \"threads\": %d, \"unit\": \"%s\", \"median\": %.1f, \"best\": %.1f}\n", op, threads, unit,
                rates[rates.size() / 2], rates.back());
    std::fflush(stdout);
}

int main(int argc, char **argv) {
    int threads = std::max(1u, std::thread::hardware_concurrency()), repeats = 31;
    size_t megabytes = 1024;
    for (int i = 1; i + 1 < argc; i += 2) {
        std::string name = argv[i];
        long value = std::atol(argv[i + 1]);
        if (value < 1) value = 1;
        if (name == "--threads") threads = int(value);
        if (name == "--megabytes") megabytes = size_t(value);
        if (name == "--repeats") repeats = int(value);
    }
    if (!__builtin_cpu_supports("avx512f")) {
        std::fprintf(stderr, "machine: needs AVX-512\n");
        return 1;
    }
    size_t bytes = megabytes << 20;
    float *data = static_cast<float *>(std::aligned_alloc(1 << 21, bytes));
    if (!data) return 1;
    madvise(data, bytes, MADV_HUGEPAGE);
    std::memset(data, 1, bytes);
    std::vector<int> teams = {1};
    if (threads > 1) teams.push_back(threads);
    for (int team : teams) {
        std::vector<double> read, f32, bf16;
        for (int i = 0; i < repeats; i++) {
            size_t share = bytes / 4 / team;
            read.push_back(bytes / together(team, [&](int t) { read_all(data + share * t, share); }) / 1e9);
        }
        report("read", team, read, "GB/s");
        for (int i = 0; i < repeats; i++) f32.push_back(team * STEPS * LANES * 32.0 / together(team, [](int) { fma_f32(); }) / 1e9);
        report("f32 FMA", team, f32, "GFLOP/s");
        if (!__builtin_cpu_supports("avx512bf16")) continue;
        for (int i = 0; i < repeats; i++) bf16.push_back(team * STEPS * LANES * 64.0 / together(team, [](int) { dot_bf16(); }) / 1e9);
        report("vdpbf16ps", team, bf16, "GFLOP/s");
    }
    std::free(data);
    return 0;
}
