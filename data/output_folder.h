#pragma once
// The folder a dataset is made in. Everything happens in its subfolder .prepare, which a lock marks as in use; the finished parts move into place
// at the end. That last step may be killed at any point and loses nothing: once .prepare/complete is there, the new dataset is whole, and who
// comes next finishes the moves. What stood there before lies in .prepare/old until the new dataset is in its place.

#include <string>

namespace tessera {

class OutputFolder {
 public:
  /// Throws std::invalid_argument when the folder cannot be made, holds something else, holds a dataset (without `overwrite`) or is in use.
  OutputFolder(std::string path, bool overwrite);
  OutputFolder(const OutputFolder&) = delete;
  OutputFolder& operator=(const OutputFolder&) = delete;
  /// Removes the staging folder unless keep() was called, and the folder if it was made here and nothing came of it.
  ~OutputFolder();

  std::string staging() const { return path_ + "/.prepare"; }
  /// The folder held a whole dataset whose last step had been interrupted, and which is in its place now.
  bool recovered() const { return recovered_; }
  /// Whether an interrupted run left this file in the staging folder.
  bool has(const std::string& name) const;
  /// Removes what an interrupted run left.
  void clear();
  /// What is in the staging folder stays, for --resume.
  void keep() { keep_ = true; }

  /// Moves the parts into place, the manifest last. What a former dataset had goes only now.
  void commit(const std::string& manifest);

 private:
  void refuse_foreign(bool overwrite) const;
  void move_into_place();

  std::string path_;
  bool existed_ = false, recovered_ = false, keep_ = false;
  int lock_ = -1;
};

}  // namespace tessera
