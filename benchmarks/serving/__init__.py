"""What serving adapters costs: memory, first answers, throughput and latencies against other ways, a soak."""
