// A stand-in for TensorRT's three libraries: enough for NVIDIA's own Python bindings to load and to be called.
//
// It computes nothing. Every object is the same: each virtual function of it gives the answer that was set last with
// one of the `fake_` functions. So the bindings' names, overloads, conversions and lifetimes are the real ones, and what TensorRT
// would have said is the test's. x86-64 only: a result in a register lies in RAX and in XMM0, a larger one where RDI
// points, and the table of slots is longer than any of the interfaces'.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <typeinfo>
#include <utility>

namespace
{
struct Dims
{
    int32_t rank;
    int64_t sizes[8];
};

struct InRegisters // RAX and XMM0 at once, by the System V calling convention
{
    int64_t integer;
    double real;
};

struct Object
{
    void const* const* slots;
    Object* implementation[15]; // NVIDIA's classes hand every call on to one of these
    void const* bytes;          // of an IHostMemory
    int64_t size;
};

InRegisters answer{1, 1.0};
Dims answerShape{0, {}};
constexpr int64_t kMOST_OBJECTS = 1 << 16;
Object* objects = nullptr; // never freed: the bindings may hold one anywhere
int64_t objectCount = 0;

bool isOurs(void* found)
{
    return found >= objects && found < objects + objectCount;
}

template <int kSLOT>
InRegisters called(void* first, void* /*second*/)
{
    if (!isOurs(first)) // then it is the place of a large result, and the object comes second
    {
        std::memcpy(first, &answerShape, sizeof answerShape);
        return {reinterpret_cast<int64_t>(first), 0.0};
    }
    auto const* object = static_cast<Object*>(first);
    if (object->bytes != nullptr) // after the two destructors: data, size, type; a plan's is int8
    {
        constexpr int64_t kINT8 = 2;
        int64_t const said[] = {0, 0, reinterpret_cast<int64_t>(object->bytes), object->size, kINT8};
        return {kSLOT < 5 ? said[kSLOT] : 0, 0.0};
    }
    return answer;
}

template <int... kSLOTS>
void const* const* table(std::integer_sequence<int, kSLOTS...>)
{
    // Before the functions: where the whole object begins, and its type, which pybind11 asks for and does not know.
    static void const* const slots[] = {
        nullptr, &typeid(Object), reinterpret_cast<void const*>(&called<kSLOTS>)...};
    return slots + 2;
}

Object* make()
{
    if (objects == nullptr)
    {
        objects = static_cast<Object*>(std::calloc(kMOST_OBJECTS, sizeof(Object)));
    }
    if (objectCount == kMOST_OBJECTS)
    {
        std::abort();
    }
    auto* made = objects + objectCount++;
    made->slots = table(std::make_integer_sequence<int, 400>{});
    for (auto& implementation : made->implementation)
    {
        implementation = made;
    }
    return made;
}
} // namespace

extern "C"
{
void fake_integer(int64_t value)
{
    answer = {value, 0.0};
}
void fake_real(double value, int32_t single)
{
    answer = {0, value};
    if (single)
    {
        float const narrow = static_cast<float>(value);
        std::memcpy(&answer.real, &narrow, sizeof narrow);
    }
}
void fake_shape(int32_t rank, int64_t const* sizes)
{
    answer = {1, 0.0}; // what is asked on the way, such as whether there is such a tensor
    answerShape = {};
    answerShape.rank = rank;
    std::memcpy(answerShape.sizes, sizes, sizeof(int64_t) * (rank > 0 ? rank : 0));
}
void* fake_object()
{
    return make();
}
void* fake_memory(void const* bytes, int64_t size)
{
    auto* made = make();
    made->bytes = bytes;
    made->size = size;
    return made;
}

// What the bindings ask TensorRT's libraries for.
void* createInferBuilder_INTERNAL(void*, int32_t)
{
    return make();
}
void* createInferRuntime_INTERNAL(void*, int32_t)
{
    return make();
}
void* createInferRefitter_INTERNAL(void*, void*, int32_t)
{
    return make();
}
void* createNvOnnxParser_INTERNAL(void*, void*, int32_t)
{
    return make();
}
void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int32_t)
{
    return make();
}
void* getPluginRegistry()
{
    return make();
}
void* getBuilderPluginRegistry(int32_t)
{
    return make();
}
int32_t getNvOnnxParserVersion()
{
    return 0;
}
bool initLibNvInferPlugins(void*, char const*)
{
    return true;
}
}
