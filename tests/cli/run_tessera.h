#pragma once
// Runs the built binary as a user would.

#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

namespace tessera {

struct Outcome {
  int code = -1;  // exit code; 128 + signal number when one ended it
  std::string out, err;
};

/// Runs `tessera ARGUMENTS` in a shell, with `before` (environment, timeout) in front of it.
inline Outcome run_tessera(const std::string& arguments, const std::string& before = "") {
  namespace fs = std::filesystem;
  static int count = 0;
  const std::string base = (fs::temp_directory_path() / ("tessera_cli_" + std::to_string(::getpid()) + "_" + std::to_string(count++))).string();
  const std::string command = before + " '" TESSERA_BINARY "' " + arguments + " >'" + base + ".out' 2>'" + base + ".err'";
  const int status = std::system(command.c_str());
  const auto take = [](const std::string& file) {
    std::ostringstream text;
    text << std::ifstream(file).rdbuf();
    fs::remove(file);
    return text.str();
  };
  Outcome outcome;
  outcome.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  outcome.out = take(base + ".out");
  outcome.err = take(base + ".err");
  return outcome;
}

}  // namespace tessera
