#pragma once
// The files of model/hf, which an exported model that stock GPT-2 cannot express carries.

namespace tessera {

extern const char* const kConfigurationFile;  // configuration_tessera.py
extern const char* const kModelingFile;       // modeling_tessera.py

}  // namespace tessera
