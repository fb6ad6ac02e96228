"""Latency, throughput and memory of tracin-serve under the load of many clients."""
