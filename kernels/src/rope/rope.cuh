// The rotation of one pair, the same in every kernel that applies it.
#pragma once

#include "portable.cuh"

DEVICE void rotate_pair(float& low, float& high, float cos, float sin) {
    const float l = low, h = high;
    low = l * cos - h * sin;
    high = h * cos + l * sin;
}
