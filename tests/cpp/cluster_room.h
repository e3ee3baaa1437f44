// Room for clusters on an H200 of 132 SMs, as cudaOccupancyMaxActiveClusters counts it.
#pragma once
#include "device/decode_plan.h"

inline tq4::ClusterRoom h200_cluster_room() {
  tq4::ClusterRoom room{};
  const int counts[] = {30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7};  // of 4 CTAs, 5, ...
  for (int i = 0; i < 13; ++i) room.clusters[tq4::kSmallestCluster + i] = counts[i];
  return room;
}
