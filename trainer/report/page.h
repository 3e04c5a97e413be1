#pragma once
// The report as one page.

#include <string>
#include <vector>

#include "trainer/report/figures.h"

namespace tessera {

/// A page of HTML that needs nothing else: figures, table and their numbers are in it. `created`: when and by what, for the reader.
std::string report_page(const Report& report, const std::vector<Figure>& figures, const std::string& created);

}  // namespace tessera
