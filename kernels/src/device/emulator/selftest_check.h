// How the self-test reports.
#pragma once

#include "emulator.h"

#include <cstdio>
#include <string>

inline int failures = 0;

inline void check(bool ok, const std::string& what) {
    if (ok) return;
    if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

inline bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

constexpr u32 SCHEDULES = 4;

/// What memory of a GPU is at least aligned to. In vectors of it, sectors begin where rows do.
struct alignas(256) Block {
    u8 bytes[256];
};

using LaunchFunction = int(const EmuLaunch*, const void*, char*, u64);

/// The text of the error that a launch ends in, or "" when it ends well.
template <class Args>
std::string error_of(LaunchFunction* function, const Args& args, EmuLaunch launch) {
    char error[512] = "";
    const int status = function(&launch, &args, error, sizeof error);
    check((status == 0) == (error[0] == 0), "status and text agree");
    return error;
}
