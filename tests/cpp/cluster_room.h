// Room for clusters on an H200 of 132 SMs, as cudaOccupancyMaxActiveClusters counts it.
#pragma once
#include "device/decode_plan.h"

inline tq4::ClusterRoom h200_cluster_room() {
  tq4::ClusterRoom room{};
  int size = tq4::kSmallestCluster;
  for (const int count : {30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7}) {
    room.clusters[size++] = count;
  }
  return room;
}
