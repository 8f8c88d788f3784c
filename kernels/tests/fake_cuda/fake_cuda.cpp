// Stands in for libcuda and libcublasLt where there is no GPU: the same functions on host memory, done at once. It shows
// that the Rust side calls the right functions with the right arguments in the right order, and nothing about a GPU.
//
// A launch is not run (the code is for a GPU): it reads the kernel's struct as {u64 to; u32 value, ...} and writes grid,
// threads, shared bytes and the value there. A test may name a function that fails with code 700.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

using u32 = uint32_t;
using u64 = uint64_t;
using Work = std::function<void()>;

#define API extern "C" __attribute__((visibility("default")))

namespace {

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NOT_INITIALIZED = 3, INVALIDATED = 901, NOT_READY = 600, CAPTURED = 900 };

struct Stream {
    u32 flags;
    int priority;
    bool capturing = false;
    std::vector<Work> captured;
};
struct Event {
    bool timed;
    int polls = 0;
    u64 at = 0;
};
struct Module {
    std::string image;
};
struct Function {
    Module* module;
    int dynamic_shared_max = 48 << 10;
};
struct Graph {
    std::vector<Work> nodes;
};

bool initialized, current;
int retained;
u64 clock_ticks;
std::map<u64, size_t> device_memory;
std::set<void*> host_memory;
constexpr size_t MEMORY = size_t(1) << 30;
size_t used;

std::string failing;
int driver_version = 13000;

bool fails(const char* name) { return failing == name; }

// Every function needs cuInit, all but a few a context too.
#define BEGIN(name)                     \
    if (fails(#name)) return 700;       \
    if (!initialized) return NOT_INITIALIZED
#define BEGIN_IN_CONTEXT(name) \
    BEGIN(name);               \
    if (!current) return 201

bool inside(u64 at, size_t bytes) {
    auto next = device_memory.upper_bound(at);
    if (next == device_memory.begin()) return false;
    auto [begin, size] = *--next;
    return at + bytes <= begin + size;
}

int submit(Stream* stream, Work work) {
    if (stream->capturing) stream->captured.push_back(work);
    else work();
    return OK;
}

bool any_capture;
u64 last_algorithm;

}  // namespace

API int cuGetErrorString(int code, const char** text) {
    *text = code == 700 ? "an illegal memory access was encountered" : code == NO_MEMORY ? "out of memory" : nullptr;
    return *text ? OK : INVALID;
}
API int cuInit(u32 flags) {
    if (fails("cuInit") || flags) return 100;
    initialized = true;
    return OK;
}
API int cuDriverGetVersion(int* version) {
    BEGIN(cuDriverGetVersion);
    *version = driver_version;
    return OK;
}
API int cuDeviceGetCount(int* count) {
    BEGIN(cuDeviceGetCount);
    *count = 1;
    return OK;
}
API int cuDeviceGet(int* device, int ordinal) {
    BEGIN(cuDeviceGet);
    *device = ordinal + 40;
    return ordinal ? 101 : OK;
}
API int cuDeviceGetName(char* name, int bytes, int device) {
    BEGIN(cuDeviceGetName);
    std::snprintf(name, bytes, "Fake GPU %d", device);
    return OK;
}
API int cuDeviceGetAttribute(int* value, u32 attribute, int device) {
    BEGIN(cuDeviceGetAttribute);
    const std::map<u32, int> values{{16, 132}, {75, 9}, {76, 0}, {97, 227 << 10}};
    auto found = values.find(attribute);
    if (device != 40 || found == values.end()) return INVALID;
    *value = found->second;
    return OK;
}
API int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    BEGIN(cuDeviceTotalMem_v2);
    *bytes = MEMORY;
    return device == 40 ? OK : INVALID;
}
API int cuDevicePrimaryCtxRetain(void** context, int) {
    BEGIN(cuDevicePrimaryCtxRetain);
    ++retained;
    *context = &retained;
    return OK;
}
API int cuDevicePrimaryCtxRelease_v2(int) {
    BEGIN(cuDevicePrimaryCtxRelease_v2);
    if (--retained == 0) current = false;
    return OK;
}
API int cuCtxSetCurrent(void* context) {
    BEGIN(cuCtxSetCurrent);
    current = context == &retained;
    return current ? OK : INVALID;
}
API int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    BEGIN_IN_CONTEXT(cuCtxGetStreamPriorityRange);
    *least = 0, *greatest = -5;
    return OK;
}
API int cuMemGetInfo_v2(size_t* free, size_t* total) {
    BEGIN_IN_CONTEXT(cuMemGetInfo_v2);
    *free = MEMORY - used, *total = MEMORY;
    return OK;
}
API int cuMemAlloc_v2(u64* address, size_t bytes) {
    BEGIN_IN_CONTEXT(cuMemAlloc_v2);
    if (any_capture) return CAPTURED;
    if (!bytes) return INVALID;
    if (bytes > MEMORY - used) return NO_MEMORY;
    *address = u64(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    std::memset((void*)*address, 0xff, bytes);
    device_memory[*address] = bytes;
    used += bytes;
    return OK;
}
API int cuMemFree_v2(u64 address) {
    BEGIN_IN_CONTEXT(cuMemFree_v2);
    if (!address) return OK;
    auto found = device_memory.find(address);
    if (found == device_memory.end()) return INVALID;
    used -= found->second;
    std::free((void*)address);
    device_memory.erase(found);
    return OK;
}
API int cuMemHostAlloc(void** pointer, size_t bytes, u32 flags) {
    BEGIN_IN_CONTEXT(cuMemHostAlloc);
    if (!bytes || !(flags & 2)) return INVALID;
    *pointer = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    std::memset(*pointer, 0xaa, bytes);
    host_memory.insert(*pointer);
    return OK;
}
API int cuMemFreeHost(void* pointer) {
    BEGIN_IN_CONTEXT(cuMemFreeHost);
    if (!host_memory.erase(pointer)) return INVALID;
    std::free(pointer);
    return OK;
}
API int cuStreamCreateWithPriority(Stream** stream, u32 flags, int priority) {
    BEGIN_IN_CONTEXT(cuStreamCreateWithPriority);
    if (flags != 1 || priority > 0 || priority < -5) return INVALID;
    *stream = new Stream{flags, priority};
    return OK;
}
API int cuStreamDestroy_v2(Stream* stream) {
    BEGIN_IN_CONTEXT(cuStreamDestroy_v2);
    delete stream;
    return OK;
}
API int cuStreamSynchronize(Stream*) {
    BEGIN_IN_CONTEXT(cuStreamSynchronize);
    return OK;
}
API int cuStreamWaitEvent(Stream* stream, Event* event, u32 flags) {
    BEGIN_IN_CONTEXT(cuStreamWaitEvent);
    return stream && event && !flags ? OK : INVALID;
}
API int cuStreamBeginCapture_v2(Stream* stream, u32 mode) {
    BEGIN_IN_CONTEXT(cuStreamBeginCapture_v2);
    if (mode != 1 || stream->capturing) return INVALID;
    any_capture = stream->capturing = true;
    return OK;
}
API int cuStreamEndCapture(Stream* stream, Graph** graph) {
    BEGIN_IN_CONTEXT(cuStreamEndCapture);
    if (!stream->capturing) return INVALID;
    any_capture = stream->capturing = false;
    *graph = new Graph{std::move(stream->captured)};
    stream->captured.clear();
    return OK;
}
API int cuEventCreate(Event** event, u32 flags) {
    BEGIN_IN_CONTEXT(cuEventCreate);
    if (flags != 0 && flags != 2) return INVALID;
    *event = new Event{flags == 0};
    return OK;
}
API int cuEventDestroy_v2(Event* event) {
    BEGIN_IN_CONTEXT(cuEventDestroy_v2);
    delete event;
    return OK;
}
API int cuEventRecord(Event* event, Stream* stream) {
    BEGIN_IN_CONTEXT(cuEventRecord);
    if (!event || !stream) return INVALID;
    event->polls = 1;  // the first question is answered with `not ready`
    event->at = clock_ticks += 2;
    return OK;
}
API int cuEventQuery(Event* event) {
    BEGIN_IN_CONTEXT(cuEventQuery);
    return event->polls-- > 0 ? NOT_READY : OK;
}
API int cuEventSynchronize(Event* event) {
    BEGIN_IN_CONTEXT(cuEventSynchronize);
    event->polls = 0;
    return OK;
}
API int cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
    BEGIN_IN_CONTEXT(cuEventElapsedTime);
    if (!start->timed || !end->timed) return 400;
    *milliseconds = float(end->at - start->at);
    return OK;
}
API int cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, Stream* stream) {
    BEGIN_IN_CONTEXT(cuMemcpyHtoDAsync_v2);
    return inside(to, bytes) ? submit(stream, [=] { std::memcpy((void*)to, from, bytes); }) : INVALID;
}
API int cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, Stream* stream) {
    BEGIN_IN_CONTEXT(cuMemcpyDtoHAsync_v2);
    return inside(from, bytes) ? submit(stream, [=] { std::memcpy(to, (void*)from, bytes); }) : INVALID;
}
API int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, Stream* stream) {
    BEGIN_IN_CONTEXT(cuMemcpyDtoDAsync_v2);
    if (!inside(to, bytes) || !inside(from, bytes)) return INVALID;
    return submit(stream, [=] { std::memcpy((void*)to, (void*)from, bytes); });
}
API int cuMemsetD8Async(u64 at, unsigned char value, size_t bytes, Stream* stream) {
    BEGIN_IN_CONTEXT(cuMemsetD8Async);
    return inside(at, bytes) ? submit(stream, [=] { std::memset((void*)at, value, bytes); }) : INVALID;
}
API int cuModuleLoadData(Module** module, const char* image) {
    BEGIN_IN_CONTEXT(cuModuleLoadData);
    if (std::memcmp(image, "\x7f" "ELF", 4)) return 200;
    // Up to the end of the section headers, which come last in what the compiler makes.
    u64 sections;
    std::memcpy(&sections, image + 40, 8);
    *module = new Module{std::string(image, image + sections)};
    return OK;
}
API int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    BEGIN_IN_CONTEXT(cuModuleGetFunction);
    if (module->image.find(std::string(".text.") + name) == std::string::npos) return 500;
    *function = new Function{module};
    return OK;
}
API int cuModuleUnload(Module* module) {
    BEGIN_IN_CONTEXT(cuModuleUnload);
    delete module;
    return OK;
}
API int cuFuncSetAttribute(Function* function, u32 attribute, int value) {
    BEGIN_IN_CONTEXT(cuFuncSetAttribute);
    if (attribute != 8) return INVALID;
    function->dynamic_shared_max = value;
    return OK;
}
API int cuLaunchKernel(Function* function, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 shared, Stream* stream,
                       void** parameters, void** extra) {
    BEGIN_IN_CONTEXT(cuLaunchKernel);
    if (!function || extra || gz != 1 || by != 1 || bz != 1 || int(shared) > function->dynamic_shared_max) return INVALID;
    struct {
        u64 to;
        u32 value;
    } args;
    std::memcpy(&args, parameters[0], 12);
    if (!inside(args.to, 20)) return 700;
    return submit(stream, [=] {
        const u32 record[5] = {gx, gy, bx, shared, args.value};
        std::memcpy((void*)args.to, record, sizeof record);
    });
}
API int cuGraphInstantiateWithFlags(Graph** exec, Graph* graph, unsigned long long flags) {
    BEGIN_IN_CONTEXT(cuGraphInstantiateWithFlags);
    *exec = new Graph(*graph);
    return flags ? INVALID : OK;
}
API int cuGraphGetNodes(Graph* graph, void** nodes, size_t* count) {
    BEGIN_IN_CONTEXT(cuGraphGetNodes);
    *count = graph->nodes.size();
    return nodes ? INVALID : OK;
}
API int cuGraphDestroy(Graph* graph) {
    BEGIN_IN_CONTEXT(cuGraphDestroy);
    delete graph;
    return OK;
}
API int cuGraphExecDestroy(Graph* exec) {
    BEGIN_IN_CONTEXT(cuGraphExecDestroy);
    delete exec;
    return OK;
}
API int cuGraphUpload(Graph*, Stream*) {
    BEGIN_IN_CONTEXT(cuGraphUpload);
    return OK;
}
API int cuGraphLaunch(Graph* exec, Stream* stream) {
    BEGIN_IN_CONTEXT(cuGraphLaunch);
    for (auto& work : exec->nodes) submit(stream, work);
    return OK;
}
/// What the next calls do: the function that fails (or none), and the version that the driver claims.
API void loramux_fake_set(const char* fail, int version) {
    failing = fail;
    driver_version = version;
}
/// The algorithm of the last product.
API u64 loramux_fake_algorithm() { return last_algorithm; }
/// What is left: memory, host memory, contexts.
API u64 loramux_fake_left() { return used + host_memory.size() + retained; }

// ---- cuBLASLt -------------------------------------------------------------------------------------------------

struct Layout {
    u32 type;
    u64 rows, columns;
    int64_t ld;
};
struct Product {
    int transpose_a = 0;
};
struct Preference {
    std::map<u32, u64> set;
};
struct Answer {
    u64 algo[8];
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

API const char* cublasLtGetStatusString(int status) { return status == 15 ? "not supported" : "a fake failure"; }
API size_t cublasLtGetVersion() { return 130100; }
API int cublasLtCreate(void** handle) {
    *handle = &used;
    return current ? OK : 1;
}
API int cublasLtDestroy(void*) { return OK; }
API int cublasLtMatmulDescCreate(Product** product, int compute, int scale) {
    *product = new Product;
    return compute == 68 && scale == 0 ? OK : 7;
}
API int cublasLtMatmulDescDestroy(Product* product) {
    delete product;
    return OK;
}
API int cublasLtMatmulDescSetAttribute(Product* product, u32 attribute, const void* value, size_t bytes) {
    if (attribute != 3 || bytes != 4) return 7;
    std::memcpy(&product->transpose_a, value, 4);
    return OK;
}
API int cublasLtMatrixLayoutCreate(Layout** layout, u32 type, u64 rows, u64 columns, int64_t ld) {
    *layout = new Layout{type, rows, columns, ld};
    return OK;
}
API int cublasLtMatrixLayoutDestroy(Layout* layout) {
    delete layout;
    return OK;
}
API int cublasLtMatmulPreferenceCreate(Preference** preference) {
    *preference = new Preference;
    return OK;
}
API int cublasLtMatmulPreferenceDestroy(Preference* preference) {
    delete preference;
    return OK;
}
API int cublasLtMatmulPreferenceSetAttribute(Preference* preference, u32 attribute, const void* value, size_t bytes) {
    if (bytes != (attribute == 1 ? 8 : 4)) return 7;
    u64 word = 0;
    std::memcpy(&word, value, bytes);
    preference->set[attribute] = word;
    return OK;
}
// Four answers: one that adds in place, one that asks for too much, the slow one that takes 3 ticks and the fast one.
API int cublasLtMatmulAlgoGetHeuristic(void*, Product*, Layout* a, Layout* b, Layout* c, Layout* d, Preference* preference,
                                       int wanted, Answer* answers, int* count) {
    *count = 0;
    if (a->columns == 13) return 15;
    auto& set = preference->set;
    if (set[1] != 32 << 20 || set[3] != 2 || set[5] != 16 || set[8] != 16 || wanted != 8 || c != d || b->rows != a->rows) return 7;
    const u64 algos[4][3] = {{1, 1, 0}, {2, 0, size_t(64) << 20}, {3, 0, 0}, {4, 2, 1 << 20}};
    for (auto& algo : algos) answers[(*count)++] = Answer{{algo[0], algo[1]}, algo[2], 0, 1.0f, {}};
    return OK;
}
API int cublasLtMatmulAlgoConfigGetAttribute(const u64* algo, u32 attribute, void* value, size_t bytes, size_t* written) {
    if (attribute != 3 || bytes != 4) return 7;
    const u32 scheme = u32(algo[1]);
    std::memcpy(value, &scheme, 4);
    *written = 4;
    return OK;
}
static float load(u32 type, const void* base, u64 at) {
    if (type == 0) return ((const float*)base)[at];
    const uint16_t bits = ((const uint16_t*)base)[at];
    if (type == 14) {
        const u32 word = u32(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float value = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return bits >> 15 ? -value : value;
}
API int cublasLtMatmul(void*, Product* product, const float* alpha, const void* a, Layout* al, const void* b, Layout* bl,
                       const float* beta, const void* c, Layout* cl, void* d, Layout* dl, const u64* algo, void* workspace,
                       size_t workspace_bytes, Stream* stream) {
    if (algo[0] < 3 || *alpha != 1 || *beta != 0 || c != d || cl != dl || product->transpose_a != 1) return 7;
    if (!inside(u64(workspace), workspace_bytes) || workspace_bytes != 32 << 20) return 7;
    const Layout A = *al, B = *bl, D = *dl;
    if (A.columns != D.rows || B.columns != D.columns || A.rows != B.rows) return 7;
    clock_ticks += algo[0] == 3 ? 3 : 1;
    last_algorithm = algo[0];
    return submit(stream, [=] {
        for (u64 j = 0; j < D.columns; ++j)
            for (u64 i = 0; i < D.rows; ++i) {
                float sum = 0;
                for (u64 k = 0; k < A.rows; ++k) sum += load(A.type, a, k + i * A.ld) * load(B.type, b, k + j * B.ld);
                if (D.type == 0) ((float*)d)[i + j * D.ld] = sum;
                else if (D.type == 14) {
                    u32 word;
                    std::memcpy(&word, &sum, 4);
                    ((uint16_t*)d)[i + j * D.ld] = uint16_t(word >> 16);
                }
            }
    });
}
