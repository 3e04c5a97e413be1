#pragma once
// Figures as SVG. Colours are classes of figure.css, which the page and every SVG file carry, so a figure follows the reader's light or dark theme.

#include <fmt/format.h>

#include <span>
#include <string>
#include <vector>

#include "trainer/report/series.h"

namespace tessera {

/// A figure and the numbers in it.
struct Figure {
  std::string id;              // a file's name: letters, digits, - and _
  std::string title, caption;  // plain text
  std::string run;             // the run that it belongs to; "": all
  double width = 0, height = 0;
  std::string body;  // elements, within [0, width] x [0, height]
  std::string csv;   // RFC 4180, with a header
};

/// Text with &, <, >, " and ' as entities, and without characters that XML does not allow.
std::string xml_text(const std::string& text);
/// At most `most` characters of UTF-8 text, the last of them an ellipsis where some are cut.
std::string shortened(const std::string& text, std::size_t most);
/// A variant's name, with "(softmax)" behind it where it is and does not say so.
std::string variant_label(const std::string& variant, bool softmax);
/// A coordinate: one decimal, or none.
std::string coordinate(double value);

/// Rules of the classes that figures use.
std::string figure_style();
/// The figure as an element of a page, and as a file of its own.
std::string svg_element(const Figure& figure);
std::string svg_file(const Figure& figure);

/// Lines of RFC 4180. A number that is not finite is an empty field.
class Csv {
 public:
  explicit Csv(const std::vector<std::string>& header);
  template <class... Fields>
  void row(const Fields&... fields) {
    add({field(fields)...});
  }
  const std::string& text() const { return text_; }

 private:
  static std::string field(const std::string& text);
  static std::string field(const char* text) { return field(std::string(text)); }
  static std::string field(double value);
  static std::string field(std::int64_t value) { return std::to_string(value); }
  static std::string field(int value) { return std::to_string(value); }
  void add(const std::vector<std::string>& fields);
  std::string text_;
};

/// What a series of a plot is drawn with: "s0" to "s9" with dashes from the eleventh on; "twin" stands out, with dashes from the second on.
std::string series_class(std::size_t index, bool twin);

struct LegendEntry {
  std::string text, css;
  std::string key{};  // of a variant, for the page's script
};

/// Axes with ticks in a rectangle, and what is drawn in it; parts outside are cut off.
class Plot {
 public:
  struct Axis {
    std::string label;
    double low = 0, high = 1;
    struct Tick {
      double at;
      std::string text;
    };
    std::vector<Tick> ticks{};
  };
  Plot(double width, double height, Axis x, Axis y);

  void line(std::span<const Point> points, const std::string& css, const std::string& tip, const std::string& key = "");
  void dot(Point at, const std::string& css, const std::string& tip, const std::string& key = "");
  void note(Point at, const std::string& text);  // beside a dot, clear of other notes and of their dots where it can be
  void vertical(double x, double low, double high, const std::string& css);
  void horizontal(double y, const std::string& css, const std::string& tip);
  /// Below the plot, in columns as wide as the longest text; names beyond what a column holds are shortened.
  void legend(const std::vector<LegendEntry>& entries);

  double height() const { return height_; }  // with the legend
  std::string body() const;
  Figure figure(const std::string& id, const std::string& title, const std::string& caption, const Csv& csv, const std::string& run = "") const;

 private:
  struct Note {
    double x, y;
    std::string text;
  };
  double x(double value) const;
  double y(double value) const;
  std::string notes() const;
  double width_, height_, left_ = 62, right_, top_ = 10, bottom_;
  Axis x_, y_;
  std::string inside_, outside_;
  std::vector<Note> notes_;
};

/// "1.5k", "20M": up to five digits, none that is not needed.
std::string tick_count(double value);
/// An axis from `low` to `high`, widened a little, with ticks of `text(value)`. A single value stands in the middle of a tenth of its size, 0 of 1.
template <class Text>
Plot::Axis linear_axis(const std::string& label, double low, double high, int count, Text text) {
  if (!(high > low)) {
    const double width = low == 0 ? 1.0 : 0.1 * (low < 0 ? -low : low);
    low -= width / 2, high += width / 2;
  }
  Plot::Axis axis{label, low - 0.04 * (high - low), high + 0.04 * (high - low), {}};
  for (const double t : ticks(axis.low, axis.high, count)) axis.ticks.push_back({t, text(t)});
  return axis;
}

}  // namespace tessera
