#pragma once
// The page's own files, trainer/report/{page.html,page.css,figure.css,page.js}, which are part of the binary.

namespace tessera {

extern const char* const kPageTemplate;
extern const char* const kPageStyle;
extern const char* const kFigureStyle;  // of figures, but for the colours of heat_scale.h: figure_style() has all
extern const char* const kPageScript;

}  // namespace tessera
