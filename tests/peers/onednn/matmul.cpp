// oneDNN's matrix product on this machine: bf16 x bf16 -> f32 or bf16, weights in the layout that oneDNN asks for (format_tag::any).
// One JSON object per line on stdout. The number of threads is OMP_NUM_THREADS; see README.md for how to build and run it.
//
//     matmul [--seconds 0.2] [--out f32|bf16|both] [--m 1,4,16] [--shapes 1536x576,576x1536]
//
// A shape is N x K: outputs by inputs, as in a weight's shape. "warm" uses one weight again and again; "cold" takes turns among
// copies of at least 160 MB together, so that each is read from memory as in a real step.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"

using dnnl::memory;
using Clock = std::chrono::steady_clock;

static const size_t COLD_BYTES = size_t(160) << 20;

struct Options {
    double seconds = 0.2;
    std::vector<bool> bf16_out = {false, true};
    std::vector<long> rows = {1, 4, 16, 64, 256};
    std::vector<std::pair<long, long>> shapes = {{1536, 576}, {576, 1536}, {4096, 4096}};
};

static std::vector<std::string> split(const std::string &text, char at) {
    std::vector<std::string> parts;
    for (size_t from = 0, to; from <= text.size(); from = to + 1) {
        to = std::min(text.find(at, from), text.size());
        parts.push_back(text.substr(from, to - from));
    }
    return parts;
}

static Options parse(int argc, char **argv) {
    Options options;
    for (int i = 1; i < argc; i += 2) {
        std::string name = argv[i];
        if (i + 1 == argc) throw std::invalid_argument(name + " needs a value");
        std::string value = argv[i + 1];
        if (name == "--seconds") {
            options.seconds = std::stod(value);
        } else if (name == "--out") {
            options.bf16_out.clear();
            if (value != "bf16") options.bf16_out.push_back(false);
            if (value != "f32") options.bf16_out.push_back(true);
        } else if (name == "--m") {
            options.rows.clear();
            for (auto &part : split(value, ',')) options.rows.push_back(std::stol(part));
        } else if (name == "--shapes") {
            options.shapes.clear();
            for (auto &part : split(value, ',')) {
                auto sides = split(part, 'x');
                options.shapes.emplace_back(std::stol(sides.at(0)), std::stol(sides.at(1)));
            }
        } else {
            throw std::invalid_argument("unknown option " + name);
        }
    }
    return options;
}

// bf16 values in -1..1 (truncated, which is exact enough for a benchmark).
static void fill(uint16_t *to, size_t n) {
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        float value = float(state >> 40) / float(1 << 23) - 1.0f;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        to[i] = uint16_t(bits >> 16);
    }
}

static void measure(const dnnl::engine &engine, dnnl::stream &stream, const Options &options, long m, long n, long k, bool bf16_out) {
    using tag = memory::format_tag;
    using type = memory::data_type;
    memory::desc x_desc({m, k}, type::bf16, tag::ab), any({k, n}, type::bf16, tag::any);
    memory::desc y_desc({m, n}, bf16_out ? type::bf16 : type::f32, tag::ab);
    dnnl::matmul::primitive_desc description(engine, x_desc, any, y_desc);
    dnnl::matmul product(description);

    // The weight as a checkpoint has it, N x K row by row, is K x N with the strides swapped.
    memory plain({{k, n}, type::bf16, tag::ba}, engine);
    fill(static_cast<uint16_t *>(plain.get_data_handle()), size_t(n) * k);
    memory x(x_desc, engine), y(y_desc, engine);
    fill(static_cast<uint16_t *>(x.get_data_handle()), size_t(m) * k);
    std::memset(y.get_data_handle(), 0, y_desc.get_size());

    size_t bytes = size_t(n) * k * 2;
    size_t copies = std::max<size_t>(2, COLD_BYTES / bytes + 1);
    std::vector<std::unordered_map<int, memory>> cases;
    for (size_t i = 0; i < copies; i++) {
        memory packed(description.weights_desc(), engine);
        dnnl::reorder(plain, packed).execute(stream, plain, packed);
        cases.push_back({{DNNL_ARG_SRC, x}, {DNNL_ARG_WEIGHTS, packed}, {DNNL_ARG_DST, y}});
    }
    stream.wait();

    for (bool cold : {false, true}) {
        std::vector<double> seconds;
        // The first round is warm-up.
        for (int round = 0; round < 2; round++) {
            seconds.clear();
            auto end = Clock::now() + std::chrono::duration<double>(round ? options.seconds : options.seconds / 4);
            for (size_t i = 0; seconds.size() < 5 || Clock::now() < end; i++) {
                auto before = Clock::now();
                product.execute(stream, cases[cold ? i % copies : 0]);
                stream.wait();
                seconds.push_back(std::chrono::duration<double>(Clock::now() - before).count());
            }
        }
        std::sort(seconds.begin(), seconds.end());
        double median = seconds[seconds.size() / 2];
        std::printf("{\"op\": \"linear\", \"n\": %ld, \"k\": %ld, \"m\": %ld, \"out\": \"%s\", \"weights\": \"%s\", \"runs\": %zu, \"us\": %.2f, "
                    "\"us_min\": %.2f, \"gflops\": %.1f, \"gbs\": %.2f, \"kernel\": \"%s\"}\n",
                    n, k, m, bf16_out ? "bf16" : "f32", cold ? "cold" : "warm", seconds.size(), median * 1e6, seconds[0] * 1e6,
                    2.0 * m * n * k / median / 1e9, bytes / median / 1e9, description.impl_info_str());
        std::fflush(stdout);
    }
}

int main(int argc, char **argv) try {
    Options options = parse(argc, argv);
    dnnl::engine engine(dnnl::engine::kind::cpu, 0);
    dnnl::stream stream(engine);
    const dnnl_version_t *version = dnnl_version();
    const char *threads = std::getenv("OMP_NUM_THREADS");
    std::printf("{\"op\": \"about\", \"library\": \"oneDNN %d.%d.%d\", \"isa\": %d, \"threads\": \"%s\"}\n", version->major, version->minor,
                version->patch, int(dnnl::get_effective_cpu_isa()), threads ? threads : "");
    for (auto [n, k] : options.shapes)
        for (long m : options.rows)
            for (bool bf16_out : options.bf16_out) measure(engine, stream, options, m, n, k, bf16_out);
    return 0;
} catch (const std::exception &error) {
    std::fprintf(stderr, "matmul: %s\n", error.what());
    return 1;
}
