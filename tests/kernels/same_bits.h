#pragma once
// Whether two results are equal bit by bit, where ==, for which +0 is -0 and no NaN is itself, says less.

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

namespace tessera {

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// Every output of an attention's forward and backward pass.
template <class Results>
void expect_same_bits(const Results& a, const Results& b, const std::string& what) {
  EXPECT_TRUE(same_bits(a.o, b.o)) << what << ": o";
  EXPECT_TRUE(same_bits(a.z, b.z)) << what << ": z";
  EXPECT_TRUE(same_bits(a.dq, b.dq)) << what << ": dq";
  EXPECT_TRUE(same_bits(a.dk, b.dk)) << what << ": dk";
  EXPECT_TRUE(same_bits(a.dv, b.dv)) << what << ": dv";
  EXPECT_TRUE(same_bits(a.dscale, b.dscale)) << what << ": dscale";
  EXPECT_TRUE(same_bits(a.dtau, b.dtau)) << what << ": dtau";
  EXPECT_EQ(a.bitmap, b.bitmap) << what << ": bitmap";
  EXPECT_EQ(a.counters, b.counters) << what << ": counters";
}

}  // namespace tessera
