// The one file that knows Python. Tensors and the current stream cross here through DLPack's exchange API; every kernel
// that kernels.def lists becomes a callable (outputs..., arguments...) -> None, or the words of its refusal.
#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/features.h"
#include "cpu/parallel.h"
#include "dlpack.h"
#include "op.h"

namespace py = pybind11;
using namespace dk;

#define K(rung, op) extern "C" const Entry dk_##rung##_##op;
#include "kernels.def"
#undef K

namespace {

constexpr int kMaxParams = 32, kMaxViews = 64, kMaxDims = 8;

// What makes a tensor plain, and how to see into it. Filled once by init(), from Python.
struct Torch {
    const dlpack::ExchangeAPI* api = nullptr;  // null: the attributes of the Python object are read instead
    py::object describe, stream, threads, scratch, tensor, parameter, is_neg, grad_enabled, forward_ad, requires_grad,
        dual_level, forced, alike, empty_like, empty_strided, dtype;
    std::vector<py::object> modes;  // callables, each falsy while no mode, transform or tracer is in force
};
Torch* torch = nullptr;  // leaked on purpose: the interpreter may go first

py::object owned(PyObject* result) {  // a new reference, or the Python error that came instead
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

DType dtype_of(uint8_t code, uint8_t bits) {
    if (code == dlpack::kFloat) return bits == 32 ? DType::f32 : bits == 16 ? DType::f16 : DType::other;
    if (code == dlpack::kInt) return bits == 8 ? DType::i8 : bits == 32 ? DType::i32 : bits == 64 ? DType::i64 : DType::other;
    if (bits == 8) return code == dlpack::kUInt ? DType::u8 : code == dlpack::kBool ? DType::b8 : DType::other;
    return code == dlpack::kBfloat && bits == 16 ? DType::bf16 : DType::other;
}

// What one call borrows, and nothing here outlives it: the tensors in the order of the arguments, then the values.
struct Frame {
    std::array<Value, kMaxParams> values;
    std::array<View, kMaxViews> views;
    std::array<int64_t, 2 * kMaxDims> dims[kMaxViews];  // used by the fallback only
    std::array<PyObject*, kMaxViews> held;              // their owners: a list may lose its items while a kernel works
    int used = 0, taken = 0;                            // views filled; of these, given to a value
    dlpack::Device device{0, 0};

    Frame() = default;
    Frame(const Frame&) = delete;
    ~Frame() {
        while (used > 0) Py_DECREF(held[--used]);
    }

    bool see(py::handle t);
    View* take(PyObject* tensor);
    Value convert(Kind kind, PyObject* a);
    const char* arguments(const Entry& e, PyObject* const* args);
    const char* run(const Entry& e, PyObject* out);
};

// Without the exchange API: pointer, device type and index, type code and bits, shape and strides, as Python tells them.
dlpack::Tensor ask_python(py::handle t, std::array<int64_t, 2 * kMaxDims>& dims) {
    const py::tuple told = torch->describe(t);
    const py::tuple shape = told[5], stride = told[6];
    const auto ndim = static_cast<int32_t>(shape.size());
    if (ndim > kMaxDims) throw py::value_error("more than 8 dimensions");
    for (int i = 0; i < ndim; ++i) dims[i] = shape[i].cast<int64_t>(), dims[kMaxDims + i] = stride[i].cast<int64_t>();
    const dlpack::Device device{told[1].cast<int32_t>(), told[2].cast<int32_t>()};
    const dlpack::DataType dtype{told[3].cast<uint8_t>(), told[4].cast<uint8_t>(), 1};
    return {reinterpret_cast<void*>(told[0].cast<uintptr_t>()), device, ndim, dtype, dims.data(), dims.data() + kMaxDims, 0};
}

// False, with no Python error set, where the tensor has no memory that could be read (meta, sparse, fake), or not on the
// device of the others.
bool Frame::see(py::handle t) {
    if (used == kMaxViews) return false;
    dlpack::Tensor d{};
    try {
        if (!torch->api)
            d = ask_python(t, dims[used]);
        else if (torch->api->view_from_object(t.ptr(), &d) != 0)
            throw py::error_already_set();
    } catch (py::error_already_set&) {
        return false;
    }
    if (d.device.type != dlpack::kCPU && d.device.type != dlpack::kCUDA) return false;
    if (device.type == 0) device = d.device;
    if (device.type != d.device.type || device.id != d.device.id) return false;
    const DType dtype = dtype_of(d.dtype.code, d.dtype.bits);
    const View v{static_cast<char*>(d.data) + d.byte_offset, d.shape, d.strides, d.ndim, dtype};
    if (!d.data && v.numel() != 0) return false;
    Py_INCREF(t.ptr());
    held[used] = t.ptr();
    views[used++] = v;
    return true;
}

// The view of the next tensor: the one that Plain has seen, else it is seen here.
View* Frame::take(PyObject* tensor) {
    if (taken == used && !see(tensor))
        throw py::type_error("expected tensors with memory of their own, all on one CPU or CUDA device");
    return &views[taken++];
}

bool is_tensor(PyObject* a) {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(a));
    return type == torch->tensor.ptr() || type == torch->parameter.ptr() || py::isinstance(a, torch->tensor);
}

double real_of(PyObject* a) {
    if (!PyFloat_Check(a) && !PyLong_Check(a)) throw py::cast_error();
    return py::handle(a).cast<double>();
}

Value Frame::convert(Kind kind, PyObject* a) {
    Value v{};
    switch (kind) {
        case Kind::optional:
            if (a == Py_None) {
                v.view = View{nullptr, nullptr, nullptr, -1, DType::other};
                break;
            }
            [[fallthrough]];
        case Kind::tensor:
            if (!is_tensor(a)) throw py::cast_error();
            v.view = *take(a);
            break;
        case Kind::tensors: {
            if (!PyList_Check(a) && !PyTuple_Check(a)) throw py::cast_error();
            v.views = Views{views.data() + taken, 0};
            for (; v.views.count < PySequence_Fast_GET_SIZE(a); ++v.views.count) {
                PyObject* item = PySequence_Fast_GET_ITEM(a, v.views.count);
                if (!is_tensor(item)) throw py::cast_error();
                take(item);
            }
            break;
        }
        case Kind::integer:
            if (!PyLong_Check(a)) throw py::cast_error();
            v.integer = py::handle(a).cast<int64_t>();
            break;
        case Kind::optional_real: v.optional_real = OptionalReal{a == Py_None ? 0 : real_of(a), a != Py_None}; break;
        case Kind::real: v.real = real_of(a); break;
        case Kind::boolean:
            if (!PyBool_Check(a)) throw py::cast_error();
            v.boolean = a == Py_True;
            break;
        case Kind::text: {
            Py_ssize_t n = 0;
            const char* s = PyUnicode_Check(a) ? PyUnicode_AsUTF8AndSize(a, &n) : nullptr;
            if (!s) throw(PyErr_Clear(), py::cast_error());  // no text, or a lone surrogate, which has no UTF-8
            v.text = Text{s, static_cast<size_t>(n)};
            break;
        }
    }
    return v;
}

// All values but the outputs', which are seen last: Plain has seen the arguments alone. nullptr, or the words of a refusal.
const char* Frame::arguments(const Entry& e, PyObject* const* args) {
    try {
        for (int i = 1; i < e.count; ++i) values[i] = convert(e.kinds[i], args[i - 1]);
    } catch (const py::cast_error&) {
        return "an argument of another type than the signature has";  // the op's check names it
    }
    return taken == used ? nullptr : "a tensor where the signature has none";
}

// nullptr once the kernel has done its work, or the words of its refusal.
const char* Frame::run(const Entry& e, PyObject* out) {
    values[0] = convert(e.kinds[0], out);
    // In every new thread torch's first look sets OpenMP's number of threads: nothing of torch's may have run here yet.
    static thread_local const py::object* const threads = (torch->threads(), nullptr);
    static_cast<void>(threads);
    Stream stream{nullptr, device.id, nullptr};
    if (const int64_t bytes = e.scratch ? e.scratch(values.data()) : 0) {
        const py::object memory = torch->scratch(bytes, static_cast<int>(device.type), device.id);
        if (!see(memory)) throw std::runtime_error("no scratch memory");
        stream.scratch = views[used - 1].data;
    }
    if (device.type == dlpack::kCUDA) {
        if (!torch->api)
            stream.handle = reinterpret_cast<void*>(torch->stream(device.id).cast<uintptr_t>());
        else if (torch->api->current_stream(device.type, device.id, &stream.handle) != 0)
            throw py::error_already_set();
    }
    Refusal why = nullptr;
    {
        py::gil_scoped_release nogil;
        why = e.call(stream, values.data());
    }
    if (why && *why == '!') throw std::runtime_error(std::string(e.op) + ": " + (why + 1));
    return why;
}

// Whether a call may go straight to a kernel: a subclass, a gradient, a mode, a transform, a dual level, a negative bit or a
// tensor without memory goes through torch.library, which knows what to do with it.
struct Plain {
    Frame& frame;
    bool grad = false;
    descrgetfunc get = Py_TYPE(torch->requires_grad.ptr())->tp_descr_get;  // the attribute without the search for its name

    bool value(PyObject* a) {
        const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(a));
        if (type == torch->tensor.ptr() || type == torch->parameter.ptr()) {
            if (!frame.see(a) || (grad && owned(get(torch->requires_grad.ptr(), a, nullptr)).ptr() == Py_True)) return false;
            return owned(PyObject_CallOneArg(torch->is_neg.ptr(), a)).ptr() == Py_False;
        }
        if (PyList_CheckExact(a) || PyTuple_CheckExact(a)) {
            for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(a); ++i)
                if (!value(PySequence_Fast_GET_ITEM(a, i))) return false;
            return true;
        }
        return a == Py_None || PyFloat_CheckExact(a) || PyLong_CheckExact(a) || PyBool_Check(a) || PyUnicode_CheckExact(a);
    }
    bool call(PyObject* const* args, Py_ssize_t count) {
        for (const py::object& mode : torch->modes) {
            const py::object set = owned(PyObject_CallNoArgs(mode.ptr()));
            if (!set.is_none() && PyObject_IsTrue(set.ptr()) != 0) return false;
        }
        PyObject* level = PyDict_GetItemWithError(torch->forward_ad.ptr(), torch->dual_level.ptr());
        if (!level || PyLong_AsLong(level) >= 0) return false;
        grad = owned(PyObject_CallNoArgs(torch->grad_enabled.ptr())).ptr() == Py_True;
        for (Py_ssize_t i = 0; i < count; ++i)
            if (!value(args[i])) return false;
        return true;
    }
};

// A Python function without pybind11's argument tuple: the call is on everybody's hot path.
template <class F>
PyObject* translated(F&& body) {
    try {
        return body().release().ptr();
    } catch (py::error_already_set& e) {
        e.restore();
    } catch (const py::builtin_exception& e) {
        e.set_error();
    } catch (const std::exception& e) {
        PyErr_SetString(PyExc_RuntimeError, e.what());
    }
    return nullptr;
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

py::object function(const char* name, Fast f, py::object self) {
    auto* def = new PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f)), METH_FASTCALL, nullptr};
    return owned(PyCFunction_New(def, self.ptr()));
}

PyObject* invoke(PyObject* entry, PyObject* const* args, Py_ssize_t n);
const Entry* entry_of(PyObject* f) {  // a kernel of ours, else null
    if (!PyCFunction_Check(f) || PyCFunction_GET_FUNCTION(f) != reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&invoke)))
        return nullptr;
    return static_cast<const Entry*>(PyCapsule_GetPointer(PyCFunction_GET_SELF(f), nullptr));
}

// kernel(out, arguments...) -> None, or why not
PyObject* invoke(PyObject* entry, PyObject* const* args, Py_ssize_t n) {
    return translated([&]() -> py::object {
        const auto& e = *static_cast<const Entry*>(PyCapsule_GetPointer(entry, nullptr));
        if (n != e.count)
            throw py::type_error(std::string(e.op) + " takes " + std::to_string(e.count) + " arguments: " + e.params);
        Frame frame;
        const char* why = frame.arguments(e, args + 1);
        if (!why) why = frame.run(e, args[0]);
        return why ? py::object(py::str(why)) : py::none();
    });
}

// empty_like, for contiguous x; on a CPU past torch's dispatcher, which has nothing to say where a call is plain.
py::object like(const Frame& frame, PyObject* x) {
    const View& v = frame.views[0];
    if (frame.device.type != dlpack::kCPU || torch->empty_strided.is_none())
        return owned(PyObject_CallOneArg(torch->empty_like.ptr(), x));
    py::tuple shape(v.ndim), stride(v.ndim);
    for (int i = 0; i < v.ndim; ++i) shape[i] = py::int_(v.shape[i]), stride[i] = py::int_(v.stride[i]);
    const py::object dtype = owned(Py_TYPE(torch->dtype.ptr())->tp_descr_get(torch->dtype.ptr(), x, nullptr));
    PyObject* args[] = {shape.ptr(), stride.ptr(), dtype.ptr()};
    return owned(PyObject_Vectorcall(torch->empty_strided.ptr(), args, 3, nullptr));
}

// attempt(first, allocate, arguments...): the outputs, where the call is plain, no rung is forced and first[device] takes it;
// else the device type (DLPack's) of a plain call, or 0. Everything that an eager call needs, in one crossing.
PyObject* attempt(PyObject*, PyObject* const* args, Py_ssize_t n) {
    return translated([&]() -> py::object {
        PyObject *first = args[0], *allocate = args[1], *const *given = args + 2;
        Frame frame;
        if (!Plain{frame}.call(given, n - 2) || frame.device.type == 0) return py::int_(0);
        py::object device = py::int_(frame.device.type);
        PyObject* forced = nullptr;
        if (PyContextVar_Get(torch->forced.ptr(), nullptr, &forced) != 0) throw py::error_already_set();
        if (!owned(forced).is_none()) return device;
        const py::object kernel = owned(PyObject_GetItem(first, device.ptr()));
        const Entry* e = entry_of(kernel.ptr());
        if (kernel.is_none() || (e && (n - 1 != e->count || frame.arguments(*e, given)))) return device;
        const bool alike = allocate == torch->alike.ptr() && frame.held[0] == given[0] && frame.views[0].contiguous();
        py::object out =
            alike ? like(frame, given[0]) : owned(PyObject_Vectorcall(allocate, given, static_cast<size_t>(n - 2), nullptr));
        if (e) return frame.run(*e, out.ptr()) ? device : out;
        std::vector<PyObject*> all(given - 1, given + n - 2);
        all[0] = out.ptr();
        return owned(PyObject_Vectorcall(kernel.ptr(), all.data(), all.size(), nullptr)).is_none() ? out : device;
    });
}

void init(const py::object& api, py::dict o) {
    auto* t = new Torch;
    if (!api.is_none()) {
        auto* table = static_cast<const dlpack::ExchangeAPI*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
        if (!table) throw py::error_already_set();
        if (table->header.major == 1 && table->view_from_object) t->api = table;
    }
    t->describe = o["describe"], t->stream = o["stream"], t->threads = o["threads"], t->scratch = o["scratch"],
    t->tensor = o["tensor"], t->parameter = o["parameter"];
    t->grad_enabled = o["grad_enabled"], t->forward_ad = o["forward_ad"], t->is_neg = t->tensor.attr("is_neg");
    t->requires_grad = t->tensor.attr("requires_grad"), t->dual_level = py::str("_current_level");
    t->forced = o["forced"], t->alike = o["alike"], t->empty_like = o["empty_like"], t->dtype = t->tensor.attr("dtype");
    t->empty_strided = o["empty_strided"];
    for (py::handle mode : o["modes"]) t->modes.push_back(py::reinterpret_borrow<py::object>(mode));
    torch = t;
}

py::list cpu_features() {
    py::list has;
    for (const char* rung : features()) has.append(rung);
    return has;
}

constexpr const char* kKindNames[] = {"Tensor", "Tensor?", "Tensor[]", "int", "float", "float?", "str", "bool"};

}  // namespace

PYBIND11_MODULE(_C, m) {
    dk_parallel_init();
    m.def("init", &init);
    m.attr("attempt") = function("attempt", &attempt, py::none());
    m.def("cpu_features", &cpu_features);

    py::dict build;
    build["compiler"] = DK_COMPILER;
    build["flags"] = DK_FLAGS;
    build["cuda"] = DK_CUDA;  // "" where nvcc was missing
    build["commit"] = DK_COMMIT;
    m.attr("build") = build;

    py::list kernels;  // (rung, op, [(name, kind)...], callable)
    const auto bind = [&](const char* rung, const Entry* e) {
        py::list params;
        std::string names = e->params;
        for (int i = 0; i < e->count; ++i) {
            const size_t space = names.find(' ');
            params.append(py::make_tuple(names.substr(0, space), kKindNames[static_cast<int>(e->kinds[i])]));
            names = space == std::string::npos ? "" : names.substr(space + 1);
        }
        if (e->count > kMaxParams) throw std::runtime_error("too many parameters");
        const auto self = py::capsule(static_cast<const void*>(e));
        kernels.append(py::make_tuple(rung, e->op, params, function(e->op, &invoke, self)));
    };
#define K(rung, op) bind(#rung, &dk_##rung##_##op);
#include "kernels.def"
#undef K
    m.attr("kernels") = kernels;
}
