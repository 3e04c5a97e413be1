#pragma once
// Active share by layer and head as a picture.

#include <string>
#include <vector>

namespace tessera {

struct PngImage {
  int width = 0, height = 0;  // pixels
  std::string bytes;          // of the PNG file; colours of a palette
};

/// `share`: [layers][heads]. A square a head in the colours of heat_scale.h, the first layer on top, the first head on the left. Throws
/// std::runtime_error when libpng cannot make it (out of memory).
PngImage occupancy_image(const std::vector<std::vector<double>>& share);

}  // namespace tessera
