// SwiGLU's gate, the same in every kernel that applies it.
#pragma once

#include "portable.cuh"

DEVICE float swiglu(float gate, float up) { return gate / (1.0f + exact_exp(-gate)) * up; }
