#pragma once
// Rows of points: fewer of them with the same look, and the best of them.

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

namespace tessera {

struct Point {
  double x = 0, y = 0;
  bool operator==(const Point&) const = default;
};

/// Of points in the order of their x: the first, the last, and of each of `buckets` stretches of equal numbers of points its lowest and highest y,
/// in order. All of them where they are no more than 2 * buckets + 2.
std::vector<Point> decimate(std::span<const Point> points, std::size_t buckets);

/// The Pareto front of points of which a larger x and a smaller y are better: the places of those for which no other is at least as good in both and
/// better in one, in ascending x. Of equal points all.
std::vector<std::size_t> pareto_front(std::span<const Point> points);

/// 1, 2 or 5 times a power of ten from low to high, at most about `count` of them; low < high.
std::vector<double> ticks(double low, double high, int count);
/// Powers of ten, and 2 and 5 times them where there are few, from low to high; 0 < low < high.
std::vector<double> log_ticks(double low, double high);

}  // namespace tessera
