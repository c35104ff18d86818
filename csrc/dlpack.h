// The part of DLPack's C ABI (version 1.x) that the border uses, written from its specification:
// the tensor view and the exchange API that torch >= 2.10 publishes as Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <cstdint>

namespace dlpack {

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
    int32_t type;
    int32_t id;
};

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};

struct ExchangeAPI {
    struct Header {
        uint32_t major, minor;
        Header* previous;
    } header;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*view_from_object)(void* object, Tensor* out);  // non-owning; -1 with a Python error set; may be null
    int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace dlpack
