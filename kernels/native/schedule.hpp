// Who works on what, and when it may add to the sums by token.
//
// Where there are experts enough, up to three crews of threads work on one each. What they add comes in turn. That is a
// third of the work, so more crews would wait for each other.

#pragma once

#include <vector>

#include "layer.hpp"

// Rows of one expert that are worked on at once.
struct Piece {
  Index expert, first, count;
  Index of_expert;  // rows of all of its pieces
  bool again, last;  // not the first of its expert; the last of it
  Index turn = 0;  // when it may add to the sums by token
  bool early = false;  // in backward, does so before it computes gradients of weights
};

inline std::vector<Piece> cut(const Layer& l) {
  std::vector<Piece> pieces;
  for (Index e = 0; e < l.experts; e++) {
    const Index begin = l.offsets[e], rows = l.offsets[e + 1] - begin;
    const Index parts = (rows + l.rows - 1) / l.rows;
    for (Index i = 0; i < parts; i++) {
      const Range own = share(rows, 1, i, parts);
      pieces.push_back({e, begin + own.begin, own.size(), rows, i > 0, i == parts - 1});
    }
  }
  return pieces;
}

// What one crew does without a break: a piece in forward; all pieces of an expert in backward, as they add to the same
// gradients.
struct Job {
  Piece *begin, *end;
  Index pieces() const { return end - begin; }
  Index rows() const { return end[-1].first + end[-1].count - begin->first; }
};

inline std::vector<Job> jobs_of(std::vector<Piece>& pieces, bool backward) {
  std::vector<Job> jobs;
  for (Piece& piece : pieces) {
    if (backward && piece.again)
      jobs.back().end++;
    else
      jobs.push_back({&piece, &piece + 1});
  }
  return jobs;
}

// One long job would keep the others waiting.
inline Index number_of_crews(const std::vector<Job>& jobs, Index threads) {
  Index rows = 0, longest = 0;
  for (const Job& job : jobs) rows += job.rows(), longest = std::max(longest, job.rows());
  for (Index crews : {3, 2})
    if (threads % crews == 0 && 2 * crews * longest <= rows) return crews;
  return 1;
}

// Jobs are taken in their order, so those that run together are neighbours: their pieces take turns. The first of them
// does not wait with it until the end, or the others would idle there from the first piece on.
inline void set_turns(std::vector<Job>& jobs, Index crews) {
  Index turn = 0;
  for (size_t first = 0; first < jobs.size(); first += crews) {
    const size_t last = std::min<size_t>(first + crews, jobs.size());
    Index most = 0;
    for (size_t j = first; j < last; j++) most = std::max(most, jobs[j].pieces());
    for (Index i = 0; i < most; i++)
      for (size_t j = first; j < last; j++)
        if (i < jobs[j].pieces()) {
          jobs[j].begin[i].turn = turn++;
          jobs[j].begin[i].early = j == first;
        }
  }
}
