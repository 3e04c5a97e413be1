#include "trainer/report/svg.h"

#include <algorithm>
#include <cmath>

#include "trainer/heat_scale.h"
#include "trainer/report/report_files.h"

namespace tessera {

std::string xml_text(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      case '\'': out += "&#39;"; break;
      default:
        if (static_cast<unsigned char>(c) >= 0x20 || c == '\n' || c == '\t') out += c;
    }
  }
  return out;
}

std::string shortened(const std::string& text, std::size_t most) {
  std::size_t characters = 0, cut = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if ((static_cast<unsigned char>(text[i]) & 0xC0) == 0x80) continue;  // within a character
    if (++characters == most) cut = i;
  }
  return characters <= most ? text : text.substr(0, cut) + "\u2026";
}

std::string variant_label(const std::string& variant, bool softmax) {
  return variant + (softmax && variant.find("softmax") == std::string::npos ? " (softmax)" : "");
}

std::string coordinate(double value) {
  std::string text = fmt::format("{:.1f}", value);
  if (text.ends_with(".0")) text.resize(text.size() - 2);
  return text == "-0" ? "0" : text;
}

std::string figure_style() { return kFigureStyle + heat_css(); }

std::string svg_element(const Figure& f) {
  return fmt::format(R"(<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>)",
                     coordinate(f.width), coordinate(f.height), xml_text(f.title), f.body);
}

std::string svg_file(const Figure& f) {
  return fmt::format(
      "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"figure\" width=\"{0}\" height=\"{1}\" "
      "viewBox=\"0 0 {0} {1}\">\n<title>{2}</title>\n<desc>{3}</desc>\n<style>\n{4}</style>\n<rect class=\"paper\" width=\"{0}\" "
      "height=\"{1}\"/>\n{5}\n</svg>\n",
      coordinate(f.width), coordinate(f.height), xml_text(f.title), xml_text(f.caption), xml_text(figure_style()), f.body);
}

Csv::Csv(const std::vector<std::string>& header) {
  std::vector<std::string> fields;
  for (const std::string& name : header) fields.push_back(field(name));
  add(fields);
}

std::string Csv::field(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + "\"";
}

std::string Csv::field(double value) { return std::isfinite(value) ? fmt::format("{:.12g}", value) : ""; }

void Csv::add(const std::vector<std::string>& fields) { text_ += fmt::format("{}\r\n", fmt::join(fields, ",")); }

std::string series_class(std::size_t index, bool twin) {
  if (twin) return index % 4 == 0 ? "line twin" : fmt::format("line twin d{}", index % 4);
  return fmt::format("line s{} d{}", index % 10, index / 10 % 4);
}

std::string tick_count(double value) {
  for (const auto& [unit, name] : {std::pair{1e9, "B"}, {1e6, "M"}, {1e3, "k"}})
    if (std::abs(value) >= unit) return fmt::format("{:.5g}{}", value / unit, name);
  return fmt::format("{:.5g}", value);
}

Plot::Plot(double width, double height, Axis x, Axis y)
    : width_(width), height_(height), right_(width - 14), bottom_(height - 46), x_(std::move(x)), y_(std::move(y)) {
  for (const auto& t : y_.ticks) {
    const double at = this->y(t.at);
    outside_ += fmt::format(R"(<path class="grid" d="M{} {}H{}"/><text class="tick" x="{}" y="{}" text-anchor="end">{}</text>)", coordinate(left_),
                            coordinate(at), coordinate(right_), coordinate(left_ - 6), coordinate(at + 4), xml_text(t.text));
  }
  for (const auto& t : x_.ticks) {
    const double at = this->x(t.at);
    outside_ += fmt::format(R"(<path class="grid" d="M{} {}V{}"/><text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>)", coordinate(at),
                            coordinate(top_), coordinate(bottom_), coordinate(at), coordinate(bottom_ + 16), xml_text(t.text));
  }
  outside_ += fmt::format(R"(<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>)", coordinate((left_ + right_) / 2),
                          coordinate(bottom_ + 36), xml_text(x_.label));
  outside_ += fmt::format(R"svg(<text class="label" transform="translate(14 {}) rotate(-90)" text-anchor="middle">{}</text>)svg",
                          coordinate((top_ + bottom_) / 2), xml_text(y_.label));
}

double Plot::x(double value) const { return left_ + (right_ - left_) * (value - x_.low) / (x_.high - x_.low); }

/// Far outside is as good as farther: coordinates stay small.
double Plot::y(double value) const {
  return std::clamp(bottom_ - (bottom_ - top_) * (value - y_.low) / (y_.high - y_.low), -10 * height_, 10 * height_);
}

namespace {

std::string attributes(const std::string& css, const std::string& key) {
  return fmt::format(R"(class="{}"{})", css, key.empty() ? "" : fmt::format(R"( data-v="{}")", xml_text(key)));
}

}  // namespace

void Plot::line(std::span<const Point> points, const std::string& css, const std::string& tip, const std::string& key) {
  if (points.empty()) return;
  std::string path;
  for (std::size_t i = 0; i < points.size(); ++i)
    path += fmt::format("{}{} {}", i == 0 ? "M" : i == 1 ? "L" : " ", coordinate(x(points[i].x)), coordinate(y(points[i].y)));
  inside_ += fmt::format(R"(<path {} d="{}"><title>{}</title></path>)", attributes(css, key), path, xml_text(tip));
}

void Plot::dot(Point at, const std::string& css, const std::string& tip, const std::string& key) {
  inside_ += fmt::format(R"(<circle {} cx="{}" cy="{}" r="4"><title>{}</title></circle>)", attributes(css, key), coordinate(x(at.x)),
                         coordinate(y(at.y)), xml_text(tip));
}

void Plot::note(Point at, const std::string& text) { notes_.push_back({x(at.x), y(at.y), text}); }

/// Each note in the first place around its dot where nothing is: above or below, right or left, near or farther.
std::string Plot::notes() const {
  struct Box {
    double left, top, right, bottom;
    bool meets(const Box& o) const { return left < o.right && o.left < right && top < o.bottom && o.top < bottom; }
  };
  constexpr double kLetter = 6, kHeight = 9, kDot = 4;
  std::vector<Box> taken;
  for (const Note& n : notes_) taken.push_back({n.x - kDot, n.y - kDot, n.x + kDot, n.y + kDot});
  std::string out;
  for (const Note& n : notes_) {
    const double wide = kLetter * static_cast<double>(n.text.size());
    const auto place = [&](int i) {  // 0 to 15: the baseline's left end
      const double away = 7 + (wide + 3) * (i / 4);
      return Point{n.x + (i % 2 == 0 ? away : -away - wide), n.y + (i / 2 % 2 == 0 ? -5 : 12)};
    };
    const auto box = [&](const Point& p) { return Box{p.x, p.y - kHeight, p.x + wide, p.y}; };
    Point at = place(0);
    for (int i = 0; i < 16; ++i) {
      const Box here = box(place(i));
      if (here.left < left_ || here.right > width_ || std::ranges::any_of(taken, [&](const Box& b) { return b.meets(here); })) continue;
      at = place(i);
      break;
    }
    taken.push_back(box(at));
    out += fmt::format(R"(<text class="note" x="{}" y="{}">{}</text>)", coordinate(at.x), coordinate(at.y), xml_text(n.text));
  }
  return out;
}

void Plot::vertical(double at, double low, double high, const std::string& css) {
  inside_ += fmt::format(R"(<path class="{}" d="M{} {}V{}"/>)", css, coordinate(x(at)), coordinate(y(low)), coordinate(y(high)));
}

void Plot::horizontal(double at, const std::string& css, const std::string& tip) {
  inside_ += fmt::format(R"(<path class="{}" d="M{} {}H{}"><title>{}</title></path>)", css, coordinate(left_), coordinate(y(at)), coordinate(right_),
                         xml_text(tip));
}

void Plot::legend(const std::vector<LegendEntry>& entries) {
  std::size_t longest = 1;
  for (const LegendEntry& e : entries) longest = std::max(longest, e.text.size());
  const std::size_t most = std::min<std::size_t>(longest, 90);
  const double column = 44 + 6.9 * static_cast<double>(most), row = 18;  // a character of names is 6.1 to 6.8 wide in 12px DejaVu Sans
  const auto columns = static_cast<std::size_t>(std::max(1.0, std::floor((right_ - left_) / column)));
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const double at_x = left_ + column * static_cast<double>(i % columns), at_y = height_ + 8 + row * static_cast<double>(i / columns);
    outside_ += fmt::format(R"(<g {}><title>{}</title><path class="{}" d="M{} {}h22"/><text class="legend" x="{}" y="{}">{}</text></g>)",
                            attributes("key", entries[i].key), xml_text(entries[i].text), entries[i].css, coordinate(at_x), coordinate(at_y - 4),
                            coordinate(at_x + 27), coordinate(at_y), xml_text(shortened(entries[i].text, most)));
  }
  height_ += 14 + row * std::ceil(static_cast<double>(entries.size()) / static_cast<double>(columns));
}

Figure Plot::figure(const std::string& id, const std::string& title, const std::string& caption, const Csv& csv, const std::string& run) const {
  return {.id = id, .title = title, .caption = caption, .run = run, .width = width_, .height = height_, .body = body(), .csv = csv.text()};
}

std::string Plot::body() const {
  return outside_ + notes() +
         fmt::format(R"(<svg x="{0}" y="{1}" width="{2}" height="{3}" viewBox="{0} {1} {2} {3}">{4}</svg>)", coordinate(left_), coordinate(top_),
                     coordinate(right_ - left_), coordinate(bottom_ - top_), inside_);
}

}  // namespace tessera
