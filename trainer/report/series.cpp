#include "trainer/report/series.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tessera {

std::vector<Point> decimate(std::span<const Point> points, std::size_t buckets) {
  if (points.size() <= 2 * buckets + 2) return {points.begin(), points.end()};
  const std::size_t inner = points.size() - 2;
  std::vector<Point> out = {points.front()};
  for (std::size_t b = 0; b < buckets; ++b) {
    const std::size_t first = 1 + inner * b / buckets, last = 1 + inner * (b + 1) / buckets;
    std::size_t low = first, high = first;
    for (std::size_t i = first + 1; i < last; ++i) {
      if (points[i].y < points[low].y) low = i;
      if (points[i].y > points[high].y) high = i;
    }
    out.push_back(points[std::min(low, high)]);
    if (low != high) out.push_back(points[std::max(low, high)]);
  }
  out.push_back(points.back());
  return out;
}

std::vector<std::size_t> pareto_front(std::span<const Point> points) {
  std::vector<std::size_t> front;
  for (std::size_t i = 0; i < points.size(); ++i) {
    const bool beaten = std::ranges::any_of(points, [&](const Point& p) { return p.x >= points[i].x && p.y <= points[i].y && p != points[i]; });
    if (!beaten) front.push_back(i);
  }
  std::ranges::stable_sort(front, {}, [&](std::size_t i) { return points[i].x; });
  return front;
}

std::vector<double> ticks(double low, double high, int count) {
  const double rough = (high - low) / std::max(1, count), power = std::pow(10, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double m : {5.0, 2.0, 1.0})
    if (m * power >= rough) step = m * power;
  std::vector<double> out;
  const auto first = static_cast<long long>(std::ceil(low / step - 1e-9)), last = static_cast<long long>(std::floor(high / step + 1e-9));
  for (long long i = first; i <= last; ++i) out.push_back(static_cast<double>(i) * step);
  return out;
}

std::vector<double> log_ticks(double low, double high) {
  std::vector<double> out;
  const bool few = std::log10(high / low) < 2.5;
  for (int e = static_cast<int>(std::floor(std::log10(low))); e <= std::ceil(std::log10(high)); ++e)
    for (const double m : {1.0, 2.0, 5.0})
      if (const double t = m * std::pow(10, e); (few || m == 1) && t >= low * (1 - 1e-9) && t <= high * (1 + 1e-9)) out.push_back(t);
  return out;
}

}  // namespace tessera
