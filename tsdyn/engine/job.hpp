// Describes the struct that a library's calls take, so that native.py can refuse one that differs from its own.
//
// The struct is written twice, here in C++ and there in ctypes; a field on one side only would be memory corruption.

#pragma once

#include <cstddef>
#include <cstdint>

struct Field {
    const char* name;
    int64_t offset, size;
};

#define TSDYN_FIELD(name) \
    { #name, offsetof(Job, name), sizeof(Job::name) }

// Exports the size of Job and its fields; the list ends with a null name.
#define TSDYN_EXPORT_JOB(...)                                               \
    extern "C" {                                                            \
    int64_t job_size() { return sizeof(Job); }                              \
    const Field* job_fields() {                                             \
        static const Field fields[] = {__VA_ARGS__, {nullptr, 0, 0}};       \
        return fields;                                                      \
    }                                                                       \
    }
