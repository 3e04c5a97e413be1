#pragma once
// Whether text is well-formed XML 1.0, as far as figures use it: elements, attributes, entities, comments, a declaration. No DTD, no CDATA.

#include <cctype>
#include <set>
#include <string>
#include <vector>

namespace tessera::testing {

/// What is wrong and at which byte; "" when nothing is. `count`, where given, gets the number of elements of each name in it as a multiset.
inline std::string xml_problem(const std::string& xml, std::multiset<std::string>* count = nullptr) {
  std::size_t at = 0;
  std::vector<std::string> open;
  bool root_seen = false;
  const auto problem = [&](const std::string& what) { return what + " at byte " + std::to_string(at); };
  const auto name = [&] {
    const std::size_t first = at;
    while (at < xml.size() && (std::isalnum(static_cast<unsigned char>(xml[at])) || xml[at] == '-' || xml[at] == '_' || xml[at] == ':')) ++at;
    return xml.substr(first, at - first);
  };
  const auto spaces = [&] {
    const std::size_t first = at;
    while (at < xml.size() && std::isspace(static_cast<unsigned char>(xml[at]))) ++at;
    return at > first;
  };
  const auto character = [&]() -> std::string {  // of text or of a value: checks it and goes on
    const auto c = static_cast<unsigned char>(xml[at]);
    if (c < 0x20 && c != '\n' && c != '\t' && c != '\r') return problem("control character");
    if (c != '&') {
      int more = c < 0x80 ? 0 : c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : c >= 0xC0 ? 1 : -1;
      if (more < 0) return problem("bad UTF-8");
      for (++at; more > 0; --more, ++at)
        if (at >= xml.size() || (static_cast<unsigned char>(xml[at]) & 0xC0) != 0x80) return problem("bad UTF-8");
      return "";
    }
    for (const char* entity : {"&amp;", "&lt;", "&gt;", "&quot;", "&#39;"})
      if (xml.compare(at, std::string(entity).size(), entity) == 0) return at += std::string(entity).size(), "";
    return problem("unknown entity");
  };
  if (xml.starts_with("<?xml")) at = xml.find("?>") + 2;
  while (at < xml.size()) {
    if (xml[at] != '<') {
      if (open.empty() && !std::isspace(static_cast<unsigned char>(xml[at]))) return problem("text outside the root");
      if (const std::string p = character(); !p.empty()) return p;
      continue;
    }
    ++at;
    if (at < xml.size() && xml[at] == '/') {
      ++at;
      const std::string closing = name();
      if (open.empty() || open.back() != closing) return problem("</" + closing + "> closes nothing");
      open.pop_back();
      if (at >= xml.size() || xml[at++] != '>') return problem("expected >");
      continue;
    }
    const std::string element = name();
    if (element.empty()) return problem("expected an element's name");
    if (open.empty() && root_seen) return problem("a second root");
    root_seen = true;
    if (count) count->insert(element);
    std::set<std::string> attributes;
    while (true) {
      const bool space = spaces();
      if (at >= xml.size()) return problem("the end within a tag");
      if (xml[at] == '>') {
        ++at;
        open.push_back(element);
        break;
      }
      if (xml.compare(at, 2, "/>") == 0) {
        at += 2;
        break;
      }
      if (!space) return problem("expected a space before an attribute");
      const std::string attribute = name();
      if (attribute.empty()) return problem("expected an attribute's name");
      if (!attributes.insert(attribute).second) return problem("attribute " + attribute + " twice");
      if (xml.compare(at, 2, "=\"") != 0) return problem("expected =\"");
      for (at += 2; at < xml.size() && xml[at] != '"';) {
        if (xml[at] == '<') return problem("< in a value");
        if (const std::string p = character(); !p.empty()) return p;
      }
      ++at;
    }
  }
  if (!open.empty()) return problem("<" + open.back() + "> is not closed");
  return root_seen ? "" : problem("no root");
}

}  // namespace tessera::testing
