#pragma once
// What `tessera plan` prints for people, from its JSON.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace tessera {

/// 1234567 as "1,234,567".
std::string grouped(std::int64_t n);
/// 1536 as "1.5 KiB".
std::string human_bytes(double bytes);

/// Of plan_sequence() (trainer/sequence_costs.h).
std::string sequence_text(const nlohmann::ordered_json& sequence);
/// Of simulate() (trainer/simulate.h).
std::string simulation_text(const nlohmann::ordered_json& simulation);

}  // namespace tessera
