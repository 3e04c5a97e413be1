#include "trainer/tensorboard/occupancy.h"

#include <fmt/core.h>
#include <png.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "trainer/heat_scale.h"

namespace tessera {

PngImage occupancy_image(const std::vector<std::vector<double>>& share) {
  constexpr int kPixels = 480, kLargestCell = 24;  // of the longer side, about; of a head's square
  const int layers = static_cast<int>(share.size()), heads = static_cast<int>(share.at(0).size());
  const int cell = std::clamp(kPixels / std::max(layers, heads), 1, kLargestCell);
  PngImage result{heads * cell, layers * cell, {}};

  std::vector<std::uint8_t> palette;  // of level + 1
  for (int level = -1; level < kHeatLevels; ++level)
    for (const std::uint8_t part : heat_colour(level)) palette.push_back(part);
  std::vector<std::uint8_t> pixels;
  for (const std::vector<double>& layer : share) {
    std::vector<std::uint8_t> row;
    for (const double head : layer) row.insert(row.end(), static_cast<std::size_t>(cell), static_cast<std::uint8_t>(heat_level(head) + 1));
    for (int y = 0; y < cell; ++y) pixels.insert(pixels.end(), row.begin(), row.end());
  }

  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = static_cast<png_uint_32>(result.width);
  image.height = static_cast<png_uint_32>(result.height);
  image.format = PNG_FORMAT_RGB_COLORMAP;
  image.colormap_entries = kHeatLevels + 1;
  png_alloc_size_t bytes = PNG_IMAGE_PNG_SIZE_MAX(image);
  result.bytes.resize(bytes);
  if (png_image_write_to_memory(&image, result.bytes.data(), &bytes, 0, pixels.data(), 0, palette.data()) == 0)
    throw std::runtime_error(fmt::format("a PNG of {} x {} pixels could not be made: {}", result.width, result.height, image.message));
  result.bytes.resize(bytes);
  return result;
}

}  // namespace tessera
